"""Calls on plain torch tensors in eager mode, past torch's dispatcher (csrc/python/eager.cpp).

torch's boxed interface costs a small call more than everything else that it does. genkern._arrays therefore packs a
row, checks it and launches its kernel by itself where every tensor is exactly a torch.Tensor or a Parameter and nothing
watches or transforms the call: no torch.compile, torch.func, forward mode, dispatch or function mode, tracer. Its
functions return None anywhere else, and where a check fails: the way through Python then takes the call, or words the
error. They need torch's C exchange API of DLPack (torch 2.11 has it).
"""

from __future__ import annotations

from typing import Any

from . import _library, noise, rows

face: Any = None  # genkern._arrays, once genkern.functions has connected it; None where it is not to be had


def connect(map_function: Any, reduce_function: Any, loss_function: Any) -> None:
    """Hands over what the calls need of torch.

    Args:
        map_function, reduce_function, loss_function: apply of the Functions of functions.py that tie results to
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
        "is_neg": torch.Tensor.is_neg,
        "increment_version": torch._C._increment_version,
        "functorch": torch._C._functorch.peek_interpreter_stack,
        "tracing": torch._C._get_tracing_state,
        "dispatch_modes": torch._C._len_torch_dispatch_stack,
        "function_modes": torch._C._len_torch_function_stack,
        "forward_levels": forward_ad,
        "grad_enabled": torch.is_grad_enabled,
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
