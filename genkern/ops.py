"""The named fused ops. Each is one pass of a kernel: a row of coefficients applied to the arrays around the network.

They take torch tensors, with gradients in reverse and forward mode for every tensor argument (coefficients included),
or NumPy arrays, and return the same kind. A coefficient is a number, or a tensor of shape [B] (one a sample) or of one
element; a number that changes under torch.compile recompiles, a tensor does not. Dimension 0 is the batch. Outputs
have the state's dtype, device and strides. Arithmetic is float32, float64 for float64 arrays.

The same names in plain PyTorch are in genkern.reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from . import check, eager, rows
from .ddim import coefficients
from .fused import NAMES, _torch_side, apply_row, reduce_batch, reduce_row, weighted
from .noise import Noise
from .rows import DDIMRow, Out, Row, Scaled, times
from .stat import quantile_row
from .threshold import DynamicThreshold

Array = Any  # a torch tensor or a NumPy array
Coef = Any  # a number, or an array of shape [B] or of one element

PREDICTIONS = ("epsilon", "v", "sample")
LOSSES = ("l2", "l1", "pseudo_huber")
REDUCTIONS = ("mean", "sum", "none")

# What the ops call x, m, m_uncond, noise and h in messages.
_STEP = ("x", "v", "uncond", *NAMES[3:])
_HEUN = ("x", "v", "m_uncond", "noise", "v_next", *NAMES[5:])
_SKIP = ("x", "network_output", "uncond", *NAMES[3:])
_LOSS = ("x", "model_output", *NAMES[2:])
_TARGETS = NAMES[4:]
_DDIM = ("x_t", "model_output", "uncond", *NAMES[3:])


def randn(
    shape: Sequence[int], *, noise: Noise, device: Any = None, dtype: Any = None, out: Array | None = None
) -> Array:
    """Standard normal noise:  z[b, i] = f(seed, stream, draw, sample_id[b], i), and of nothing else.

    Args:
        shape: of the result, dimension 0 the batch.
        noise: which numbers.
        device: a torch device; default that of `out`, or the CPU.
        dtype: a torch dtype, default torch's default dtype; or a NumPy dtype, for a NumPy array. A half-precision
            result is the float32 one, rounded.
        out: written instead of a new array.

    Returns:
        The noise.  [B, ...].

    Raises:
        ValueError: an empty shape, a negative size, sample_ids that are not [B].
        TypeError: a dtype that is not floating.

    Source: Salmon et al. 2011 (Philox-4x32-10); Box, Muller 1958.
    """
    return _noise_alone(shape, noise, device, dtype, out, uniform=False)


def uniform(
    shape: Sequence[int], *, noise: Noise, device: Any = None, dtype: Any = None, out: Array | None = None
) -> Array:
    """Uniform numbers in (0, 1):  (w + 1/2) 2^-32 with w the words of Philox-4x32-10. Arguments as of randn."""
    return _noise_alone(shape, noise, device, dtype, out, uniform=True)


def add_noise(
    x: Array,
    alpha: Coef,
    sigma: Coef,
    *,
    noise: Noise | Array | None = None,
    return_noise: bool = False,
    out: Any = None,
) -> Any:
    """Noise a sample:  x_t = alpha x + sigma z.

    Args:
        x: data.  [B, ...], float16/bfloat16/float32/float64.
        alpha, sigma: scales of the path, finite and >= 0.  float, or [B].
        noise: a Noise, drawn in the kernel; a tensor [B, ...] of x's dtype or a lower precision; None: a fresh Noise.
        return_noise: return (x_t, z), z in x's dtype.
        out: written instead of a new array (a pair with return_noise); may be x.

    Returns:
        x_t, or (x_t, z).  [B, ...], x's dtype, device and strides.

    Raises:
        ValueError: shapes or devices differ; alpha or sigma is negative or not finite (looked at on the host).
        TypeError: integer, boolean or complex arrays.

    Source: (13.4) with alpha = sqrt(alphas_cumprod); (13.21), (13.24).
    """
    if noise is not None and not return_noise and not check.compiling() and eager.face is not None:
        quick = eager.face.linear(x, None, None, (), noise, out, alpha, 0.0, (), sigma, None, 1.0, 0.0)
        if quick is not None:
            return quick
    x = _needed("x", x)
    alpha, sigma = _coef("alpha", alpha, x, 0.0), _coef("sigma", sigma, x, 0.0)
    outs = (Out(x=alpha, z=sigma), Out(z=1.0)) if return_noise else (Out(x=alpha, z=sigma),)
    found = apply_row(Row(outs), x=x, noise=noise, out=out)
    return found if return_noise else found[0]


def ddim_step(
    x_t: Array, model_output: Array, alpha_t: Coef, sigma_t: Coef, alpha_s: Coef, sigma_s: Coef, *, eta: Coef = 0.0,
    noise: Noise | Array | None = None, prediction: str = "epsilon", clip: Any = None, uncond: Array | None = None,
    guidance_scale: Coef | None = None, return_pred: bool = False, out: Any = None,
) -> Any:  # fmt: skip
    """One step of DDIM or DDPM, from t to s:

        x_s = alpha_s y + sqrt(sigma_s^2 - d^2) epsilon + d z
        d   = eta (sigma_s / sigma_t) sqrt(1 - alpha_t^2 / alpha_s^2)

    with y the predicted data, clamped when asked, and epsilon the network's own, unclamped:

        prediction   y                                  epsilon
        "epsilon"    (x_t - sigma_t epsilon) / alpha_t  model_output
        "v"          alpha_t x_t - sigma_t v            alpha_t v + sigma_t x_t
        "sample"     model_output                       (x_t - alpha_t y) / sigma_t

    Args:
        x_t: state at t.  [B, ...], float16/bfloat16/float32/float64.
        model_output: the network's output at t.  [B, ...], of x_t's dtype or a lower precision.
        alpha_t, sigma_t, alpha_s, sigma_s: scales of the path at t and s, finite and >= 0.  float, or [B].
        eta: 0 is DDIM and draws nothing; 1 has the DDPM's posterior variance.  float >= 0, or [B].
        noise: a Noise, a tensor [B, ...], or None: a fresh Noise where eta needs one.
        prediction: "epsilon", "v" or "sample".
        clip: None, (lo, hi), or c for (-c, c): clamps y; or, of torch tensors, a DynamicThreshold.
        uncond: the network's unconditional output; model_output is then the conditional one, and
            uncond + guidance_scale (model_output - uncond) takes its place.
        guidance_scale: with uncond.  float, or [B].
        return_pred: return (x_s, y).
        out: written instead of a new array (a pair with return_pred); may be x_t.

    Returns:
        x_s, or (x_s, y).  [B, ...], x_t's dtype, device and strides.

    Raises:
        ValueError: shapes or devices differ; a coefficient outside its range; an eta that makes sigma_s^2 - d^2
            negative (values are looked at on the host). TypeError: integer, boolean or complex arrays.

    Source: (13.13); Song, Meng, Ermon, arXiv:2010.02502. v: Salimans, Ho, arXiv:2202.00512.
    """
    if not check.compiling() and eager.face is not None:
        quick = eager.face.ddim(
            x_t, model_output, uncond, noise, out, prediction, alpha_t, sigma_t, alpha_s, sigma_s, eta, clip,
            guidance_scale, return_pred,
        )  # fmt: skip
        if quick is not None:
            return quick
    x_t = _needed("x_t", x_t)
    check.choice("prediction", prediction, PREDICTIONS)
    coefficient = check.coefficient
    alpha_t, sigma_t = coefficient("alpha_t", alpha_t, x_t, 0.0), coefficient("sigma_t", sigma_t, x_t, 0.0)
    alpha_s, sigma_s = coefficient("alpha_s", alpha_s, x_t, 0.0), coefficient("sigma_s", sigma_s, x_t, 0.0)
    eta = coefficient("eta", eta, x_t, 0.0)
    check.ddim_path(prediction, alpha_t, sigma_t, alpha_s, sigma_s, eta, rows.ROUNDING)
    guidance = _guidance(uncond, guidance_scale, x_t)
    model_output = _needed("model_output", model_output)
    if isinstance(clip, DynamicThreshold):
        path = (alpha_t, sigma_t, alpha_s, sigma_s, eta)
        thresholded, h = _thresholded(clip, prediction, path, guidance, x_t, model_output, uncond, return_pred)
        found = apply_row(thresholded, x=x_t, m=model_output, m_uncond=uncond, h=h, noise=noise, out=out, names=_DDIM)
        return found if return_pred else found[0]
    row = DDIMRow(
        prediction, alpha_t, sigma_t, alpha_s, sigma_s, eta, check.clip_range(clip), guidance, return_pred,
    )  # fmt: skip
    found = apply_row(row, x=x_t, m=model_output, m_uncond=uncond, noise=noise, out=out, names=_DDIM)
    return found if return_pred else found[0]


def _thresholded(
    threshold: DynamicThreshold, prediction: str, path: tuple[Coef, ...], guidance: Coef | None, x: Any, m: Any,
    uncond: Any, return_pred: bool,
) -> tuple[Row, tuple[Any, ...]]:  # fmt: skip
    """The row of ddim_step whose data are thresholded, and its h: where a gradient is kept, the data themselves."""
    if not check.is_tensor(x):
        raise TypeError(
            f"clip: expected None, (lo, hi) or a number beside NumPy arrays, got {type(threshold).__name__}"
        )
    a, b, *others = coefficients(prediction, path, use_pred=True)
    y, c_x, c_m, d = others
    terms = {"x": x, "m": m, "m_uncond": uncond, "names": _DDIM}
    if _torch_side().differentiated([t for t in (x, m, uncond, a, b, guidance) if check.is_tensor(t)]):
        import torch

        # The quantile and the clamp are of float32, as the kernel's are, where the state has 16 bits.
        wide = torch.float32 if x.dtype.itemsize == 2 else x.dtype
        (y_wide,) = apply_row(Row((Out(x=a, m=b),), guidance=guidance), dtypes=(wide,), **terms)
        data = threshold.applied(y_wide).to(x.dtype)
        of_data = (Out(h=(1.0,)),) if return_pred else ()
        return Row((Out(x=c_x, m=c_m, h=(y,), z=d), *of_data), guidance=guidance), (data,)
    s = threshold.bound(quantile_row(Row((Out(y=1.0),), (a, b), guidance=guidance), threshold.ratio, **terms)).double()
    inverse = s.reciprocal()
    of_data = (Out(y=inverse),) if return_pred else ()
    c_y = times(y, inverse) if isinstance(y, float) else y * inverse
    bounds = (times(-1.0, s), s)
    return Row((Out(y=c_y, x=c_x, m=c_m, z=d), *of_data), (a, b), bounds, guidance), ()


def euler_step(
    x: Array, v: Array, dt: Coef, *, uncond: Array | None = None, guidance_scale: Coef | None = None,
    out: Array | None = None,
) -> Array:  # fmt: skip
    """Euler's step:  x + dt v.

    Args:
        x: state at t.  [B, ...], float16/bfloat16/float32/float64.
        v: velocity at (x, t).  [B, ...], of x's dtype or a lower precision.
        dt: step, in units of t; negative runs backward.  float, or [B].
        uncond: unconditional velocity; v is then the conditional one, and uncond + guidance_scale (v - uncond)
            takes its place.
        guidance_scale: with uncond.  float, or [B].
        out: written instead of a new array; may be x.

    Returns:
        The state at t + dt.  [B, ...], x's dtype, device and strides.

    Raises:
        ValueError: shapes or devices differ; dt is not finite (looked at on the host).
        TypeError: integer, boolean or complex arrays.

    Source: (13.22), (13.24), (13.27), (13.31); Ascher, Petzold 1998, section 3.1.
    """
    if v is not None and not check.compiling() and eager.face is not None:
        quick = eager.face.linear(x, v, uncond, (), None, out, 1.0, dt, (), 0.0, guidance_scale, 1.0, -math.inf)
        if quick is not None:
            return quick
    x = _needed("x", x)
    row = Row((Out(0.0, 1.0, _coef("dt", dt, x)),), guidance=_guidance(uncond, guidance_scale, x))
    return apply_row(row, x=x, m=_needed("v", v), m_uncond=uncond, out=out, names=_STEP)[0]


def heun_step(x: Array, v: Array, v_next: Array, dt: Coef, *, out: Array | None = None) -> Array:
    """Heun's corrector, one fused pass:  x + dt/2 (v + v_next).

    Args:
        x: state at t.  [B, ...], float16/bfloat16/float32/float64.
        v: velocity at (x, t).  [B, ...], of x's dtype or a lower precision.
        v_next: velocity at (x + dt v, t + dt).  [B, ...], as v.
        dt: step, in units of t; negative runs backward.  float, or [B].
        out: written instead of a new array; may be x.

    Returns:
        The state at t + dt.  [B, ...], x's dtype, device and strides.

    Raises:
        ValueError: shapes or devices differ; dt is not finite (looked at on the host).
        TypeError: integer, boolean or complex arrays.

    Source: the seed's 13.4.1 (numerical ODE solvers); Ascher, Petzold 1998, section 4.1.
    """
    if v is not None and not check.compiling() and eager.face is not None:
        quick = eager.face.linear(x, v, None, (v_next,), None, out, 1.0, dt, (dt,), 0.0, None, 0.5, -math.inf)
        if quick is not None:
            return quick
    x = _needed("x", x)
    half = times(0.5, _coef("dt", dt, x))
    row = Row((Out(0.0, 1.0, half, (half,)),))
    return apply_row(row, x=x, m=_needed("v", v), h=(_needed("v_next", v_next),), out=out, names=_HEUN)[0]


def consistency_skip(
    x: Array, network_output: Array, c_skip: Coef, c_out: Coef, *, uncond: Array | None = None,
    guidance_scale: Coef | None = None, out: Array | None = None,
) -> Array:  # fmt: skip
    """The skip parameterisation of a consistency model:  f = c_skip x + c_out F.

    Args:
        x: state.  [B, ...], float16/bfloat16/float32/float64.
        network_output: F(c_in x, c_noise).  [B, ...], of x's dtype or a lower precision.
        c_skip, c_out: c_skip = 1 and c_out = 0 at the smallest time, so that f is the identity there.  float, or [B].
        uncond: unconditional network output; network_output is then the conditional one, and
            uncond + guidance_scale (network_output - uncond) takes its place.
        guidance_scale: with uncond.  float, or [B].
        out: written instead of a new array; may be x.

    Returns:
        f(x, t).  [B, ...], x's dtype, device and strides.

    Raises:
        ValueError: shapes or devices differ; a coefficient is not finite (looked at on the host).
        TypeError: integer, boolean or complex arrays.

    Source: (13.29); Song, Dhariwal, Chen, Sutskever, arXiv:2303.01469.
    """
    if network_output is not None and not check.compiling() and eager.face is not None:
        quick = eager.face.linear(
            x, network_output, uncond, (), None, out, c_skip, c_out, (), 0.0, guidance_scale, 1.0, -math.inf
        )
        if quick is not None:
            return quick
    x = _needed("x", x)
    outs = (Out(x=_coef("c_skip", c_skip, x), m=_coef("c_out", c_out, x)),)
    row = Row(outs, guidance=_guidance(uncond, guidance_scale, x))
    network_output = _needed("network_output", network_output)
    return apply_row(row, x=x, m=network_output, m_uncond=uncond, out=out, names=_SKIP)[0]


def path_loss(
    model_output: Array, x: Array | None = None, *, x_coef: Coef = 0.0, noise_coef: Coef = 0.0,
    noise: Noise | Array | None = None, m_coef: Coef = 1.0, h: Sequence[Array] = (), h_coefs: Sequence[Coef] = (),
    weight: Coef | None = None, mask: Array | None = None, kind: str = "l2", c: float | None = None,
    reduction: str = "mean",
) -> Array:  # fmt: skip
    """A loss against a target on the path:  r = m_coef F - (x_coef x + noise_coef z + sum_k h_coefs[k] h_k).

        kind             loss of a sample, with w the mask (1 without one)
        "l2"             sum w r^2 / sum w
        "l1"             sum w |r| / sum w
        "pseudo_huber"   sqrt(sum w r^2 + c^2) - c

    reduced over the batch with its weights: "mean" is sum_b weight_b loss_b / B, "sum" without the division, "none"
    the [B] numbers weight_b loss_b. The target is never written, noise given as a Noise is drawn again in this pass,
    and the gradient of F is one more pass over the residual.

    Args:
        model_output: F.  [B, ...], float16/bfloat16/float32/float64, of x's dtype or a lower precision.
        x: data.  [B, ...]; None: left out, x_coef being 0. Without x, any of h, or a given noise, may have the higher
            precision.
        x_coef, noise_coef, m_coef: float, or [B].
        noise: a Noise, or a tensor [B, ...]; needed where noise_coef is not 0.
        h: up to three further tensors of the target.  [B, ...].
        h_coefs: their coefficients; default 1.0 each.
        weight: of a sample's loss.  float, or [B].
        mask: w, bool or floating (>= 0), broadcastable to F's shape. An element where it is False or 0 is left out,
            whatever it holds; a sample without any has loss 0.
        kind: "l2", "l1" or "pseudo_huber".
        c: of "pseudo_huber", > 0; default 0.00054 sqrt(elements of a sample) (arXiv:2310.14189).
        reduction: "mean", "sum" or "none". An empty batch has loss 0.

    Returns:
        The loss, float32 (float64 for float64): a 0-d tensor, or [B].

    Raises:
        ValueError: shapes, devices or lengths differ; noise is missing; a coefficient is not finite (looked at on the
            host). TypeError: integer, boolean or complex arrays. RuntimeError: a second derivative.

    Source: (13.10), (13.20), (13.23), (13.24), (13.32).
    """
    if mask is None and reduction != "none" and not check.compiling() and eager.face is not None:
        quick = eager.face.path_loss(
            model_output, x, x_coef, noise_coef, noise, m_coef, h, h_coefs, weight, kind, reduction
        )
        if quick is not None:
            return quick
    model_output = _needed("model_output", model_output)
    check.choice("kind", kind, LOSSES)
    check.choice("reduction", reduction, REDUCTIONS)
    if x is None or not check.is_tensor(model_output):  # else a pass checks all of them
        check.terms((("model_output", model_output),))
    coefs: tuple[Coef, ...] = ()
    if not (type(h) is type(h_coefs) is tuple and len(h) == len(h_coefs) == 0):
        h, coefs = _targets(h, h_coefs, model_output)
    x_coef, noise_coef = _coef("x_coef", x_coef, model_output), _coef("noise_coef", noise_coef, model_output)
    m_coef = _coef("m_coef", m_coef, model_output)
    if noise is None and not (type(noise_coef) is float and noise_coef == 0.0):
        raise ValueError("noise: expected a Noise or a tensor where noise_coef is not 0, got None")
    names: tuple[str, ...] = _TARGETS
    x_name = "x"
    if x is None:
        if not (type(x_coef) is float and x_coef == 0.0):
            raise ValueError("x_coef: expected 0 where x is not given, got another number")
        # The term of highest precision takes the state's place, which sets the arithmetic's.
        given = None if isinstance(noise, Noise) else noise
        wide, k = model_output.dtype.itemsize, -1
        for position, term in enumerate((*h, given)):
            if term is not None and getattr(getattr(term, "dtype", None), "itemsize", 0) > wide:
                wide, k = term.dtype.itemsize, position
        if k == len(h):
            x_name, x, x_coef, noise, noise_coef = "noise", noise, noise_coef, None, 0.0
        elif k >= 0:
            x_name, names = f"h[{k}]", names[:k] + names[k + 1 :]
            x, x_coef = h[k], coefs[k]
            h, coefs = (*h[:k], *h[k + 1 :]), coefs[:k] + coefs[k + 1 :]
    target = tuple([times(-1.0, k) for k in coefs]) if coefs else ()
    row = Row((Out(0.0, times(-1.0, x_coef), m_coef, target, times(-1.0, noise_coef)),))
    names = _LOSS if names is _TARGETS and x_name == "x" else (x_name, *_LOSS[1:4], *names)
    shape, summed = model_output.shape, "l1" if kind == "l1" else "l2"
    size, scale = max(math.prod(shape[1:]), 1), 1.0
    if weight is not None:
        weight = _coef("weight", weight, model_output)
        if isinstance(weight, float):
            scale, weight = weight, None
    if mask is None and kind != "pseudo_huber" and reduction != "none":
        scale /= max(math.prod(shape), 1) if reduction == "mean" else size
        return reduce_batch(
            row, scale, weight=weight, x=x, m=model_output, h=h, noise=noise, kind=summed, names=names
        )  # fmt: skip
    if kind == "pseudo_huber":
        c = 0.00054 * size**0.5 if c is None else check.number("c", c)
        if not c > 0.0:
            raise ValueError(f"c: expected a number > 0, got {c}")
    else:
        c, scale = None, scale if mask is not None else scale / size
    _, sums = reduce_row(
        row, x=x, m=model_output, h=h, noise=noise, mask=mask, kind=summed, scratch=True, names=names
    )  # fmt: skip
    return weighted(sums, weight, scale, reduction, c=c, masked=mask is not None)


def _targets(h: Any, h_coefs: Any, like: Array) -> tuple[tuple[Array, ...], tuple[Coef, ...]]:
    """h and their coefficients, 1.0 each where none are given."""
    for name, value in (("h", h), ("h_coefs", h_coefs)):
        if not isinstance(value, (tuple, list)):
            raise TypeError(f"{name}: expected a tuple or a list, got {type(value).__name__}")
    h, coefs = tuple(h), tuple(h_coefs) if len(h_coefs) else (1.0,) * len(h)
    if len(coefs) != len(h):
        raise ValueError(f"h_coefs: expected {len(h)} coefficients, one for each of h, got {len(coefs)}")
    return h, tuple([_coef(f"h_coefs[{k}]", value, like) for k, value in enumerate(coefs)])


def _coef(name: str, value: Coef, like: Array, low: float = -math.inf, high: float = math.inf) -> Coef:
    """check.coefficient; of a Scaled one, as the losses of methods give it, the tensor is checked."""
    if type(value) is Scaled:
        return Scaled(check.coefficient(name, value.value, like), value.scale)
    return check.coefficient(name, value, like, low, high)


def _needed(name: str, value: Array | None) -> Array:
    if value is None:
        raise TypeError(f"{name}: expected a torch tensor or a NumPy array, got None")
    return value


def _guidance(uncond: Array | None, scale: Coef | None, like: Array) -> Coef | None:
    if uncond is None:
        if scale is not None:
            raise ValueError("uncond: expected the unconditional output beside guidance_scale, got None")
        return None
    if scale is None:
        raise ValueError("guidance_scale: expected a number or a tensor beside uncond, got None")
    return check.coefficient("guidance_scale", scale, like)


def _noise_alone(shape: Sequence[int], noise: Noise, device: Any, dtype: Any, out: Any, *, uniform: bool) -> Array:
    if not check.compiling() and eager.face is not None:
        quick = eager.face.draw(shape, noise, device, dtype, out, 1 + uniform)
        if quick is not None:
            return quick
    if not isinstance(noise, Noise):
        raise TypeError(f"noise: expected a Noise, got {type(noise).__name__}")
    size = check.shape(shape)
    kind = check.kind_of([("out", out)])
    if out is not None:
        dtype = out.dtype if dtype is None else dtype
        device = device if kind == "numpy" or device is not None else out.device
    if kind == "numpy" or check.is_numpy_dtype(dtype):
        import numpy

        if device is not None and str(device) not in ("cpu", "numpy"):
            raise ValueError(f"device: expected None or the CPU for a NumPy array, got {device}")
        device, dtype = "numpy", numpy.dtype(dtype)
    else:
        import torch

        dtype = torch.get_default_dtype() if dtype is None else dtype
        if device is None:  # torch.compile cannot trace get_default_device
            device = torch.empty(0).device if check.compiling() else torch.get_default_device()
        device = torch.device(device)
    if not hasattr(dtype, "itemsize") or not check.is_float(dtype):
        raise TypeError(f"dtype: expected {check.FLOATS}, got {dtype}")
    row = Row((Out(z=1.0),))
    return apply_row(row, noise=noise, out=out, dtypes=(dtype,), size=size, device=device, uniform=uniform)[0]
