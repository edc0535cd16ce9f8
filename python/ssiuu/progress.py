"""Progress on the terminal: one bar, one line of scores, for every long job of the toolkit."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console()

PLAIN = {"→": "->", "—": "-", "–": "-", "…": "..."}


def _plainly(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(char, "?") for char in text), error.end


codecs.register_error("ssiuu", _plainly)


def write_plainly(*streams: TextIO) -> None:
    """Make these streams replace characters that their encoding lacks, such as an arrow in latin-1 by ->."""
    for stream in streams:
        if hasattr(stream, "reconfigure"):  # a stream that replaces stdout may lack it
            stream.reconfigure(errors="ssiuu")


class Job:
    """A running bar: `advance` moves it, `say` sets the values after it."""

    def __init__(self, progress: Progress, task):
        self._progress, self._task = progress, task

    def advance(self, amount: float = 1) -> None:
        """Move the bar forward."""
        self._progress.advance(self._task, amount)

    def say(self, **values: float) -> None:
        """Show these values after the bar, or on a line of their own where the output is not a terminal."""
        text = "  ".join(f"{name} {value:.3g}" for name, value in values.items())
        self._progress.update(self._task, values=text)
        if not console.is_terminal:
            line = f"{self._progress.tasks[self._task].description}: {text}"
            console.print(line, soft_wrap=True, markup=False)


@contextmanager
def job(name: str, total: int) -> Iterator[Job]:
    """A bar with this name over `total` units of work."""
    columns = (
        TextColumn("{task.description}", markup=False),  # the names of runs may have square brackets
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[values]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Job(progress, progress.add_task(name, total=total, values=""))
