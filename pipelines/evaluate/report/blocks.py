"""The parts a report is made of, and their two renderings. Knows no evaluation beyond an aligned pair.

Everything that came from a corpus or a model is escaped; the HTML page loads nothing and runs no script.
"""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipelines.evaluate.error_analysis import AlignedPair, Step


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """`kind` is "plain", "result" (what one came for), "facts" (small print of the result) or "warning"."""

    text: str
    kind: str = "plain"


@dataclass(frozen=True)
class Bullets:
    lines: Sequence[str]


@dataclass(frozen=True)
class Code:
    language: str
    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """An SVG drawing; Markdown leaves it out, since the table beside it says the same."""

    title: str
    svg: str


@dataclass(frozen=True)
class Alignments:
    pairs: Sequence[AlignedPair]


Block = Heading | Paragraph | Bullets | Code | Table | Figure | Alignments

TOO_FEW = "too few"  # utterances or errors for an interval
_MARKS = {"equal": "", "substitute": "S", "delete": "D", "insert": "I"}


def to_markdown(blocks: Iterable[Block]) -> str:
    """Render as GitHub Markdown."""
    return "\n\n".join(text for block in blocks if (text := _block_to_markdown(block))) + "\n"


def _block_to_markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_escaped(text)}"
        case Paragraph(text, kind):
            return {"result": "**{}**", "warning": "> {}"}.get(kind, "{}").format(_escaped(text))
        case Bullets(lines):
            return "\n".join(f"- {_escaped(line)}" for line in lines)
        case Code(language, lines):
            return _fenced(lines, language)
        case Table(columns, rows):
            cells = [columns, ["---"] * len(columns), *([_escaped(cell) for cell in row] for row in rows)]
            return "\n".join(f"| {' | '.join(row)} |" for row in cells)
        case Alignments(pairs):
            return "\n\n".join(f"{_escaped(_title(pair))}\n\n{_fenced(align_lines(pair.steps))}" for pair in pairs)
        case Figure():
            return ""


def _escaped(text: str) -> str:
    for letter in "\\`*_[]<>|#":
        text = text.replace(letter, f"\\{letter}")
    return " ".join(text.split())


def _fenced(lines: Sequence[str], language: str = "text") -> str:
    longest = max((len(run) for line in lines for run in line.split() if set(run) == {"`"}), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}{language}", *lines, fence])


def _title(pair: AlignedPair) -> str:
    parts = [pair.utterance_id, f"{pair.num_errors} errors in {pair.num_words} words", f"{pair.duration_s:.1f} s"]
    return ", ".join([*parts, *([pair.source] if pair.source else [])])


def align_lines(steps: Sequence[Step]) -> list[str]:
    """Write an alignment as three lines of equal columns: REF, HYP and the kind of each error."""
    columns = [(step.reference or "*", step.hypothesis or "*", _MARKS[step.kind]) for step in steps]
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for i, name in enumerate(("REF", "HYP", "   ")):
        words = [column[i].ljust(width) for column, width in zip(columns, widths, strict=True)]
        lines.append(f"{name}: {' '.join(words)}".rstrip() if i < 2 else f"     {' '.join(words)}".rstrip())
    return lines


def to_html(blocks: Iterable[Block], title: str) -> str:
    """Render as one page that needs no other file."""
    body = "\n".join(_block_to_html(block) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        "</body>\n</html>\n"
    )


def _block_to_html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{html.escape(text)}</h{level}>"
        case Paragraph(text, kind):
            return f'<p class="{kind}">{html.escape(text)}</p>'
        case Bullets(lines):
            return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"
        case Code(_, lines):
            return f"<pre>{html.escape(chr(10).join(lines))}</pre>"
        case Table(columns, rows):
            return _table_to_html(columns, rows)
        case Figure(title, svg):
            return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>"
        case Alignments(pairs):
            return "\n".join(_alignment_to_html(pair) for pair in pairs)


