"""Apply a row of coefficients to arrays: one pass of a kernel, whatever kind of arrays they are.

    m     = m_u + w (m_c - m_u)
    y     = clamp(a x + b m, lo, hi)
    r_j   = c0j y + c1j x + c2j m + sum_k c3jk h_k + s_j e z,    e = exp(l0 + l1 v), 1 without v
    out_j = r_j + mask (p_j known + q_j z - r_j),                r_j without a mask

torch tensors go to torch.ops.genkern, NumPy arrays to genkern._arrays, and either to the plain PyTorch reference where
no kernel serves them. A term that is not given is never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from . import check, eager, rows, sample_losses
from .elementwise import checked as elementwise_terms
from .noise import Noise, as_int64
from .overlap import dense
from .spec import Spec

NAMES = ("x", "m", "m_uncond", "noise", "h[0]", "h[1]", "h[2]")
KINDS = ("l2", "l1")

AnyRow = rows.Row | rows.RowTable | rows.DDIMRow


def apply_row(
    row: AnyRow, *, x: Any = None, m: Any = None, m_uncond: Any = None, h: Sequence[Any] = (), noise: Any = None,
    out: Any = None, dtypes: Sequence[Any] | None = None, size: Sequence[int] | None = None, device: Any = None,
    uniform: bool = False, names: Sequence[str] = NAMES, v: Any = None, known: Any = None, mask: Any = None,
) -> tuple[Any, ...]:  # fmt: skip
    """map: the outputs of a row.

    Args:
        row: a Row, a DDIMRow, or a RowTable.
        x: state.  [B, ...], float16/bfloat16/float32/float64.
        m: network output.  [B, ...], of x's dtype or a lower precision; so are the terms below.
        m_uncond: unconditional network output, with m the conditional one; the row's guidance weighs them.
        h: up to three further tensors.
        noise: a Noise, drawn in the kernel; a tensor; or None: where the row needs noise, a fresh Noise governed by
            torch.manual_seed (from the operating system for NumPy arrays).
        out: an array (or a tuple of them, one an output) to write to; may be an input itself.
        dtypes: of the outputs; default x's (else m's, else noise's).
        size, device: of the outputs of a row of noise alone.
        uniform: draw uniforms in (0, 1) instead of normals.
        names: what to call x, m, m_uncond, noise and h in messages.
        v: what the noise's scale exp(l0 + l1 v) is of, elementwise; needs noise.  [B, ...]
        known: what an output is where the mask is 1, p known + q z, z the noise without its scale.  [B, ...]
        mask: bool, or floating of 0 to 1, broadcastable to x's shape; beside known. Where it is 0 nothing of known is
            in the output, where it is 1 nothing else, not even a NaN. It has no gradient.

    Returns:
        A tuple of one to three arrays, with a dense x's strides.

    Raises:
        ValueError: shapes, devices or lengths that differ; a coefficient whose term is not given; v or known without
            coefficients, or without what goes with it; a mask outside [0, 1], or one that requires a gradient.
            TypeError: arrays of mixed kinds or not floating.
    """
    elementwise = v is not None or known is not None or mask is not None
    if not elementwise and not check.compiling() and eager.face is not None:
        quick: tuple[Any, ...] | None = eager.face.map_row(row, x, m, m_uncond, h, noise, out, dtypes, 1 + uniform)
        if quick is not None:
            return quick
    packed = rows.pack(row)
    given = _checked(packed, x, m, m_uncond, h, noise, size, device, names, elementwise)
    if elementwise or packed.scales_noise or packed.blended:
        first = next((pair for pair in zip(_padded(names), given.arrays, strict=False) if pair[1] is not None), None)
        given = given._replace(elementwise=elementwise_terms(packed, first, noise, v, known, mask))
    outs = None if out is None else (out,) if not isinstance(out, (tuple, list)) else tuple(out)
    n_out, like = packed.n_out, given.like
    if dtypes is None:
        dtypes = (like.dtype,) * n_out if like is not None else [o.dtype for o in outs or ()]
    if len(dtypes) != n_out:
        raise ValueError(f"dtypes: expected {n_out}, one an output, got {len(dtypes)}")
    if outs is not None:
        if len(outs) != n_out:
            raise ValueError(f"out: expected {n_out} arrays, one an output, got {len(outs)}")
        labels = ["out"] if n_out == 1 else [f"out[{j}]" for j in range(n_out)]
        named = list(zip(_padded(names), given.arrays, strict=False))
        named += zip(("v", "known", "mask"), given.elementwise, strict=True)
        # A pass reads dense coefficients of the arithmetic's types where they lie, and others from a copy.
        coefficients = [("a coefficient", v) for v in packed.values if dense(v) and v.dtype.itemsize >= 4]
        check.outputs(
            list(zip(labels, outs, strict=True)), like if like is not None else outs[0], given.shape, dtypes, named,
            [*coefficients, ("the table", packed.table)],
        )  # fmt: skip
    if given.numpy:
        from . import arrays

        spec, tensors = _call(packed, given, noise, uniform, tuple([arrays.code_of(dtype) for dtype in dtypes]))
        return arrays.run_map(spec, outs, *tensors)
    functions = _torch_side()
    codes = functions.CODES
    spec, tensors = _call(packed, given, noise, uniform, tuple([codes[dtype] for dtype in dtypes]), 0, outs)
    if outs is None:
        found: tuple[Any, ...] = functions.map_rows(spec, *tensors)
        return found
    functions.map_rows_out(spec, outs, *tensors)
    return outs


def prepared(row: AnyRow, noise: Noise | None, like: Any, n_h: int, dtypes: Sequence[Any]) -> tuple[Spec, list[Any]]:
    """A call laid out before its arrays exist: its spec, and its tensors with None for x, m, m_uncond, h, a given z, v,
    known and the mask.

    For loops that own what they pass: of it the kernels' entry points check what they must, and Python nothing again.

    Args:
        row: as in apply_row.
        noise: a Noise to draw in the kernel; None where a z will be given, or none is needed.
        like: a torch tensor of the shape and on the device of the state to come.
        n_h: how many h there will be.
        dtypes: of the outputs.
    """
    packed = rows.pack(row)
    if noise is None:
        packed = packed._replace(draws=False)
    given = _Given(False, like, (None,) * (4 + n_h), like.shape, like.device)
    codes = _torch_side().CODES
    return _call(packed, given, noise, False, tuple(codes[dtype] for dtype in dtypes))


def reduce_row(
    row: AnyRow, *, x: Any = None, m: Any = None, m_uncond: Any = None, h: Sequence[Any] = (), noise: Any = None,
    mask: Any = None, kind: str = "l2", scratch: bool = False, names: Sequence[str] = NAMES,
) -> tuple[Any, Any]:  # fmt: skip
    """reduce: the residual r of a row with one output, and sums over every sample.

    Args:
        mask: bool or floating, broadcastable to x's shape; weighs rho(r). False and 0 leave an element out,
            whatever it holds.
        kind: "l2" sums mask r^2 and returns mask r; "l1" sums mask |r| and returns mask sign(r).
        scratch: the caller drops the residual: the backward pass may turn it into a gradient in place.
        others: as in apply_row.

    Returns:
        (residual, sums): the residual in m's dtype (x's without m), without a gradient; sums [B, 2], float32 (float64
        for float64): of rho(r), and of the mask (the number of unmasked elements), differentiable once.
    """
    if not check.compiling() and eager.face is not None and kind in KINDS:
        quick: tuple[Any, Any] | None = eager.face.reduce_row(
            row, x, m, m_uncond, h, noise, mask, KINDS.index(kind), scratch
        )
        if quick is not None:
            return quick
    packed = rows.pack(row)
    if packed.n_out != 1:
        raise ValueError(f"row: expected one output, the residual, got {packed.n_out}")
    if packed.scales_noise or packed.blended:
        raise ValueError("row: expected no elementwise coefficients in a residual")
    given = _checked(packed, x, m, m_uncond, h, noise, None, None, names)
    mask = None if mask is None else check.mask(mask, given.like)
    code = KINDS.index(check.choice("kind", kind, KINDS))
    spec, tensors = _call(packed, given, noise, False, (), code)
    if given.numpy:
        from . import arrays

        return arrays.run_reduce(spec, mask, *tensors)
    return _torch_side().reduce_rows(spec._replace(scratch=scratch), mask, *tensors)


def reduce_batch(
    row: AnyRow, scale: float, *, weight: Any = None, x: Any = None, m: Any = None, h: Sequence[Any] = (),
    noise: Any = None, kind: str = "l2", names: Sequence[str] = NAMES,
) -> Any:  # fmt: skip
    """scale times the sum over all samples of weight[b] times reduce_row's sums: a number (0-d).

    weight: an array of shape [B] or [1], or None. An eager call on torch tensors adds the samples up in float64, in an
    order that depends on the shape alone; elsewhere the array library adds them.
    """
    if not check.compiling() and eager.face is not None:
        quick = eager.face.loss_row(row, x, m, None, h, noise, None, KINDS.index(kind), scale, weight)
        if quick is not None:
            return quick
    _, sums = reduce_row(row, x=x, m=m, h=h, noise=noise, kind=kind, scratch=True, names=names)
    return weighted(sums, weight, scale, "sum")


def weighted(
    sums: Any, weight: Any, scale: float, reduction: str, *, c: float | None = None, masked: bool = False
) -> Any:
    """sample_losses.formula of reduce_row's sums, with the gradients of the sums."""
    if check.is_tensor(sums):
        weight = None if weight is None else weight.to(sums.dtype)
        return _torch_side().sample_losses(sums, c, masked, weight, scale, reduction)
    weight = None if weight is None else weight.astype(sums.dtype)
    found, _ = sample_losses.formula(sums, c, masked, weight, scale, reduction)
    return found if found.ndim else sums.dtype.type(found)


