"""An order among workers that add to the same sums."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Turns:
    """The order in which column ranges add to dE: that of the ranges, for every group of rows.

    Workers on several ranges form their products side by side; only the adding waits for its
    turn, so the sum is the same however they run.
    """

    def __init__(self) -> None:
        self._due: dict[int, int] = {}
        self._changed = threading.Condition()
        self._failed = False

    @contextlib.contextmanager
    def turn(self, group: int, number: int) -> Iterator[None]:
        """Wait until ranges before `number` have added to a group; the others wait meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._due.get(group, 0) == number)
            if self._failed:
                raise RuntimeError("another worker failed")
        yield
        with self._changed:
            self._due[group] = number + 1
            self._changed.notify_all()

    def fail(self) -> None:
        """Let nobody wait for a turn that will not come."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()
