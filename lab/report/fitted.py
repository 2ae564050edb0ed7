"""Tables that stay readable in a narrow terminal."""

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

WORD = 24  # columns; a longer word, such as a path, may be broken
UNLIMITED = 10_000  # columns


class Fitted:
    """A table whose cells wrap between words only. Where that does not fit, each row becomes a
    block with one line per cell; if the first heading is empty, each column does."""

    def __init__(self, table: Table):
        self.table = table
        self.cells = [[str(column.header), *map(str, column.cells)] for column in table.columns]

    def __rich_console__(self, console: Console, options: ConsoleOptions
                         ) -> Iterator[RenderableType]:
        widths = [max(map(cell_len, cells)) for cells in self.cells]
        whole = options.update_width(UNLIMITED)
        lines = Measurement.get(console, whole, self.table).maximum - sum(widths)
        least = [width if column.no_wrap else min(WORD, longest_word(cells))
                 for width, column, cells in zip(
                     widths, self.table.columns, self.cells, strict=True)]
        if sum(least) + lines > options.max_width:
            yield from self._blocks()
            return
        while sum(widths) + lines > options.max_width:
            widest = max((i for i, width in enumerate(widths) if width > least[i]),
                         key=lambda i: widths[i])
            widths[widest] -= 1
        for column, width in zip(self.table.columns, widths, strict=True):
            column.width = width
        yield self.table

    def _blocks(self) -> Iterator[RenderableType]:
        if self.table.title:
            yield Text(str(self.table.title))
        rows = list(zip(*self.cells, strict=True))
        (_, *labels), *records = self.cells if not rows[0][0] else rows
        for heading, *values in [(record[0], *record[1:]) for record in records]:
            grid = Table.grid(padding=(0, 2, 0, 0))
            grid.add_column(overflow="fold")
            grid.add_column(overflow="fold")
            for label, value in zip(labels, values, strict=True):
                if value:
                    grid.add_row(Text(f"  {label}"), Text(value))
            yield Text(heading)
            yield grid


def longest_word(cells: Sequence[str]) -> int:
    return max((cell_len(word) for cell in cells for word in cell.split()), default=0)
