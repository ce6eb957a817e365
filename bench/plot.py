#!/usr/bin/env python3
"""Draws what was measured over sizes: plot.py FOLDER FILE.JSON... writes row-sizes.svg (samples per
second by the size of a row) and link-use.svg (bandwidth by the size of a batch) into FOLDER. Needs
nothing but Python."""

import json
import math
import os
import sys
from html import escape

WIDTH, HEIGHT = 860, 480
LEFT, RIGHT, TOP, BOTTOM = 84, 24, 84, 110

# A card of its own, so that it can be read on a page of any colour. Peers are dashed.
COLOURS = [
    ("#0969da", "#58a6ff"), ("#1a7f37", "#3fb950"), ("#bc4c00", "#f0883e"), ("#8250df", "#bc8cff"),
    ("#cf222e", "#ff7b72"), ("#57606a", "#8c959f"), ("#9a6700", "#d29922"), ("#0a7ea4", "#39c5cf"),
]
# So that a series has the same colour in every picture; others get what is left.
KNOWN = [
    "staged", "gathered by copies", "gathered by a kernel", "resident", "DataLoader, tuned", "page-locked ring",
    "plain loop of copies",
]
STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de; }
  text { fill: #1f2328; font: 12px system-ui, 'DejaVu Sans', sans-serif; }
  .title { font-size: 16px; font-weight: 600; }
  .grid { stroke: #d8dee4; stroke-width: 1; }
  .line { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
  .peer { stroke-dasharray: 5 4; }
  .range { stroke-width: 1; }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117; stroke: #30363d; }
    text { fill: #e6edf3; }
    .grid { stroke: #30363d; }
  }
"""


def colours():
    light = " ".join(f".c{at} {{ stroke: {one}; }}" for at, (one, _) in enumerate(COLOURS))
    dark = " ".join(f".c{at} {{ stroke: {one}; }}" for at, (_, one) in enumerate(COLOURS))
    return f"{light} @media (prefers-color-scheme: dark) {{ {dark} }}"


def median(values):
    return sorted(values)[len(values) // 2]


def label(value):
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.4g} {letter}"
    return f"{value:.4g}"


def size(value):
    for factor, unit in ((1 << 20, "MiB"), (1 << 10, "KiB")):
        if value >= factor and value % factor == 0:
            return f"{value // factor} {unit}"
    return f"{value:,}"


class Scale:
    """Values to places, by their logarithm or as they are."""

    def __init__(self, low, high, start, end, logarithmic):
        self.of = math.log10 if logarithmic else float
        self.low, self.high, self.start, self.end = self.of(low), self.of(high), start, end

    def __call__(self, value):
        share = (self.of(value) - self.low) / (self.high - self.low or 1)
        return self.start + share * (self.end - self.start)


def steps(high):
    """About five round numbers from 0 to at least this."""
    rough = high / 5
    step = 10 ** math.floor(math.log10(rough))
    step *= next(factor for factor in (1, 2, 5, 10) if factor * step >= rough)
    return [step * number for number in range(math.ceil(high / step - 1e-9) + 1)]


def draw(title, below, unit, names, series, logarithmic):
    """A line for each series: its name, whether it is a peer's, and (x, runs)."""
    places = sorted({x for _, _, points in series for x, _ in points})
    every = [run for _, _, points in series for _, runs in points for run in runs if run > 0]
    if logarithmic:
        first, last = math.floor(math.log10(min(every))), math.ceil(math.log10(max(every)))
        marks = [10.0**power for power in range(first, max(last, first + 1) + 1)]
    else:
        marks = steps(max(every))
    across = Scale(places[0], places[-1], LEFT + 24, WIDTH - RIGHT - 24, True)
    up = Scale(marks[0], marks[-1], HEIGHT - BOTTOM, TOP, logarithmic)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        f' width="{WIDTH}" height="{HEIGHT}" role="img">',
        f"<style>{STYLE}{colours()}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>',
    ]

    def text(x, y, words, anchor="start", kind=""):
        out.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>')

    text(LEFT, 34, title, kind="title")
    text(LEFT, 54, below)
    text(LEFT - 8, TOP - 14, unit, "end")
    for mark in marks:
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(mark):.1f}" y2="{up(mark):.1f}"/>')
        text(LEFT - 8, up(mark) + 4, label(mark), "end")
    for place in places:
        text(across(place), HEIGHT - BOTTOM + 18, names(place), "middle")
    at, line = LEFT, HEIGHT - BOTTOM + 48
    others = [name for name, _, _ in series if name not in KNOWN]
    for name, peer, points in series:
        number = (KNOWN + others).index(name)
        kind = f"line c{number % len(COLOURS)}{' peer' if peer else ''}"
        points = sorted(points)
        path = " ".join(f"{across(x):.1f},{up(median(runs)):.1f}" for x, runs in points)
        out.append(f'<polyline class="{kind}" points="{path}"/>')
        for x, runs in points:
            # From the least run to the largest.
            ends = f'y1="{up(max(min(runs), marks[0])):.1f}" y2="{up(max(runs)):.1f}"'
            out.append(f'<line class="range c{number % len(COLOURS)}" x1="{across(x):.1f}" x2="{across(x):.1f}" {ends}/>')
        width = 24 + 6.6 * len(name) + 24
        if at + width > WIDTH - RIGHT:
            at, line = LEFT, line + 20
        out.append(f'<line class="{kind}" x1="{at}" x2="{at + 18}" y1="{line - 4}" y2="{line - 4}"/>')
        text(at + 24, line, name)
        at += width
    out.append("</svg>")
    return "\n".join(out) + "\n"


def series_of(entries, over, value):
    """Points of each contender, in the order in which they came."""
    found = {}
    for entry in entries:
        if entry.get("sweep") == over:
            runs = [value(entry, run) for run in entry["runs"] if run]
            if runs:
                peer = entry["kind"] != "ours"
                found.setdefault((entry["who"], peer), []).append((entry[over], runs))
    return [(who, peer, points) for (who, peer), points in found.items()]


def main():
    if len(sys.argv) < 3:
        sys.exit("usage: plot.py FOLDER FILE.JSON...")
    folder, entries, devices = sys.argv[1], [], []
    for path in sys.argv[2:]:
        with open(path) as file:
            whole = json.load(file)
        entries += whole["rows"]
        devices.append(whole.get("device", ""))
    device = next(iter(devices), "")
    for name, over, title, about, unit, names, value, logarithmic in (
        ("row-sizes.svg", "row_bytes", "Samples per second, by the bytes of a sample",
         "random order, batches of about 32 MiB", "samples/s", size, lambda _, run: run, True),
        ("link-use.svg", "batch", "Bandwidth, by the samples of a batch",
         "random samples of 150,528 bytes", "GB/s", lambda place: f"{place:,}",
         lambda entry, run: run * entry["row_bytes"] / 1e9, False),
    ):
        series = series_of(entries, over, value)
        if not series:
            print(f"{name}: nothing measured over {over}", file=sys.stderr)
            continue
        below = f"{about}; medians, and from the least run to the largest; {device}"
        with open(os.path.join(folder, name), "w") as file:
            file.write(draw(title, below, unit, names, series, logarithmic))
        print(os.path.join(folder, name))


if __name__ == "__main__":
    main()
