#!/usr/bin/env python3
"""Sets figures side by side: compare.py [--short] FILE.JSON... prints tables of what bench/cuda and
bench/peers/measure.py wrote. Needs nothing but Python.

--short leaves out what is neither aimed at nor set beside a peer. The exit status is 0 also where an
aim was missed: it is said in the table."""

import json
import sys

KINDS = ("ours", "loop", "threads", "DataLoader", "ring", "resident")


def median(values):
    values = sorted(values)
    return values[len(values) // 2]


def number(value):
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:.3g} M" if size < 1e9 else f"{value / 1e6:.0f} M"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def spread(values):
    if len(values) == 1:
        return number(values[0])
    return f"{number(median(values))} ({number(min(values))} to {number(max(values))})"


def read(paths):
    """All entries, and what each file says about itself."""
    entries, about = [], []
    for path in paths:
        try:
            with open(path) as file:
                whole = json.load(file)
            rows = whole.pop("rows")
        except (OSError, ValueError, KeyError) as error:
            about.append(f"{path}: not read: {error!r}")
            continue
        said = ", ".join(f"{key} {value}" for key, value in whole.items() if not isinstance(value, list))
        about.append(f"{path}: {said}")
        for entry in rows:
            # What is no number is null in JSON.
            runs = entry.get("runs", [])
            entry["runs"] = [run for run in runs if isinstance(run, (int, float))]
            if len(entry["runs"]) < len(runs):
                entry.setdefault("note", f"{len(runs) - len(entry['runs'])} runs gave no number")
            entry["cores"] = [run for run in entry.get("busy_cores", []) if run is not None]
            entries.append(entry)
    return entries, about


def rows_of(entries):
    """Entries by row, in the order in which rows came."""
    rows = {}
    for entry in entries:
        rows.setdefault(entry["row"], []).append(entry)
    return rows


def ratio(entry, other):
    """Run by run where they ran in turn, else of the medians."""
    ours, theirs = entry["runs"], other["runs"]
    if len(ours) == len(theirs) and other["kind"] in ("ours", "loop", "threads"):
        pairs = [a / b for a, b in zip(ours, theirs) if b]
        return pairs or None
    return [median(ours) / median(theirs)] if median(theirs) else None


def best(contenders, kind):
    found = [entry for entry in contenders if entry["kind"] == kind and entry["runs"]]
    return max(found, key=lambda entry: median(entry["runs"]), default=None)


def verdict(entry, contenders):
    """What was aimed at, and whether it was met."""
    said = []
    aim = entry.get("aim")
    if aim and entry["runs"]:
        value, of = median(entry["runs"]), ""
        if "of" in aim:
            other = next((other for other in contenders if other["who"] == aim["of"]), None)
            shares = ratio(entry, other) if other and other["runs"] else None
            if not shares:
                return f"no figure of {aim['of']}"
            value, of = median(shares), f" of {aim['of']}"
        if "at_least" in aim:
            met, bound = value >= aim["at_least"], f"≥ {number(aim['at_least'])}"
        else:
            met, bound = value <= aim["at_most"], f"≤ {number(aim['at_most'])}"
        got = f": {number(value)}" if of else ""
        said.append(f"{bound}{of}{got} {'met' if met else '**missed**'}")
    if "cores_below" in entry and entry["cores"]:
        met = median(entry["cores"]) < entry["cores_below"]
        said.append(f"< {number(entry['cores_below'])} cores {'met' if met else '**missed**'}")
    return ", ".join(said)


def table(header, lines):
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for line in lines:
        print("| " + " | ".join(line) + " |")
    print()


def plain(rows):
    """Each contender's figure, and ours in multiples of the others'."""
    lines = []
    for row, contenders in rows.items():
        peers = {kind: best(contenders, kind) for kind in KINDS[1:]}
        for entry in sorted(contenders, key=lambda entry: KINDS.index(entry["kind"])):
            who = entry["who"] if entry["kind"] == "ours" else f"*{entry['who']}*"
            if not entry["runs"]:
                lines.append([row, who, "left out", "", "", "", "", "", entry.get("note", "")])
                continue
            per_second = entry["unit"] == "samples/s" and "sample_bytes" in entry
            bandwidth = median(entry["runs"]) * entry["sample_bytes"] / 1e9 if per_second else None
            times = {}
            for kind, peer in peers.items():
                shares = ratio(entry, peer) if peer and entry["kind"] == "ours" else None
                times[kind] = number(median(shares)) if shares else ""
            # On the GPU from the start is what only a resident data set can be set beside.
            gpu = times["resident"] if "resident" in entry["who"] else ""
            lines.append([
                row,
                who,
                f"{spread(entry['runs'])} {entry['unit']}",
                number(bandwidth) if bandwidth else "",
                number(median(entry["cores"])) if entry["cores"] else "",
                times["DataLoader"],
                times["ring"],
                times["loop"] or gpu and f"{gpu} × index_select",
                verdict(entry, contenders) or entry.get("note", ""),
            ])
    header = ["row", "who", "median (least to largest)", "GB/s", "busy cores", "× DataLoader, best",
              "× ring", "share of the loop", "aim"]
    if lines:
        table(header, lines)


