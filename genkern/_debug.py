"""gk.debug: checks that cost a synchronisation, off by default."""

from __future__ import annotations

from types import TracebackType


class debug:  # noqa: N801  (a switch that reads as a call)
    """Check the values of device tensors too: coefficients that are NaN or out of range, times outside the path; and
    on every device, that a network's input and output are finite.

    A switch, or a context manager that restores what was before:

        gk.debug(values=True)           # from now on
        with gk.debug(values=True):     # in here
            ...

    Host numbers and coefficient tensors on the CPU are checked always; to look at a device tensor's values
    waits for the device.

    Args:
        values: whether to look at the values of device tensors.
    """

    values = False

    def __init__(self, *, values: bool) -> None:
        self._before = debug.values
        debug.values = bool(values)

    def __enter__(self) -> debug:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        debug.values = self._before
