"""A report is a list of blocks, rendered to the terminal, to Markdown or to one HTML file."""

import base64
import html
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box, table
from rich.console import Console

from lab.report.fitted import Fitted


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Warnings:
    lines: Sequence[str]


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    words: int = 1  # number of leading text columns (left-aligned); the others are numbers


@dataclass(frozen=True)
class Figure:
    file: Path  # PNG
    caption: str


WIDTH = 120  # columns, if the output is not a terminal
Block = Heading | Text | Warnings | Table | Figure


def show(title: str, blocks: Sequence[Block]) -> None:
    console = Console(highlight=False, markup=False,
                      width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDTH)
    console.print(title, style="bold")
    for block in blocks:
        console.print()
        match block:
            case Heading(text):
                console.print(text, style="bold")
            case Text(text):
                console.print(text)
            case Warnings(lines):
                for line in lines:
                    console.print(f"warning: {line}", style="yellow")
            case Table():
                console.print(_rich(block))
                console.print(block.caption, style="dim")
            case Figure(file):
                console.print(f"plot: {file}")


def _rich(block: Table) -> Fitted:
    result = table.Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, name in enumerate(block.head):
        result.add_column(name, justify="left" if index < block.words else "right",
                          no_wrap=index < min(block.words, 2), overflow="fold")
    for row in block.rows:
        result.add_row(*row)
    return Fitted(result)


def markdown(title: str, blocks: Sequence[Block]) -> str:
    """Links figures by file name, so they must be in the same folder."""
    parts = [f"# {title}"]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"## {text}")
            case Text(text):
                parts.append(text)
            case Warnings(lines):
                parts.append("\n".join(f"- **Warning:** {line}" for line in lines))
            case Table(head, rows, caption, words):
                marks = ["---" if index < words else "---:" for index in range(len(head))]
                lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"
                         for row in (head, marks, *rows)]
                parts += ["\n".join(lines), caption]
            case Figure(file, caption):
                parts.append(f"![{file.stem}]({file.name})\n\n*{caption}*")
    return "\n\n".join(parts) + "\n"


STYLE = """
body { font: 16px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1d2430;
       background: #fff; max-width: 1080px; margin: 2.5rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.8rem; line-height: 1.25; margin: 0 0 1.2rem; }
h2 { font-size: 1.25rem; margin: 2.8rem 0 .6rem; padding-bottom: .3rem;
     border-bottom: 1px solid #d8dde6; }
p, figcaption, .caption { max-width: 52rem; }
.caption, figcaption { color: #55606f; font-size: .875rem; margin: .5rem 0 0; }
.scroll { overflow-x: auto; margin-top: 1rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; vertical-align: top; padding: .35rem .75rem; }
th { border-bottom: 2px solid #8792a2; white-space: nowrap; vertical-align: bottom; }
td { border-bottom: 1px solid #e6e9ee; }
.word { text-align: left; }
th:first-child, td:first-child { padding-left: 0; white-space: nowrap; }
figure { margin: 1.2rem 0 2rem; }
img { max-width: 100%; height: auto; }
.warnings { background: #fff6df; border-left: 4px solid #d99a00; margin: 0 0 1rem;
            padding: .7rem 1rem .7rem 2rem; font-size: .9rem; overflow-wrap: anywhere; }
@media print { body { max-width: none; margin: 0; } figure, table { break-inside: avoid; } }
"""


def page(title: str, blocks: Sequence[Block]) -> str:
    """One self-contained HTML file with embedded plots."""
    body = "\n".join(_html(block) for block in blocks)
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
            f"<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n")


def _html(block: Block) -> str:
    match block:
        case Heading(text):
            return f"<h2>{html.escape(text)}</h2>"
        case Text(text):
            return f"<p>{html.escape(text)}</p>"
        case Warnings(lines):
            items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
            return f'<ul class="warnings">{items}</ul>'
        case Table(head, rows, caption, words):
            parts = [_row("th", head, words), *(_row("td", row, words) for row in rows)]
            return (f'<div class="scroll"><table>\n<thead>{parts[0]}</thead>\n<tbody>'
                    + "\n".join(parts[1:]) + "</tbody>\n</table></div>\n"
                    f'<p class="caption">{html.escape(caption)}</p>')
        case Figure(file, caption):
            data = base64.b64encode(file.read_bytes()).decode()
            return (f'<figure><img alt="{html.escape(file.stem)}" '
                    f'src="data:image/png;base64,{data}">\n'
                    f"<figcaption>{html.escape(caption)}</figcaption></figure>")


def _row(tag: str, cells: Sequence[str], words: int) -> str:
    def cell(index: int, text: str) -> str:
        kind = ' class="word"' if index < words else ""
        return f"<{tag}{kind}>{html.escape(text)}</{tag}>"

    return "<tr>" + "".join(cell(index, text) for index, text in enumerate(cells)) + "</tr>"