def aims(rows):
    """What was aimed at, a line each."""
    lines = []
    for row, contenders in rows.items():
        for entry in contenders:
            said = verdict(entry, contenders)
            if said:
                lines.append([row, entry["who"], f"{spread(entry['runs'])} {entry['unit']}", said])
            elif not entry["runs"] and ("aim" in entry or entry["kind"] != "ours"):
                lines.append([row, entry["who"], "left out", entry.get("note", "")])
    if lines:
        table(["row", "who", "median (least to largest)", "aim"], lines)


def matrix(rows):
    """Samples per second of all who load the same, a line for each row."""
    lines = []
    for row, contenders in rows.items():
        ours = {entry["who"]: entry for entry in contenders if entry["kind"] == "ours"}
        if "gathered" not in ours or ours["gathered"]["unit"] != "samples/s":
            continue
        figure = lambda entry: number(median(entry["runs"])) if entry and entry["runs"] else ""
        peers = {kind: best(contenders, kind) for kind in KINDS[1:]}
        multiples = []
        for who, kind in (("gathered", "DataLoader"), ("gathered", "ring"), ("resident", "resident")):
            entry, peer = ours.get(who), peers[kind]
            shares = ratio(entry, peer) if entry and entry["runs"] and peer else None
            multiples.append(number(median(shares)) if shares else "")
        ways = ("staged", "gathered", "gathered by copies", "gathered by a kernel", "resident")
        lines.append([row, *(figure(ours.get(way)) for way in ways),
                      *(figure(peers[kind]) for kind in KINDS[1:]), *multiples])
    if lines:
        print("Samples per second\n")
        table(["row", "staged", "gathered", "by copies", "by a kernel", "resident", "loop", "threads",
               "DataLoader", "ring", "index_select on GPU", "gathered × DataLoader",
               "gathered × ring", "resident × index_select"], lines)


def sweep(entries, over, title, cell):
    """A line for each size, a column for each contender."""
    swept = [entry for entry in entries if entry.get("sweep") == over and entry["runs"]]
    if not swept:
        return
    whos = list(dict.fromkeys(entry["who"] for entry in swept))
    sizes = sorted({entry[over] for entry in swept})
    lines = []
    for size in sizes:
        at = {entry["who"]: entry for entry in swept if entry[over] == size}
        cells = [cell(at[who], at) if who in at else "" for who in whos]
        lines.append([f"{size:,}", *cells])
    print(f"{title}\n")
    table([over.replace("_", " "), *whos], lines)


def crossover(entries):
    """From which size of rows on copies are faster than the kernel."""
    rates = {}
    for entry in entries:
        if entry.get("sweep") == "row_bytes" and entry["runs"]:
            rates.setdefault(entry["row_bytes"], {})[entry["who"]] = median(entry["runs"])
    both = sorted(
        (size, rate["gathered by copies"] >= rate["gathered by a kernel"])
        for size, rate in rates.items()
        if "gathered by copies" in rate and "gathered by a kernel" in rate
    )
    if not both:
        return
    first = next((at for at in range(len(both)) if all(copies for _, copies in both[at:])), None)
    if first is None:
        print("Copies are never faster than the kernel.\n")
    elif first == 0:
        print("Copies are faster than the kernel for rows of every size.\n")
    else:
        print(f"Copies are faster than the kernel from rows of {both[first][0]:,} bytes on; with "
              f"{both[first - 1][0]:,} they are not.\n")


def main():
    short = "--short" in sys.argv
    paths = [argument for argument in sys.argv[1:] if argument != "--short"]
    if not paths:
        sys.exit("usage: compare.py [--short] FILE.JSON...")
    entries, about = read(paths)
    if not entries:
        sys.exit("compare.py: no figures in " + ", ".join(paths))
    print("\n".join(about) + "\n")
    if any("quick True" in line for line in about):
        print("**Tiny sizes: the figures mean nothing.**\n")
    rows = rows_of(entry for entry in entries if "sweep" not in entry)
    if short:
        aims(rows)
        matrix(rows)
    else:
        plain(rows)
    rate = lambda entry: median(entry["runs"])
    sweep(entries, "row_bytes", "Samples per second, and GB/s, by the size of rows",
          lambda entry, _: f"{number(rate(entry))}, {number(rate(entry) * entry['row_bytes'] / 1e9)}")
    crossover(entries)

    def link_use(entry, at):
        loop = next((other for other in at.values() if other["kind"] == "loop"), None)
        share = f" ({100 * rate(entry) / rate(loop):.0f} %)" if loop and rate(loop) else ""
        return f"{number(rate(entry) * entry['row_bytes'] / 1e9)}{share}"

    sweep(entries, "batch", "GB/s, and share of the plain loop, by the size of batches of 150,528-byte rows", link_use)
    missed = sum("**missed**" in verdict(entry, contenders)
                 for contenders in rows_of(entries).values() for entry in contenders)
    left_out = sum(not entry["runs"] for entry in entries)
    print(f"{len(entries)} figures, {missed} aims missed, {left_out} left out")


if __name__ == "__main__":
    main()
