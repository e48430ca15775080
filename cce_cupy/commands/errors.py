"""The complaint that ends a command with one line instead of a traceback."""

from __future__ import annotations


class CommandError(Exception):
    """What a user did that cannot work, and what to do about it, in one line."""
