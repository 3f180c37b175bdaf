"""What the commands share: why one cannot start, and the check of the folder that it writes into."""

from __future__ import annotations

import pathlib
import tempfile


class CannotRun(ValueError):
    """A command cannot start; the message says in one sentence why, and what to do."""


def writable(out: pathlib.Path) -> None:
    """Makes a folder where it is missing. CannotRun where it cannot be made or written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise CannotRun(f"--out: {out} cannot be written ({error.strerror or error}); give another folder") from None
