"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text


def print_table(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    right: Collection[int] = (),
    *,
    bare: bool = False,
    console: Console | None = None,
) -> None:
    """Prints rows, if there are any. Markup in a str is shown as it is.

    header: not shown if all names are empty.
    right: the columns that are aligned right.
    bare: without lines.
    """
    if not rows:
        return
    look: dict[str, Any] = {"padding": (0, 1, 0, 0), "box": None} if bare else {}
    table = Table(title=escape(title), title_justify="left", show_header=any(header), **look)
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) if isinstance(cell, str) else cell for cell in row))
    (console or Console()).print(table)
