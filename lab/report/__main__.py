"""Compare runs: tables, intervals and learning curves.

    python -m lab.report runs/a runs/b --against a
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lab.errors import UserError, guarded
from lab.report import contents, export, page, runs


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Does not use lab/options.py, because importing torch takes longer than the report."""
    parser = _Parser("python -m lab.report", description=(
        "Compare runs, finished or not, in the terminal, as Markdown and as one HTML page."))
    parser.add_argument("runs", nargs="+", metavar="[NAME=]FOLDER", help=(
        "a run folder; folders with the same NAME are pooled into one method"))
    parser.add_argument("--against", metavar="NAME", help=(
        "the baseline: a method, or one of its run folders"))
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="FOLDER",
                        help="where report.md, report.html and the plots go (default: report)")
    parser.add_argument("--export", choices=["csv"], help=(
        "also write all metrics to metrics.csv: method, run, env, agent, seed, step, tag, value"))
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """-> exit code: 0, or 2 for bad input, with a one-line message."""
    try:
        options = parse(argv)
        methods = runs.load(options.runs)
        baseline = runs.find(methods, options.against) if options.against else None
        names = [method.name for method in methods]
        title = f"Report on {', '.join(names) if len(names) < 5 else f'{len(names)} methods'}"
        options.out.mkdir(parents=True, exist_ok=True)
        blocks = contents.blocks(methods, baseline, options.out)
        markdown, html = options.out / "report.md", options.out / "report.html"
        markdown.write_text(page.markdown(title, blocks), encoding="utf-8", errors="replace")
        if options.export:
            export.write(options.out / "metrics.csv", methods)
        html.write_text(page.page(title, blocks), encoding="utf-8", errors="replace")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: cannot write to {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    page.show(title, blocks)
    print(f"\nreport: {markdown}\n        {html}")
    if options.export:
        print(f"        {options.out / 'metrics.csv'}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
