"""What commands show to people: a progress bar, tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_FILE_COLUMNS = 200


@contextmanager
def progress_bar(description: str, unit: str = "") -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left on a terminal; yields report(done, total)."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=None, rate="")

        def report(done: int, total: int) -> None:
            speed = bar.tasks[0].finished_speed or bar.tasks[0].speed
            bar.update(task, completed=done, total=total, rate=f"{speed:.0f} {unit}/s" if speed else "")

        try:
            yield report
        except BaseException:
            bar.live.transient = True  # remove the bar: the error is then one line on its own
            raise


def print_table(*tables: Table) -> None:
    """As wide as the terminal; in a file or pipe as wide as they need, where rich takes 80 columns and breaks every cell."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_COLUMNS)
    for table in tables:
        console.print(table)