_functions: Any = None


def _torch_side() -> Any:
    """genkern.functions, which needs torch; kept, as an import statement costs a microsecond a call. torch.compile
    would recompile once it is there, and is given the import statement."""
    global _functions
    if check.compiling():
        from . import functions

        return functions
    if _functions is None:
        from . import functions

        _functions = functions
    return _functions


class _Given(NamedTuple):
    """The arrays of a call, checked."""

    numpy: bool
    like: Any  # the array whose shape, dtype and strides the outputs take; None for noise alone
    arrays: tuple[Any, ...]  # x, m, m_uncond, z, then h
    shape: tuple[int, ...]
    device: Any
    elementwise: tuple[Any, Any, Any] = (None, None, None)  # v, known, mask


def _checked(
    packed: rows.Packed, x: Any, m: Any, m_uncond: Any, h: Sequence[Any], noise: Any, size: Any, device: Any,
    names: Sequence[str], elementwise: bool = False,
) -> _Given:  # fmt: skip
    if len(h) > rows.MAX_H:
        raise ValueError(f"h: expected at most {rows.MAX_H} tensors, got {len(h)}")
    z = None if noise is None or isinstance(noise, Noise) else noise
    arrays = (x, m, m_uncond, z, *h)
    check.terms(zip(_padded(names), arrays, strict=False))
    like = x if x is not None else m if m is not None else z
    if like is None and (m_uncond is not None or any(t is not None for t in h) or size is None):
        raise ValueError(f"{names[0]}: expected {names[0]}, {names[1]} or a noise tensor, got None")
    if m_uncond is not None and m is None:
        raise ValueError(f"{names[1]}: expected the conditional output beside {names[2]}, got None")
    if like is None:
        given = _Given(device == "numpy", None, arrays, check.shape(size), None if device == "numpy" else device)
    else:
        numpy = check.is_array(like)
        given = _Given(numpy, like, arrays, like.shape, None if numpy else like.device)
    if packed.table is not None:
        width = rows.CELLS_ELEMENTWISE if elementwise else rows.n_cells(packed.n_out)
        check.table(packed.table, packed.index, width, like, given.shape[0])
        return given
    if packed.n_h > len(h):
        raise ValueError(f"h: expected {packed.n_h} tensors, one for each of its coefficients, got {len(h)}")
    if m_uncond is None and (packed.row[rows.W] != 1.0 or rows.W in packed.cells):
        raise ValueError(f"{names[2]}: expected a tensor beside a guidance scale, got None")
    if m is None and (packed.formula or packed.uses(rows.M)):
        raise ValueError(f"{names[1]}: expected a tensor where its coefficient is not 0, got None")
    if x is None and (packed.formula or packed.uses(rows.X)):
        raise ValueError(f"{names[0]}: expected a tensor where its coefficient is not 0, got None")
    if len(packed.values) > rows.MAX_VALUES:
        raise ValueError(f"row: expected at most {rows.MAX_VALUES} coefficients as tensors, got {len(packed.values)}")
    return given


