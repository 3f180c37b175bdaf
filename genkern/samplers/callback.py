"""What happens between two steps of the loop: the state is kept and shown, and may be changed, or the loop ended."""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

if TYPE_CHECKING:
    from .loop import Run
    from .table import Stage

Callback = Callable[[int, float, Tensor], object]


class Stop(enum.Enum):
    """What a callback returns to end the loop."""

    STOP = "stop"

    def __repr__(self) -> str:
        return "genkern.STOP"


STOP: Final = Stop.STOP


def observe(task: Run, stage: Stage, x: Tensor, kept: list[Tensor], tick: Callable[[], object]) -> Tensor | Stop | None:
    """What is done after a stage: where it ends its step, the callback is shown a copy of the state, and the state that
    the loop goes on with is kept.

    Returns:
        What the callback has returned: None, the state to go on with, or STOP.

    Raises:
        TypeError: it has returned something else. ValueError: a state of another shape or device.
    """
    if stage.time is None:
        return None
    found = None if task.callback is None else _checked(task.callback(stage.step, stage.time, x.clone()), x)
    if task.return_trajectory:
        kept.append((found if isinstance(found, Tensor) else x).clone())
    tick()
    return found


def _checked(found: Any, x: Tensor) -> Tensor | Stop | None:
    if found is None or found is STOP:
        return None if found is None else STOP
    if not isinstance(found, Tensor):
        raise TypeError(
            f"callback: expected it to return None, a tensor, the state, or genkern.STOP, got {type(found).__name__}"
        )
    if found.dtype != x.dtype:
        raise TypeError(f"callback: expected it to return {x.dtype}, the state's type, got {found.dtype}")
    if found.shape != x.shape:
        raise ValueError(
            f"callback: expected it to return shape {tuple(x.shape)}, the state's, got {tuple(found.shape)}"
        )
    if found.device != x.device:
        raise ValueError(f"callback: expected it to return a tensor on {x.device}, got {found.device}")
    return found


@contextlib.contextmanager
def bar(progress: bool, total: int, desc: str = "sample") -> Any:
    """A bar of `total` steps where progress is asked for; it gives what counts one, or as many as it is told."""
    if not progress:
        yield lambda n=1: None
        return
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total, desc=desc, unit="step") as shown:
        yield shown.update
