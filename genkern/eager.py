"""Calls on plain torch tensors in eager mode, past torch's dispatcher (csrc/python/eager.cpp).

torch's boxed interface costs a small call more than everything else that it does. genkern._arrays therefore packs a
row, checks it and launches its kernel by itself where every tensor is exactly a torch.Tensor or a Parameter and nothing
watches or transforms the call: no torch.compile, torch.func, forward mode, dispatch or function mode, tracer. Its
functions return None anywhere else, and where a check fails: the way through Python then takes the call, or words the
error. They need torch's C exchange API of DLPack (torch 2.11 has it).

The named ops hand over, by position:

    linear(x, m, m_uncond, h, noise, out, c_x, c_m, c_h, c_z, guidance, factor, low)
        c_x x + factor (c_m m + sum_k c_h[k] h_k) + c_z z,   m = m_uncond + guidance (m - m_uncond) beside m_uncond
        c_h () stands for 1 each; a term that an op has not is None with coefficient 0.0, or () for h; factor is a
        float, and low the least that a coefficient may be, the guidance scale apart, also a float.
    ddim(x, m, m_uncond, noise, out, prediction, alpha_t, sigma_t, alpha_s, sigma_s, eta, clip, guidance, return_pred)
        (13.13), as ops.ddim_step has it: x_s, or (x_s, y) with return_pred
    path_loss(model_output, x, x_coef, noise_coef, noise, m_coef, h, h_coefs, weight, kind, reduction)
        sum_b weight_b sum_i rho(r_bi) / n,   r = m_coef F - (x_coef x + noise_coef z + sum_k h_coefs[k] h_k),
        rho(r) = r^2 ("l2") or |r| ("l1"), n the elements of the batch ("mean") or of a sample ("sum")
    draw(shape, noise, device, dtype, out, kind)
        z alone: kind 1 normal, 2 uniform
"""

from __future__ import annotations

from typing import Any

from . import _library, noise, rows
from ._debug import debug

face: Any = None  # genkern._arrays, once genkern.functions has connected it; None where it is not to be had


def connect(map_function: Any, reduce_function: Any, loss_function: Any) -> None:
    """Hands over what the calls need of torch.

    Args:
        map_function, reduce_function, loss_function: apply of the Functions of eager_functions.py that tie results to
            autograd.
    """
    global face
    import torch
    from torch.autograd import forward_ad

    ops, arrays = _library.torch_ops(), _library.arrays()
    api = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if ops is None or arrays is None or api is None:
        return
    parts = {
        "tensor": torch.Tensor,
        "parameter": torch.nn.Parameter,
        "dtypes": (torch.float32, torch.float16, torch.bfloat16, torch.float64),
        "empty": torch.empty,
        "empty_like": torch.empty_like,
        "empty_strided": torch.empty_strided,
        "is_neg": torch.Tensor.is_neg,  # a third of what torch.is_neg costs
        "increment_version": torch._C._increment_version,
        "functorch": torch._C._functorch.peek_interpreter_stack,
        "tracing": torch._C._get_tracing_state,
        "dispatch_modes": torch._C._len_torch_dispatch_stack,
        "function_modes": torch._C._len_torch_function_stack,
        "forward_levels": forward_ad,
        "grad_enabled": torch.is_grad_enabled,
        "debug": debug,
        "row": rows.Row,
        "out": rows.Out,
        "ddim_row": rows.DDIMRow,
        "scaled": rows.Scaled,
        "noise": noise.Noise,
        "map_function": map_function,
        "reduce_function": reduce_function,
        "loss_function": loss_function,
        "exchange_api": api,
        "launcher": ops.launcher(),
    }
    if arrays.connect(parts):
        face = arrays
