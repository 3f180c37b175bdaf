"""A call under torch.vmap: what all lanes share is done once, the rest lane by lane."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .calls import draw
from .spec import DEVICE_KEY, SAMPLE_IDS, M, Spec, X, Z


def drawn_once(
    spec: Spec, in_dims: Sequence[Any], tensors: Sequence[Tensor | None]
) -> tuple[Spec, tuple[Tensor | None, ...]]:
    """The same call with its noise as a tensor, where all lanes draw the same."""
    slot = next((slot for slot in (X, M) if tensors[slot] is not None), None)
    if not spec.noise or slot is None or in_dims[DEVICE_KEY] is not None or in_dims[SAMPLE_IDS] is not None:
        return spec, tuple(tensors)
    like, found = tensors[slot], list(tensors)
    assert like is not None
    lane = like if in_dims[slot] is None else like.select(in_dims[slot], 0)
    wide = torch.float64 if like.dtype == torch.float64 else torch.float32
    found[Z] = draw(spec, tensors[DEVICE_KEY], tensors[SAMPLE_IDS], lane.shape, like.device, wide)
    return spec._replace(noise=0), tuple(found)


def over_lanes(one: Any, in_dims: Sequence[Any], tensors: Sequence[Tensor | None]) -> Any:
    """torch.vmap of `one` over the batched arguments; the others, and those not given, are closed over."""
    batched = [k for k, dim in enumerate(in_dims) if dim is not None]
    given: list[Any] = [tensors[k] for k in batched]

    def lane(*parts: Tensor) -> Any:
        full = list(tensors)
        for k, part in zip(batched, parts, strict=True):
            full[k] = part
        return one(*full)

    return torch.vmap(lane, in_dims=tuple(in_dims[k] for k in batched))(*given)
