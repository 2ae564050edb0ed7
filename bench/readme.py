"""Put the tables of bench/results/ into README.md and docs/, each between its marks.

    python bench/readme.py
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"<!-- (bench/results/[\w.-]+) -->\n.*?<!-- end -->", re.DOTALL)


def filled(text: str) -> str:
    """The blank lines keep Markdown from reading the marks as a part of the table."""
    return MARKED.sub(lambda found: f"<!-- {found[1]} -->\n\n{(ROOT / found[1]).read_text()}\n"
                                    "<!-- end -->", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
