"""Two small charts as inline SVG, coloured by the page's own variables. Knows numbers and labels only."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, LABEL_WIDTH, VALUE_WIDTH, ROW_HEIGHT, MARGIN = 720, 190, 64, 28, 26  # pixels


@dataclass(frozen=True)
class Estimate:
    """A named value with its interval, in the chart's unit; None where there is no interval."""

    name: str
    value: float
    interval: tuple[float, float] | None


def interval_chart(title: str, estimates: Sequence[Estimate]) -> str:
    """Draw one row for each estimate: a dot at its value, a line over its interval; the axis starts at zero."""
    top = max([one.value for one in estimates] + [one.interval[1] for one in estimates if one.interval], default=0.0)
    ticks = nice_ticks(top)
    height = ROW_HEIGHT * len(estimates) + MARGIN
    x = _scale(ticks[-1], LABEL_WIDTH, WIDTH - VALUE_WIDTH)
    parts = [_tick(x(tick), height - MARGIN, f"{tick:g}") for tick in ticks]
    for row, one in enumerate(estimates):
        y = ROW_HEIGHT * row + ROW_HEIGHT / 2
        parts.append(_text(LABEL_WIDTH - 12, y + 4, one.name, "end"))
        if one.interval is not None:
            low, high = x(one.interval[0]), x(one.interval[1])
            parts.append(f'<line class="range" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}" stroke-width="3"/>')
        parts.append(f'<circle class="mark" cx="{x(one.value):.1f}" cy="{y}" r="5"/>')
        parts.append(_text(WIDTH - 4, y + 4, f"{one.value:.2f}", "end"))
    return _svg(title, height, parts)


def bar_chart(title: str, labels: Sequence[str], counts: Sequence[int]) -> str:
    """Draw one row for each count: a bar from zero, its number behind it."""
    height = ROW_HEIGHT * len(counts)
    x = _scale(max(max(counts, default=0), 1), LABEL_WIDTH, WIDTH - VALUE_WIDTH)
    parts = []
    for row, (label, count) in enumerate(zip(labels, counts, strict=True)):
        y = ROW_HEIGHT * row
        length = x(count) - LABEL_WIDTH
        parts.append(_text(LABEL_WIDTH - 12, y + ROW_HEIGHT / 2 + 4, label, "end"))
        parts.append(
            f'<rect class="mark" x="{LABEL_WIDTH}" y="{y + 5}" width="{length:.1f}" height="{ROW_HEIGHT - 10}" rx="2"/>'
        )
        parts.append(_text(LABEL_WIDTH + length + 6, y + ROW_HEIGHT / 2 + 4, f"{count:,}", "start"))
    return _svg(title, height, parts)


def nice_ticks(top: float) -> list[float]:
    """Return four to six round ticks from 0 to at least `top`."""
    if top <= 0:
        return [0.0, 1.0]
    magnitude = 1e-6
    while magnitude * 10 <= top:
        magnitude *= 10
    step = next(factor * magnitude for factor in (0.2, 0.5, 1.0, 2.0, 5.0) if factor * magnitude * 5 >= top)
    ticks = [0.0]
    while ticks[-1] < top:
        ticks.append(round(ticks[-1] + step, 10))
    return ticks


def _scale(top: float, left: float, right: float) -> Callable[[float], float]:
    return lambda value: left + (right - left) * value / top


def _tick(x: float, bottom: float, label: str) -> str:
    line = f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}"/>'
    return line + f'<text class="faint" x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{label}</text>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">'
        f"<title>{html.escape(title)}</title>{''.join(parts)}</svg>"
    )