def _table_to_html(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    numeric = [i > 0 and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    numeric = [flag and any(row[i] for row in rows) for i, flag in enumerate(numeric)]

    def line(tag: str, cells: Sequence[str]) -> str:
        made = [f"<{tag}{' class=n' if numeric[i] else ''}>{html.escape(cell)}</{tag}>" for i, cell in enumerate(cells)]
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<div class=scroll><table><thead>{line('th', columns)}</thead><tbody>{body}</tbody></table></div>"


def _is_number(cell: str) -> bool:
    return not cell or cell[0].isdigit() or cell[0] in "<>" or cell.startswith(("not defined", TOO_FEW))


def _alignment_to_html(pair: AlignedPair) -> str:
    columns = []
    for step in pair.steps:
        mark = f"<em>{_MARKS[step.kind]}</em>" if step.kind != "equal" else "<em></em>"
        words = [html.escape(word) or "&middot;" for word in (step.reference, step.hypothesis)]
        columns.append(f'<span class="w {step.kind}"><b>{words[0]}</b><i>{words[1]}</i>{mark}</span>')
    return (
        f"<section class=pair><h3>{html.escape(_title(pair))}</h3>"
        f'<div class=words><span class="w names"><b>REF</b><i>HYP</i><em></em></span>{"".join(columns)}</div></section>'
    )


# Colours: Okabe and Ito's, which people with any colour vision can tell apart; each kind carries its letter as well.
_CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --faint: #5b6570; --page: #fff; --line: #d9dee3; --soft: #f4f6f8;
  --accent: #0072b2; --s: #b45309; --d: #a21caf; --i: #0f766e; --warn: #fff7e0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --faint: #9aa5b1; --page: #14171a; --line: #343b42;
  --soft: #1d2227; --accent: #56b4e9; --s: #f0a04b; --d: #e69ff0; --i: #4fd1b5; --warn: #3a3013; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
h3 { font-size: .9rem; font-weight: 600; margin: 0 0 .35rem; color: var(--faint); overflow-wrap: anywhere; }
p { margin: .6rem 0; max-width: 46rem; }
p.result { font-size: 1.5rem; font-weight: 650; background: var(--soft); padding: .7rem 1rem .3rem; margin-bottom: 0;
  max-width: none; border-left: 4px solid var(--accent); }
p.facts { color: var(--faint); font-size: .95rem; margin: 0; background: var(--soft); padding: 0 1rem .8rem;
  max-width: none; border-left: 4px solid var(--accent); }
p.warning { background: var(--warn); padding: .6rem 1rem; border-left: 4px solid var(--s); max-width: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; width: 100%; }
th, td { text-align: left; padding: .4rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--faint); font-weight: 600; }
th.n, td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
figure { margin: .5rem 0 1rem; }
figcaption { color: var(--faint); font-size: .85rem; margin-bottom: .4rem; }
svg { max-width: 100%; height: auto; display: block; }
svg text { fill: var(--ink); font: 13px system-ui, "DejaVu Sans", sans-serif; } svg .faint { fill: var(--faint); }
svg .grid { stroke: var(--line); } svg .mark { fill: var(--accent); } svg .range { stroke: var(--accent); }
ul { padding-left: 1.1rem; font-size: .9rem; } li { overflow-wrap: anywhere; }
.pair { padding: .8rem 0; border-bottom: 1px solid var(--line); }
.words { display: flex; flex-wrap: wrap; gap: .35rem .1rem;
  font: 14px/1.35 ui-monospace, "DejaVu Sans Mono", monospace; }
.w { display: inline-flex; flex-direction: column; padding: 0 .3rem; }
.w b, .w i, .w em { font-weight: 400; font-style: normal; } .w em { font-size: 11px; min-height: 15px; }
.names { color: var(--faint); }
.substitute { background: color-mix(in srgb, var(--s) 14%, transparent); color: var(--s); }
.delete { background: color-mix(in srgb, var(--d) 14%, transparent); color: var(--d); }
.insert { background: color-mix(in srgb, var(--i) 14%, transparent); color: var(--i); }
"""