def _padded(names: Sequence[str]) -> Sequence[str]:
    return names if len(names) == len(NAMES) else (*names, *NAMES[len(names) :])


def _call(
    packed: rows.Packed, given: _Given, noise: Any, uniform: bool, dtypes: tuple[int, ...], kind: int = 0,
    into: Sequence[Any] | None = None,
) -> tuple[Spec, list[Any]]:  # fmt: skip
    """Settles where the noise comes from, and lays the coefficients out. No check fails after a seed is drawn."""
    x, m, m_uncond, z, *h = given.arrays
    draws = isinstance(noise, Noise) if packed.draws is None else packed.draws
    draw, device_key, sample_ids = 0, None, None
    key: tuple[int, ...] = ()
    if packed.draws is False:
        z = None
    elif draws and z is None:
        if noise is None:
            check.elements(given.shape)
            if into is not None and not given.numpy:
                _torch_side().refuse_derivatives(into, (*given.arrays, packed.table, *packed.values))
            noise = Noise.fresh(torch_governs=not given.numpy)
        draw = 2 if uniform else 1
        key, device_key, sample_ids = source(noise, given.shape, given.numpy, given.device)

    row, values, cells, scales, formula = packed.row, packed.values, packed.cells, packed.scales, packed.formula
    if values and given.numpy:
        values = [_ready(value) for value in values]
    elif values:
        functions = _torch_side()
        if formula:
            row, values, cells, scales, formula = functions.differentiable_formula(packed)
        values = [functions.ready(value) for value in values]
    alone = given.like is None
    spec = Spec(
        tuple(row), len(h), tuple(cells), tuple(scales), formula, draw, key, packed.use_pred, dtypes,
        given.shape if alone else None, given.device if alone else None, kind, blended=packed.blended,
    )  # fmt: skip
    no_h = (None, None, None)[len(h) :]
    return spec, [
        x, m, z, m_uncond, *h, *no_h, packed.table, packed.index, device_key, sample_ids, *given.elementwise, *values,
    ]  # fmt: skip


