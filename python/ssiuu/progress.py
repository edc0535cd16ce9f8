"""Progress on the terminal: one bar, one line of scores, for every long job of the toolkit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console()


class Job:
    """A running bar: `advance` moves it, `say` sets what stands behind it."""

    def __init__(self, progress: Progress, task):
        self._progress, self._task = progress, task

    def advance(self, amount: float = 1) -> None:
        """Move the bar on."""
        self._progress.advance(self._task, amount)

    def say(self, **values: float) -> None:
        """Show these values behind the bar, and for logs without a terminal as a line of their own."""
        text = "  ".join(f"{name} {value:.3g}" for name, value in values.items())
        self._progress.update(self._task, values=text)
        if not console.is_terminal:
            console.print(f"{self._progress.tasks[self._task].description}: {text}", soft_wrap=True)


@contextmanager
def job(name: str, total: int) -> Iterator[Job]:
    """A bar with this name over `total` units of work."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[values]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Job(progress, progress.add_task(name, total=total, values=""))
