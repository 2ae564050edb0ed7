"""Put the tables of bench/results/ into README.md, each between its marks.

    python bench/readme.py
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MARKED = re.compile(r"<!-- (bench/results/[\w.-]+) -->\n.*?<!-- end -->", re.DOTALL)


def filled(text: str) -> str:
    """A blank line parts a table from the mark, or Markdown would take it for the mark's."""
    return MARKED.sub(lambda found: f"<!-- {found[1]} -->\n\n{(ROOT / found[1]).read_text()}\n"
                                    "<!-- end -->", text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))
