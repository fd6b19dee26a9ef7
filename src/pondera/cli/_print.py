"""What commands print with. rich is imported at the first line printed, not by `pondera --help`."""

import sys
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@cache
def console() -> "Console":
    """Standard output; a pipe or a file is not 80 columns wide."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def new_table(*headers: str, **options: Any) -> "Table":
    """A table of rich."""
    from rich.table import Table

    return Table(*headers, **options)


def escape(text: str) -> str:
    """Text in which brackets are no markup."""
    from rich.markup import escape as escaped

    return escaped(text)
