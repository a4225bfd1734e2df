"""The house's report pages: one self-contained HTML file, no script, light and dark.

Pages are put together from the few parts below; each returns a piece of HTML.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --soft: #5b6475; --line: #dfe3ea; --card: #fff; --page: #f6f7f9;
  --a: #3457d5; --b: #d9822b; --c: #2f9e6e; --d: #b3486f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebf2; --soft: #9aa4b8; --line: #2c3445; --card: #171c28;
  --page: #0f131c; --a: #7f9bff; --b: #f0a95b; --c: #5fcf9f; --d: #e58bb0; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif }
main { max-width: 1060px; margin: 0 auto; padding: 32px 20px 64px }
h1 { font-size: 28px; margin: 0 0 4px } h2 { font-size: 18px; margin: 0 0 12px } p { margin: 0 0 12px }
.lead, figcaption, small { color: var(--soft) }
.bar + p { margin-top: 12px } section > :last-child { margin-bottom: 0 }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px; margin: 18px 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 600 } td.n, th.n { text-align: right }
.numbers { display: flex; flex-wrap: wrap; gap: 28px; margin-bottom: 12px }
.numbers b { display: block; font-size: 26px }
.bar { display: grid; grid-template-columns: 170px 1fr 90px; gap: 12px; align-items: center; margin: 5px 0 }
.bar i { display: block; height: 14px; min-width: 2px; border-radius: 4px; background: var(--a) }
.bar span:last-child { text-align: right; font-variant-numeric: tabular-nums }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 14px }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(300px, 1fr)); gap: 20px 28px }
.side { display: flex; gap: 4px } .side > * { flex: 1; min-width: 0 }
figure { margin: 0; min-width: 0 } figure img { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 8px;
  background: var(--page); border: 1px solid var(--line) }
figcaption { font-size: 13px; overflow-wrap: anywhere } .right { color: var(--c) } .wrong { color: var(--d) }
.missing { width: 100%; aspect-ratio: 1; display: grid; place-items: center; border: 1px dashed var(--line);
  border-radius: 8px; color: var(--soft); font-size: 13px }
svg { width: 100%; height: auto } svg text { fill: var(--soft); font-size: 12px }
pre { margin: 0; padding: 14px; border-radius: 8px; background: var(--page); overflow-x: auto; font-size: 13px }
"""
COLOURS = ("--a", "--b", "--c", "--d")


def page(title: str, lead: str, *sections: Markup) -> str:
    body = Markup("").join(sections)
    return (
        Markup(
            '<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            "<title>{}</title><style>{}</style><main><h1>{}</h1><p class=lead>{}</p>{}</main></html>\n"
        )
    ).format(title, Markup(STYLE), title, lead, body)


def section(title: str, *parts: Markup | str) -> Markup:
    return Markup("<section><h2>{}</h2>{}</section>").format(title, Markup("").join(parts))


def paragraph(text: str | Markup) -> Markup:
    return Markup("<p>{}</p>").format(text)


def code(text: str) -> Markup:
    return Markup("<pre>{}</pre>").format(text)


def numbers(values: dict[str, str]) -> Markup:
    items = (Markup("<div><b>{}</b>{}</div>").format(value, name) for name, value in values.items())
    return Markup("<div class=numbers>{}</div>").format(Markup("").join(items))


def bars(rows: Sequence[tuple[str, float, str]], most: float = 0, marked: str = "") -> Markup:
    """(name, size, text) rows as horizontal bars on one scale, up to ``most`` or the longest; the one named ``marked``
    in another colour."""
    most = max([most, *(size for _, size, _ in rows)]) or 1
    row = Markup('<div class=bar><span>{}</span><i style="width:{:.2f}%{}"></i><span>{}</span></div>')
    colours = [Markup(";background:var(--b)") if name == marked else "" for name, _, _ in rows]
    drawn = zip(rows, colours, strict=True)
    return Markup("").join(row.format(name, 100 * size / most, colour, text) for (name, size, text), colour in drawn)


