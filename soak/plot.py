#!/usr/bin/env python3
"""Draws the table of a soak: plot.py SOAK.CSV SOAK.SVG. Needs nothing but Python."""

import csv
import math
import sys
from html import escape

WIDTH, LEFT, RIGHT = 860, 78, 24
PANEL, GAP, TOP = 150, 74, 100
MIB = 1 << 20

# Each panel: its title, its unit, what its scale shows at least, and per line a label, a class and a
# value of a row.
PANELS = [
    (
        "Memory",
        "MiB",
        0,
        [
            ("resident", "a", lambda row: row["resident_bytes"] / MIB),
            ("given up with lost devices, by design", "b", lambda row: row["given_up_bytes"] / MIB),
            ("resident, without what was given up", "c",
             lambda row: (row["resident_bytes"] - row["given_up_bytes"]) / MIB),
        ],
    ),
    (
        "Left on the heap by rounds whose device lived",
        "KiB",
        64,
        [("bytes allocated and never freed", "c", lambda row: row["left_behind_bytes"] / 1024)],
    ),
    (
        "Threads and open files",
        "number",
        0,
        [
            ("threads at that moment", "d", lambda row: row["threads"]),
            ("threads between rounds", "a", lambda row: row["idle_threads"]),
            ("open files between rounds", "c", lambda row: row["idle_files"]),
        ],
    ),
    (
        "Samples delivered and compared",
        "million",
        0,
        [("samples", "a", lambda row: row["samples"] / 1e6)],
    ),
]

# A card of its own, so that it can be read on a page of any colour.
STYLE = """
  .card { fill: #ffffff; stroke: #d0d7de; }
  text { fill: #1f2328; font: 12px system-ui, 'DejaVu Sans', sans-serif; }
  .title { font-size: 16px; font-weight: 600; }
  .panel { font-weight: 600; }
  .grid { stroke: #d8dee4; stroke-width: 1; }
  .line { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
  .a { stroke: #0969da; } .b { stroke: #bc4c00; } .c { stroke: #1a7f37; } .d { stroke: #afb8c1; }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117; stroke: #30363d; }
    text { fill: #e6edf3; }
    .grid { stroke: #30363d; }
    .a { stroke: #58a6ff; } .b { stroke: #f0883e; } .c { stroke: #3fb950; } .d { stroke: #6e7681; }
  }
"""


def steps(low, high, about):
    """Round numbers from at most low to at least high, about so many."""
    rough = (high - low or 1) / about
    size = 10 ** math.floor(math.log10(rough))
    size *= next(factor for factor in (1, 2, 5, 10) if factor * size >= rough)
    first, last = math.floor(low / size), max(math.ceil(high / size), math.floor(low / size) + 1)
    return [number * size for number in range(first, last + 1)]


def label(value):
    return f"{value:.10g}"


def draw(rows):
    height = TOP + len(PANELS) * (PANEL + GAP)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
        f' width="{WIDTH}" height="{height}" role="img">',
        f"<style>{STYLE}</style>",
        f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="8"/>',
    ]

    def text(x, y, words, anchor="start", kind=""):
        out.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>')

    end = rows[-1]
    text(LEFT, 34, f"Soak: {end['samples']:,.0f} samples in {end['rounds']:,.0f} random rounds", kind="title")
    text(LEFT, 54, "one row per second; between rounds nothing of a round may be left")
    seconds = steps(0, end["seconds"], 8)
    inner = WIDTH - LEFT - RIGHT
    place = lambda at: LEFT + inner * at / seconds[-1]
    for number, (title, unit, least, lines) in enumerate(PANELS):
        top = TOP + number * (PANEL + GAP)
        values = [[line[2](row) for row in rows] for line in lines]
        every = [value for series in values for value in series]
        high, low = max(least, *every), min(every)
        # Less than a pixel below zero is no reason to show what is below.
        marks = steps(low if -low * PANEL > high else 0, high, 4)
        level = lambda value: top + PANEL - PANEL * (value - marks[0]) / (marks[-1] - marks[0])
        text(LEFT, top - 10, f"{title}, {unit}", kind="panel")
        for mark in marks:
            out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{level(mark):.1f}" y2="{level(mark):.1f}"/>')
            text(LEFT - 8, level(mark) + 4, label(mark), "end")
        for second in seconds:
            text(place(second), top + PANEL + 17, label(second), "middle")
        text(WIDTH - RIGHT, top + PANEL + 34, "seconds", "end")
        at = LEFT
        for (name, kind, _), series in zip(lines, values):
            points = " ".join(f"{place(row['seconds']):.1f},{level(value):.1f}" for row, value in zip(rows, series))
            out.append(f'<polyline class="line {kind}" points="{points}"/>')
            below = top + PANEL + 34
            out.append(f'<line class="line {kind}" x1="{at}" x2="{at + 18}" y1="{below - 4}" y2="{below - 4}"/>')
            text(at + 24, below, name)
            at += 24 + 6.3 * len(name) + 22
    out.append("</svg>")
    return "\n".join(out) + "\n"


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: plot.py SOAK.CSV SOAK.SVG")
    with open(sys.argv[1], newline="") as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    if not rows:
        sys.exit(f"{sys.argv[1]} has no rows")
    with open(sys.argv[2], "w") as file:
        file.write(draw(rows))


main()
