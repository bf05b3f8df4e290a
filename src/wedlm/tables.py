# SPDX-License-Identifier: Apache-2.0
"""Tables on standard output whose cells are never cut."""

import sys
from collections.abc import Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

_GAP = 2


def show_table(title: str | None, labels: Sequence[str], figures: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with a column for each label and each figure; a row has the text of all in that order.

    If the terminal is too narrow, it prints several tables, each with the labels. A file or a pipe has no width.
    """
    cells = list(zip([*labels, *figures], *rows, strict=True))  # by column
    widths = [max(map(cell_len, column)) + _GAP for column in cells]
    room = Console().width if sys.stdout.isatty() else sum(widths)
    console = Console(highlight=False, width=room)
    first, taken = list(range(len(labels))), sum(widths[: len(labels)])
    groups: list[list[int]] = [[]]
    for number in range(len(labels), len(cells)):
        if groups[-1] and taken + sum(widths[one] for one in [*groups[-1], number]) - _GAP > room:
            groups.append([])
        groups[-1].append(number)
    for group in groups:
        table = Table(
            title=title, title_justify="left", box=None, pad_edge=False, header_style="dim", padding=(0, _GAP, 0, 0)
        )
        for number in [*first, *group]:
            table.add_column(cells[number][0], justify="left" if number < len(labels) else "right", overflow="fold")
        for texts in zip(*(cells[number][1:] for number in [*first, *group]), strict=True):
            table.add_row(*texts)
        console.print(table)
        console.print()
        title = None
