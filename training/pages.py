"""A page as a list of blocks, written as one self-contained HTML file or as Markdown with pictures beside it.

Every string in a block is plain text: escaping is done here, and only here.
"""

import base64
import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    """Level 1 is the title of the page, 2 a section, 3 a part of one."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """`lead` for the answer, `notice` for what the reader must not miss."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first column names them. `best` holds the (row, column) of the cells to mark."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()
    numbers: bool = True


@dataclass(frozen=True)
class Plot:
    """A picture, `name`.png beside the page, with a sentence that says what it shows."""

    name: str
    png: bytes
    caption: str


@dataclass(frozen=True)
class Sample:
    """What a model wrote after a prompt: any characters at all."""

    prompt: str
    text: str


Block = Heading | Paragraph | Bullets | Table | Plot | Sample

# The pictures are black on white; inverting the lightness and keeping the hue makes them pictures for a dark page.
CSS = """
:root {
  color-scheme: light dark;
  --ink: #1a1c20; --soft: #5b6470; --rule: #d9dde3; --page: #fff; --best: #e3f1e6; --notice: #fdf3dc;
}
@media screen and (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ec; --soft: #a4abb6; --rule: #3a3f48; --page: #15171b; --best: #1d3f2a; --notice: #40351a }
  img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen }
}
body { margin: 0; background: var(--page); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 1rem }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem }
p, ul, figure, pre { max-width: 46rem; margin: .75rem 0 }
ul { padding-left: 1.25rem }
.lead { font-size: 1.2rem; line-height: 1.45 }
.notice { background: var(--notice); padding: .5rem .75rem; border-radius: .3rem }
.wide { overflow-x: auto; margin: 1rem 0 }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: baseline }
td { overflow-wrap: anywhere }
thead th { color: var(--soft); font-weight: 500; vertical-align: bottom }
tbody th { position: sticky; left: 0; background: var(--page); font-weight: 600; white-space: nowrap }
.numbers td { text-align: right; white-space: nowrap }
.numbers thead th + th { text-align: right; min-width: 4.5rem }
td.best { background: var(--best); font-weight: 700 }
img { display: block; width: 100%; height: auto }
figcaption { color: var(--soft); font-size: .875rem; margin-top: .5rem }
pre {
  border-left: 3px solid var(--rule); padding: .25rem 0 .25rem 1rem;
  font: .875rem/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
}
@media print {
  body { font-size: 10pt }
  main { max-width: none; padding: 0 }
  .wide { overflow: visible }
  table { font-size: 7.5pt }
  th, td { padding: .25rem .3rem }
  tbody th { position: static }
  td.best { text-decoration: underline }
  figure { max-width: 25rem }
  figure, tr { break-inside: avoid }
  h2, h3 { break-after: avoid }
}
"""


def to_html(blocks: Sequence[Block]) -> str:
    """The page, with pictures and styles inside. Its policy forbids it to load or run anything."""
    title = next(block.text for block in blocks if isinstance(block, Heading))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(map(_html, blocks))
        + "\n</main>\n</body>\n</html>\n"
    )


def to_markdown(blocks: Sequence[Block]) -> str:
    """The same page, which expects its pictures as NAME.png in its folder."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def printable(text: str) -> str:
    """The text with a replacement character for each control character and surrogate but line feed and tab."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def _escape(text: str) -> str:
    return html.escape(printable(text))


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{_escape(text)}</h{level}>"
        case Paragraph(text, kind):
            return f'<p class="{kind}">{_escape(text)}</p>' if kind else f"<p>{_escape(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{_escape(item)}</li>" for item in items) + "\n</ul>"
        case Table():
            return _html_table(block)
        case Plot(_, png, caption):
            text = _escape(caption)
            image = f'<img alt="{text}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
            return f"<figure>{image}\n<figcaption>{text}</figcaption></figure>"
        case Sample():
            return _sample(block)


def _html_table(table: Table) -> str:
    def row(r: int, cells: Sequence[str]) -> str:
        marked = (' class="best"' if (r, c) in table.best else "" for c in range(1, len(cells)))
        rest = (f"<td{mark}>{_escape(cell)}</td>" for mark, cell in zip(marked, cells[1:], strict=True))
        return f'<tr><th scope="row">{_escape(cells[0])}</th>{"".join(rest)}</tr>'

    head = "".join(f'<th scope="col">{_escape(cell)}</th>' for cell in table.head)
    body = "\n".join(row(r, cells) for r, cells in enumerate(table.rows))
    kind = ' class="numbers"' if table.numbers else ""
    return f'<div class="wide"><table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _sample(sample: Sample) -> str:
    # Markdown takes this HTML too, and inside it nothing else can mean anything.
    return f"<pre><b>{_escape(sample.prompt)}</b>{_escape(sample.text)}</pre>"


def _plain(text: str) -> str:
    """Text in which Markdown sees no markup, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", printable(text).replace("\n", " "))


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Paragraph(text, kind):
            return {"lead": "**{}**", "notice": "> {}"}.get(kind, "{}").format(_plain(text))
        case Bullets(items):
            return "\n".join(f"- {_plain(item)}" for item in items)
        case Table(head, rows, best, numbers):
            cells = [
                [f"**{_plain(cell)}**" if (r, c) in best else _plain(cell) for c, cell in enumerate(row)]
                for r, row in enumerate(rows)
            ]
            rule = ["---"] + ["---:" if numbers else "---"] * (len(head) - 1)
            return "\n".join(f"| {' | '.join(row)} |" for row in [list(map(_plain, head)), rule, *cells])
        case Plot(name, _, caption):
            return f"![{_plain(caption)}]({name}.png)"
        case Sample():
            return _sample(block)