def _ready(value: Any) -> Any:
    """An array of coefficients as the kernels read it: contiguous, float32 or float64."""
    import numpy

    return numpy.ascontiguousarray(value, dtype=None if value.dtype.itemsize >= 4 else numpy.float32)


def source(noise: Noise, shape: tuple[int, ...], numpy: bool, device: Any) -> tuple[tuple[int, ...], Any, Any]:
    """Where a call of a shape takes its noise from: key, device_key and sample_ids, as _key and the kernels have them.

    Raises:
        ValueError: more elements a sample than noise has, or other sample ids than shape[0].
    """
    check.elements(shape)
    ids = noise.sample_ids
    key, device_key = _key(noise, numpy, device)
    return key, device_key, None if ids is None else check.sample_ids(ids, shape[0], numpy, device)


def _key(noise: Noise, numpy: bool, device: Any) -> tuple[tuple[int, ...], Any]:
    """(seed, stream, draw) on the host, and (seed, stream, 0) on the device where one of them is a tensor."""
    if not noise.on_device:
        return (as_int64(int(noise.seed)), as_int64(int(noise.stream)), noise.draw), None
    if numpy:
        numbers = [as_int64(int(part)) for part in (noise.seed, noise.stream)]
        return (numbers[0], numbers[1], noise.draw), None
    import torch

    # Host numbers are filled in on the device: a copy from pageable memory is refused while a CUDA graph is captured.
    parts = [
        part.reshape(1).to(device)
        if isinstance(part, torch.Tensor)
        else torch.full((1,), as_int64(part), dtype=torch.int64, device=device)
        for part in (noise.seed, noise.stream, 0)
    ]
    return (0, 0, noise.draw), torch.cat(parts)
