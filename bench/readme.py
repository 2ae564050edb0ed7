"""Insert the tables of bench/results/ into README.md and docs/, between their markers.

    python bench/readme.py
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"<!-- (bench/results/[\w.-]+) -->\n.*?<!-- end -->", re.DOTALL)


def filled(text: str) -> str:
    """Insert the tables. Markdown needs the blank lines, or the markers join the table."""
    return MARKED.sub(lambda found: f"<!-- {found[1]} -->\n\n{(ROOT / found[1]).read_text()}\n"
                                    "<!-- end -->", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text()))
