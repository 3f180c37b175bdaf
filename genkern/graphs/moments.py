"""What a captured step is told, in device memory: one row of bytes a stage.

    seed, stream, step    int64: the key of the noise, step added to the draw
    stage                 int64: the line of the tables of rows
    rows                  int64 [n]: the lines of each sample, where guidance differs by sample
    times                 [calls]: what the network is told

The loop whose stages are captured together reads each stage's row where it lies. A step that is captured once for many
stages reads `now`, to which its owner copies the stage's row before each replay: one copy of some hundred bytes. Seed
and stream are written before every call, so that each draws anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..noise import Noise, as_int64
from ..samplers.table import Stage

_ALIGNED = 16  # bytes, as kernels of torch.compile take their inputs to be
_KEY = 3


class Moment(NamedTuple):
    """Views of one row. rows is stage where one row serves all samples."""

    key: Tensor
    stage: Tensor
    rows: Tensor
    times: Tensor


class Moments:
    """The rows of all stages, and `now`.

    Args:
        stages: of the loop.
        n_rows: lines of each stage in the tables: 1, or one a sample.
        calls: samples that the network sees.
        time_dtype: of the times.
        device: where they are.
    """

    def __init__(
        self, stages: Sequence[Stage], n_rows: int, calls: int, time_dtype: torch.dtype, device: torch.device
    ) -> None:
        self._n_rows, self._calls, self._time_dtype = n_rows, calls, time_dtype
        self._lines_at = 8 * (_KEY + 1)
        self._times_at = _round_up(self._lines_at + 8 * (n_rows if n_rows > 1 else 0))
        width = _round_up(self._times_at + calls * time_dtype.itemsize)
        self._rows = torch.zeros((len(stages), width), dtype=torch.uint8, device=device)
        self._now_row = torch.zeros(width, dtype=torch.uint8, device=device)
        self._numbers = self._rows.view(torch.int64)
        numbers = torch.tensor([[stage.step, k] for k, stage in enumerate(stages)], dtype=torch.int64)
        self._numbers[:, 2:4] = numbers.to(device)
        if n_rows > 1:
            lines = torch.arange(len(stages) * n_rows, device=device)
            self._numbers[:, _KEY + 1 : _KEY + 1 + n_rows] = lines.reshape(len(stages), n_rows)
        times = torch.tensor([stage.model_time for stage in stages], dtype=time_dtype).to(device)
        self._rows[:, self._times_at :].view(time_dtype)[:, :calls] = times[:, None]
        self._written: list[int | None] = [None, None]  # seed and stream, as the host knows them
        self.now = self._moment(self._now_row)

    def of(self, stage: int) -> Moment:
        """A stage's row where it lies."""
        return self._moment(self._rows[stage])

    def set_noise(self, noise: Noise) -> None:
        """Writes seed and stream; nothing waits for the device."""
        for column, value in enumerate((noise.seed, noise.stream)):
            if isinstance(value, Tensor):
                self._numbers[:, column].copy_(value.reshape(1))
                self._written[column] = None
            elif self._written[column] != value:
                self._numbers[:, column].fill_(as_int64(value))
                self._written[column] = value

    def tell(self, stage: int) -> None:
        """Copies a stage's row to `now`."""
        self._now_row.copy_(self._rows[stage])

    def tensors(self) -> list[Tensor]:
        return [self._rows, self._now_row]

    def _moment(self, row: Tensor) -> Moment:
        numbers = row[: self._times_at].view(torch.int64)
        stage = numbers[_KEY : _KEY + 1]
        rows = stage if self._n_rows == 1 else numbers[_KEY + 1 : _KEY + 1 + self._n_rows]
        times = row[self._times_at :].view(self._time_dtype)[: self._calls]
        return Moment(numbers[:_KEY], stage, rows, times)


def _round_up(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
