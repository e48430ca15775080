"""Progress of long work: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 5.0


class WorkProgress:
    """Shows how far one stage after another has come.

    It writes to the standard error, so that a command's results can be piped on their own.

    Parameters
    ----------
    console : Console, optional
        Where to show it.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description:<25}"),
            BarColumn(bar_width=14),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
        )
        self._task = TaskID(0)
        self._stage = ""
        self._done = 0
        self._total = 1
        self._last_line = 0.0

    def __enter__(self) -> WorkProgress:
        # A file or a pipe cannot redraw a line; there it gets whole lines instead.
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def start(self, stage: str, total: int) -> None:
        """Begin a stage of so many units of work."""
        self._stage, self._done, self._total = stage, 0, max(total, 1)
        self._task = self._bar.add_task(stage, total=self._total, note="")
        if not self._console.is_terminal:
            self._line("")

    def update(self, done: int, note: str = "") -> None:
        """Say how many units of the stage are done."""
        self._done = done
        self._bar.update(self._task, completed=done, note=note)
        late = time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES
        if not self._console.is_terminal and (late or done >= self._total):
            self._line(note)

    def callback(self, stage: str, done: int, total: int) -> None:
        """Take the reports of a computation: a stage, units of work done, and their total."""
        # A backward may go over the columns twice; each pass counts from the start.
        if stage != self._stage or done <= self._done or total != self._total:
            self.start(stage, total)
        self.update(done)

    def _line(self, note: str) -> None:
        self._last_line = time.monotonic()
        self._console.print(
            f"{self._stage}: {self._done}/{self._total} {note}".rstrip(),
            markup=False,
            highlight=False,
        )