def histogram(title: str, values: Sequence[float], lines: dict[str, float], bins: int = 24) -> Markup:
    """How often values occur, from their 1st to their 99th percentile and at least up to the named ``lines``, which are
    thresholds drawn across."""
    data = np.asarray(values, dtype=np.float64)
    low, high = np.percentile(data, [1, 99])
    shown = [value for value in lines.values() if low - (high - low) <= value <= high + (high - low)]
    low, high = min([low, *shown]), max([high, *shown])
    if (data == data.round()).all() and high - low < 3 * bins:  # whole numbers fall into bins of equally many
        each = int((high - low) // bins + 1)
        bins = int((high - low) // each + 1)
        low, high = low - 0.5, low - 0.5 + each * bins
    counts, edges = np.histogram(np.clip(data, low, high), bins=bins, range=(low, high if high > low else low + 1))
    width, height, bottom, top = 460, 150, 22, 22
    step, tallest = width / bins, max(1, counts.max())
    parts = [
        f'<rect x="{index * step + 1:.1f}" y="{height - bottom - size:.1f}" width="{step - 2:.1f}" height="{size:.1f}" '
        'rx="2" fill="var(--a)"/>'
        for index, size in enumerate((height - bottom - top) * counts / tallest)
    ]
    for name, value in lines.items():
        if low <= value <= high:
            x = width * (value - edges[0]) / (edges[-1] - edges[0])
            left = x < width / 2
            parts.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{height - bottom}" stroke="var(--b)" stroke-width="2"/>'
            )
            parts.append(
                f'<text x="{x + (6 if left else -6):.1f}" y="14" text-anchor="{"start" if left else "end"}" '
                f'style="fill:var(--b)">{escape(name)}</text>'
            )
    parts.append(f'<text x="0" y="{height - 6}">{short(edges[0])}</text>')
    parts.append(f'<text x="{width}" y="{height - 6}" text-anchor="end">{short(edges[-1])}</text>')
    drawn = Markup(f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>')
    return Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(title, drawn)


def short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def columns(parts: Sequence[Markup]) -> Markup:
    """Charts beside each other, as many as there is room for."""
    return Markup("<div class=charts>{}</div>").format(Markup("").join(parts))


def table(head: Sequence[str], rows: Sequence[Sequence[object]], numeric: int = 1) -> Markup:
    """Columns from ``numeric`` on are right-aligned."""

    def cells(tag: str, values: Sequence[object]) -> Markup:
        kinds = (Markup(" class=n") if index >= numeric else Markup("") for index in range(len(values)))
        cell = Markup("<{0}{1}>{2}</{0}>")
        return Markup("").join(cell.format(Markup(tag), kind, value) for kind, value in zip(kinds, values, strict=True))

    body = Markup("").join(Markup("<tr>{}</tr>").format(cells("td", row)) for row in rows)
    return Markup("<div class=scroll><table><tr>{}</tr>{}</table></div>").format(cells("th", head), body)


def figure(images: Sequence[bytes | None], caption: str | Markup) -> Markup:
    """Pictures side by side over one caption."""
    shown = Markup("").join(shrunk(data, caption) for data in images)
    return Markup("<figure><div class=side>{}</div><figcaption>{}</figcaption></figure>").format(shown, caption)


def shrunk(data: bytes | None, words: str | Markup, side: int = 240) -> Markup:
    """A picture as a data URI, scaled down to ``side``; a dashed box where it cannot be shown."""
    try:
        image = Image.open(io.BytesIO(data or b""))
        if image.width * image.height > 50_000_000:
            raise ValueError("too large to show")
        small = image.convert("RGB")
        small.thumbnail((side, side))
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=80)
        source = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
        return Markup('<img alt="{}" src="{}">').format(Markup(words).striptags(), source)
    except (OSError, ValueError, Image.DecompressionBombError):
        return Markup("<div class=missing>no picture to show</div>")


def pictures(figures: Sequence[Markup]) -> Markup:
    return Markup("<div class=pictures>{}</div>").format(Markup("").join(figures))


def radar(series: dict[str, dict[str, float]]) -> Markup:
    """Named series of spoke → 0 to 1, as polygons over one set of spokes, with a legend."""
    spokes = list(dict.fromkeys(name for values in series.values() for name in values))
    width, height, radius = 640, 400, 145
    turns = [2 * np.pi * index / len(spokes) - np.pi / 2 for index in range(len(spokes))]

    def points(sizes: Sequence[float]) -> str:
        at = zip(turns, sizes, strict=True)
        return " ".join(f"{width / 2 + size * np.cos(t):.1f},{height / 2 + size * np.sin(t):.1f}" for t, size in at)

    out = [
        f'<polygon points="{points([radius * ring / 4] * len(spokes))}" fill="none" stroke="var(--line)"/>'
        for ring in range(1, 5)
    ]
    for name, turn in zip(spokes, turns, strict=True):
        x, y = width / 2 + (radius + 14) * np.cos(turn), height / 2 + (radius + 14) * np.sin(turn)
        side = "middle" if abs(np.cos(turn)) < 0.2 else "start" if np.cos(turn) > 0 else "end"
        out.append(f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="{side}">{escape(name)}</text>')
    for index, (name, values) in enumerate(series.items()):
        colour = f"var({COLOURS[index % len(COLOURS)]})"
        spots = points([radius * max(0.0, min(1.0, values.get(spoke, 0.0))) for spoke in spokes])
        out.append(
            f'<polygon points="{spots}" fill="{colour}" fill-opacity="0.15" stroke="{colour}" stroke-width="2"/>'
        )
        if len(series) > 1:
            out.append(f'<text x="8" y="{20 + 18 * index}" style="fill:{colour}">{escape(name)}</text>')
    drawn = f'<svg viewBox="0 0 {width} {height}" style="max-width:680px" role="img">{"".join(out)}</svg>'
    return Markup(drawn)


def lines(series: dict[str, list[tuple[float, float]]], x_name: str, y_name: str) -> Markup:
    """A line chart of named (x, y) series."""
    points = [point for values in series.values() for point in values]
    if not points:
        return paragraph("nothing was logged")
    width, height, left, top, bottom = 1000, 300, 56, 12, 34
    x_most = max(x for x, _ in points) or 1
    y_most = max(y for _, y in points) or 1
    out = []
    for tick in range(5):
        value = y_most * tick / 4
        y = height - bottom - (height - bottom - top) * tick / 4
        out.append(f'<line x1="{left}" x2="{width}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>')
        out.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{value:.2g}</text>')
    out.append(f'<text x="{width}" y="{height - 6}" text-anchor="end">{escape(x_name)} (to {x_most:g})</text>')
    out.append(f'<text x="{left}" y="{height - 6}">{escape(y_name)}</text>')
    for index, (name, values) in enumerate(series.items()):
        colour = f"var({COLOURS[index % len(COLOURS)]})"
        spots = " ".join(
            f"{left + (width - left) * x / x_most:.1f},{height - bottom - (height - bottom - top) * y / y_most:.1f}"
            for x, y in values
        )
        out.append(f'<polyline points="{spots}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(values) < 8:  # a line of one point shows nothing
            places = (spot.split(",") for spot in spots.split())
            out += [f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>' for x, y in places]
        out.append(f'<text x="{left + 150 * (index + 1)}" y="{height - 6}" style="fill:{colour}">{escape(name)}</text>')
    return Markup(f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(out)}</svg>')
