"""The divergence of a field in a state, div v(x) = sum_i dv_i/dx_i, for every sample of a batch.

    exact         sum_i e_i^T J e_i, J = dv/dx, with e_i the unit vectors: D products e^T J, some at once
    hutchinson    1/K sum_k z_k^T J z_k with E z z^T = I: unbiased; K products

Variance of one probe of a symmetric J: 2 |J|_F^2 for Gaussian z, 2 (|J|_F^2 - sum_i J_ii^2) for Rademacher z.

The products are vector-Jacobian products by autograd, so any network that can be trained will do, on states of any rank
and in any floating dtype. Its samples must not depend on each other (no batch statistics). Hutchinson 1989; Grathwohl
et al., arXiv:1810.01367.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import check, ops
from ..noise import Noise, Purpose

PROBES = ("rademacher", "gaussian")
Field = Callable[[Tensor], Tensor]


class Exact:
    """f(x) and div f(x), to rounding.

    Args:
        chunk: unit vectors at once, >= 1; memory grows with it. Where torch cannot batch an operation of the network,
            they go one by one.
        differentiable: keep the gradient of both.
    """

    def __init__(self, chunk: int = 32, differentiable: bool = False) -> None:
        self.chunk, self.differentiable = check.integer("chunk", chunk, 1), differentiable

    def __call__(self, f: Field, x: Tensor) -> tuple[Tensor, Tensor]:
        """f: [B, ...] to [B, ...]; x: [B, ...]. Returns f(x) and its divergence [B], float32 (float64 for float64)."""
        v, x = _value(f, x, self.differentiable)
        size = math.prod(x.shape[1:])
        found = torch.zeros(x.shape[0], dtype=_sum_dtype(v), device=x.device)
        for low in range(0, size, self.chunk):
            count = min(self.chunk, size - low)
            units = torch.zeros(count, 1, size, dtype=v.dtype, device=x.device)
            units[:, 0, low : low + count].diagonal().fill_(1.0)
            vectors = units.expand(count, x.shape[0], size).reshape(count, *x.shape)
            products = _products(v, x, vectors, self.differentiable).reshape(count, x.shape[0], size)
            diagonal = products[:, :, low : low + count].diagonal(dim1=0, dim2=2)  # [B, count]
            found = found + diagonal.sum(1, dtype=found.dtype)
        return _kept(v, found, self.differentiable)


class Hutchinson:
    """f(x) and an unbiased estimate of div f(x), from the same probes at every call.

    Args:
        probes: z, [K, B, ...] with E z z^T = I, such as draw().
        differentiable: keep the gradient of both.
    """

    def __init__(self, probes: Tensor, differentiable: bool = False) -> None:
        self.probes, self.differentiable = probes, differentiable

    def __call__(self, f: Field, x: Tensor) -> tuple[Tensor, Tensor]:
        """f: [B, ...] to [B, ...]; x: [B, ...]. Returns f(x) and the estimate [B], float32 (float64 for float64).

        ValueError: the probes are of another shape than x (or x is no whole number of their batches).
        """
        got, size = tuple(self.probes.shape), tuple(x.shape)
        repeats = max(size[0] // max(got[1], 1), 1) if len(got) > 1 else 0  # 2 under guidance
        if not repeats or got[1] * repeats != size[0] or got[2:] != size[1:] or not got[0]:
            raise ValueError(f"probes: expected shape (K, {', '.join(map(str, size))}) of x's {size}, got {got}")
        v, x = _value(f, x, self.differentiable)
        z = torch.cat([self.probes] * repeats, dim=1).to(v.dtype)
        products = [_products(v, x, one[None], self.differentiable)[0] for one in z]
        by_sample = [(p * one).reshape(x.shape[0], -1) for p, one in zip(products, z, strict=True)]
        found = torch.stack([terms.sum(1, dtype=_sum_dtype(v)) for terms in by_sample]).mean(0)
        return _kept(v, found, self.differentiable)


def draw(
    shape: Sequence[int], probes: int, kind: str, *, noise: Noise, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Probes of a state [B, ...]: probe k of a sample is a function of the seed, its id and k alone. [probes, B, ...].

    Args:
        shape: of the state.
        probes: K >= 1.
        kind: "rademacher" (+1 or -1, evenly) or "gaussian".

    Raises:
        ValueError: probes < 1, or another kind.
    """
    check.choice("probe", kind, PROBES)
    found = []
    for k in range(check.integer("probes", probes, 1, (1 << 24) - 1)):
        at = noise.at(Purpose.PROBES, k)
        if kind == "gaussian":
            found.append(ops.randn(shape, noise=at, device=device, dtype=dtype))
        else:
            u = ops.uniform(shape, noise=at, device=device, dtype=dtype)
            found.append(torch.where(u < 0.5, -1.0, 1.0).to(dtype))
    return torch.stack(found)


def _sum_dtype(v: Tensor) -> torch.dtype:
    return torch.float64 if v.dtype == torch.float64 else torch.float32


def _value(f: Field, x: Tensor, differentiable: bool) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone() if x.is_inference() else x
        x = x if differentiable and x.requires_grad else x.detach().requires_grad_(True)
        return f(x), x


def _products(v: Tensor, x: Tensor, vectors: Tensor, differentiable: bool) -> Tensor:
    """vectors^T J, [n, B, ...] like the vectors; zero where v does not depend on x."""
    if not v.requires_grad:
        return torch.zeros_like(vectors)

    def product(vector: Tensor, batched: bool) -> Tensor:
        (found,) = torch.autograd.grad(
            v, x, vector, retain_graph=True, create_graph=differentiable, is_grads_batched=batched,
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        return found

    if vectors.shape[0] > 1:
        try:
            return product(vectors, True)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError):
            pass  # an operation without a batching rule, such as a custom kernel: one by one; or an error met again
    return torch.stack([product(vector, False) for vector in vectors])


def _kept(v: Tensor, found: Tensor, differentiable: bool) -> tuple[Tensor, Tensor]:
    return (v, found) if differentiable else (v.detach(), found.detach())
