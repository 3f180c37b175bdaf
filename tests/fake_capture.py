"""A capture for the CPU: it records what torch's dispatcher is asked for, and does that again at every replay.

Like a CUDA graph it knows tensors by their memory and nothing of the Python code between two operations: a number that
the code has baked in stays what it was. Like a CUDA capture it computes nothing that lasts, and fails where the code
looks at a value.
"""

from __future__ import annotations

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genkern.graphs import capture

LOOKS = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.saved = [], {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(tag in op.tags for tag in LOOKS):
            raise RuntimeError(f"{op} is not permitted when stream is capturing")
        for argument, value in self._named(op, args, kwargs):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for t in tree_leaves(value):
                    if isinstance(t, torch.Tensor):
                        storage = t.untyped_storage()
                        self.saved.setdefault(storage.data_ptr(), (storage, storage.clone()))
        outs = op(*args, **kwargs)
        self.calls.append((op, args, kwargs, outs))
        return outs

    @staticmethod
    def _named(op, args, kwargs):
        arguments = op._schema.arguments
        yield from zip(arguments, args, strict=False)
        yield from ((a, kwargs[a.name]) for a in arguments if a.name in kwargs)

    def undo(self):
        for storage, copy in self.saved.values():
            storage.copy_(copy)


class FakeGraph:
    def __init__(self, calls):
        self.calls, self.replays = calls, 0

    def replay(self):
        self.replays += 1
        for op, args, kwargs, outs in self.calls:
            again = op(*args, **kwargs)
            for kept, new in zip(tree_leaves(outs), tree_leaves(again), strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


class FakeCapture:
    """seconds: of a step, as it measures them."""

    made: list[FakeCapture] = []
    step_seconds = 1e-5

    def __init__(self, device):
        self.graphs = []
        FakeCapture.made.append(self)

    def warm_up(self, run):
        capture.check_warm_up(run, torch.device("cpu"))

    def record(self, run):
        recorder = Recorder()
        try:
            with recorder:
                run()
        except Exception as error:
            raise capture.Uncapturable(capture._failed(error)) from error
        finally:
            recorder.undo()
        self.graphs.append(FakeGraph(recorder.calls))
        return self.graphs[-1]

    def seconds(self, graph):
        graph.replay()
        return FakeCapture.step_seconds

    @contextlib.contextmanager
    def turn(self):
        yield None
