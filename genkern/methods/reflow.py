"""Reflow and distillation of a rectified flow, from pairs on disk: Algorithm 1 without writing its loop.

    (Z_0^0, Z_1^0) = (X_0, X_1),     Z^{k+1} = RectFlow((Z_0^k, Z_1^k))                             (13.3, reflow)

The k-rectified flow's own pairs (z0, z1), z1 its end from z0, are what the next one is trained on, by (13.24). Its
distillation into a student of K Euler steps is (13.24) at the times of those steps alone,

    min_v E |(z1 - z0) - v(z_t, t)|^2,    z_t = t z1 + (1 - t) z0,    t uniform in {0, 1/K, .., (K-1)/K},

so that a student of one step is regressed on z1 - z0 at z0. Guidance is in z1, so the next flow and the student have it
without an unconditional call. Liu, Gong, Liu, arXiv:2209.03003, algorithm 1 and section 2; Liu et al.,
arXiv:2309.06380 (guidance).
"""

from __future__ import annotations

import copy
import functools
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import check, files, ops, ranks
from ..flows.pair_store import Pairs, PairStore
from ..flows.times import Steps
from ..fused import apply_row
from ..noise import Noise, Purpose
from ..rows import Out, Row
from ..samplers import network
from ..samplers.callback import bar
from ..training.pairs import PairFitOptions, checked_options, fit_pairs
from ._pair_settings import Given, digest, of_count, of_ids, same_pair, told
from ._training import Batch
from .flow import Flow

if TYPE_CHECKING:
    from ..samplers.table import Sampler
    from ._training import Metric

# What sample() may be told for pairs: all of it is in the manifest, but for what does not change a pair.
RESULT = ("times", "guidance_scale", "guidance_interval", "guidance_rescale", "apg", "model_dtype")
GUIDANCE = ("uncond", "guidance_scale", "guidance_interval", "guidance_rescale", "apg")
EFFORT = ("device", "batch_size", "cuda_graph")
PAIRS = 1  # the stream of pairs by default and of students' pairs; reflow's are 2, 3, .., and sample(seed=) has 0
Train = Callable[[nn.Module, PairStore, int], nn.Module]
STORED = (torch.float32, torch.float16, torch.bfloat16)


class Reflow(Flow):
    """What a rectified flow does with its own pairs. A flow here has loss(model, x1, x0, t=, times=, **options)."""

    loss: Callable[..., Tensor]

    def write_pairs(
        self,
        model: Any,
        path: str | pathlib.Path,
        shape: Sequence[int],
        *,
        seed: int = 0,
        stream: int = PAIRS,
        x0: Tensor | Callable[[Tensor], Tensor] | None = None,
        cond: Given = None,
        uncond: Given = None,
        steps: int | None = None,
        sampler: str | Sampler = "euler",
        shard_size: int = 4096,
        dtype: torch.dtype = torch.float32,
        rank: int | None = None,
        world_size: int | None = None,
        progress: bool = False,
        **options: Any,
    ) -> PairStore:
        """The rectified coupling (z0, z1) of a trained flow, on disk: pairs() for more than fits in memory.

        Pair i is a function of these arguments and of i, up to the network's rounding. What is there already is kept,
        so a call that was cut off is called again, and several processes, or jobs that know nothing of each other,
        each draw their own shards: process r those of number r, r + world_size, and so on.

        A store that is there has to be of the same settings. Compared are the numbers, names and options; tensors and
        Modules, by the SHA-256 of their values; other callables by their qualified names, functools.partial by its
        parts, objects by their public attributes; and the first pair that is there, x0, x1 and cond, with the same
        pair drawn again, within 0.05 of its norm: other functions of one name are found by it, if they change it.

        Args:
            model: the trained network. A Module's parameters and buffers are part of the settings, by their SHA-256;
                of any other callable the pair that is drawn again is all that is known.
            path: the folder of the store; made where it is missing.
            shape: [count, ...]: how many pairs, and the shape of one.
            seed, stream: z0 of pair i is N(0, I) at Noise(seed, stream, sample_ids=[i]). sample(seed=) has the stream
                0, so that what is sampled later does not start from a pair that was trained on; reflow() has 2, 3, ...
            x0: instead of that, the sources: a tensor of this shape, or a callable of the pairs' numbers, int64 [n]
                on the CPU, giving [n, ...].
            cond: keyword arguments of the model, kept in the pairs: tensors [count, ...] by name, or a callable of the
                numbers giving tensors [n, ...].
            uncond: the same for guidance; not kept.
            steps, sampler: of sample().
            shard_size: pairs in a file, >= 1: what a process that is cut off loses at most.
            dtype: of x0 and x1 in the files: float32, float16 or bfloat16. The flow is solved in float32.
            rank, world_size: which of how many processes this is; default those of torch.distributed, which then wait
                for each other at the end, else 0 and 1.
            progress: show a bar (tqdm) of this process's shards.
            options: of sample(): times, guidance_scale (a number, or a tensor [count]; kept in the pairs),
                guidance_interval, guidance_rescale, apg, model_dtype; device, batch_size, cuda_graph.

        Returns:
            The store, complete where all processes are done.

        Raises:
            ValueError: the store there was made with other settings; as sample(). TypeError: an option that pairs do
                not have. ImportError: safetensors is not installed.
        """
        unknown = options.keys() - {*RESULT, *EFFORT}
        if unknown:
            raise TypeError(f"write_pairs() got an unexpected keyword argument {sorted(unknown)[0]!r}")
        if dtype not in STORED:
            raise ValueError(f"dtype: expected torch.float32, torch.float16 or torch.bfloat16, got {dtype}")
        size = check.shape(shape)
        count, noise, scale = size[0], Noise(seed, stream), options.pop("guidance_scale", None)
        of_count("x0", x0, count)
        for name, given in (("cond", cond), ("uncond", uncond), ("guidance_scale", {"": scale})):
            for key, value in (given if isinstance(given, Mapping) else {}).items():
                of_count(f"{name}[{key!r}]" if key else name, value, count)
        together = rank is None
        rank, world_size = ranks.placed(rank, world_size)
        settings = {
            "flow": type(self).__name__, "model": digest(model), "shape": list(size[1:]), "dtype": told(dtype),
            "seed": seed, "stream": stream, "x0": "normal" if x0 is None else told(x0), "cond": told(cond),
            "uncond": told(uncond), "guidance_scale": told(scale), "sampler": told(sampler), "steps": steps,
            **{name: told(options[name]) for name in RESULT if name in options},
        }  # fmt: skip
        device = options.pop("device", None)
        device = network.device_of(model) if device is None else network.checked_device(device)

        def drawn(ids: Tensor) -> Pairs:
            at = noise.of_samples(ids.to(device))
            if x0 is None:
                z0 = ops.randn((len(ids), *size[1:]), noise=at.at(Purpose.INITIAL), device=device)
            else:
                z0 = (x0(ids) if callable(x0) else x0[ids]).to(device)
            z0 = z0.to(dtype)  # before the flow starts from it
            kept, w = of_ids(cond, ids, device), scale[ids].to(device) if isinstance(scale, Tensor) else scale
            z1 = self.sample(
                model, (len(ids), *size[1:]), x0=z0, steps=steps, sampler=sampler, noise=at, cond=kept,
                uncond=None if uncond is None else of_ids(uncond, ids, device), guidance_scale=w, **options,
            )  # fmt: skip
            w = w if w is None else torch.as_tensor(w, dtype=torch.float64).expand(len(ids))
            return Pairs(z0, z1.to(dtype), kept, ids, w)

        if count and not PairStore.exists(path):
            drawn(torch.arange(1))  # what sample() refuses is refused before there is a store of it
        store = PairStore.create(path, count, shard_size, settings)
        absent = store.missing()
        there = next((shard for shard in range(store.shards) if shard not in absent), None)
        if there is not None:
            same_pair(store, there, drawn(torch.tensor([store.ids(there).start])))
        missing = [shard for shard in absent if shard % world_size == rank]
        with bar(progress, len(missing), "pairs") as tick:
            for shard in missing:
                ids = store.ids(shard)
                store.write(shard, drawn(torch.arange(ids.start, ids.stop)))
                tick()
        if together:
            ranks.barrier(device)
        return store

    def distill_loss(
        self,
        model: Any,
        x1: Tensor,
        x0: Tensor,
        *,
        student_steps: int = 1,
        metric: Metric | None = None,
        **options: Any,
    ) -> Tensor:
        """(13.24) at the times of a student's K Euler steps alone, on pairs of a rectified flow.

        Args:
            model: the student, called as model(x_t, t, **cond), and sampled by sample(steps=K).
            x1, x0: pairs of the flow.  [B, ...].
            student_steps: K >= 1.
            metric: in place of the squared error of v, d(x_t + (1 - t) v, x1) giving [B], such as LPIPS.
            options: of loss(): LossOptions.

        Returns:
            The loss, float32, as loss().

        Raises:
            ValueError, TypeError: as loss().

        Source: arXiv:2209.03003, section 2 (distillation).
        """
        times = Steps(student_steps)
        if metric is None:
            return self.loss(model, x1, x0, times=times, **options)
        check.terms([("x1", x1), ("x0", x0)])
        batch = Batch(model, x1, options)
        batch.measurable(metric)
        t = batch.times(None, times)
        (x_t,) = apply_row(Row((Out(x=t, h=(1.0 - t,)),)), x=batch.x, h=(x0,), dtypes=(batch.model_dtype,))
        (end,) = apply_row(Row((Out(x=1.0, m=1.0 - t),)), x=x_t, m=network.at_most(batch.call(x_t, t), x_t.dtype))
        return batch.measured(metric, end, batch.x, t)

    def reflow(
        self,
        model: nn.Module,
        path: str | pathlib.Path,
        shape: Sequence[int],
        *,
        rounds: int = 1,
        seed: int = 0,
        fit: PairFitOptions | None = None,
        train: Train | None = None,
        **options: Any,
    ) -> list[nn.Module]:
        """Rounds of reflow: pairs of the flow so far, a network trained on them from its weights, and again.

        Each round has a folder, path/2-rectified, path/3-rectified, ..., with `pairs` and `network.safetensors`. What
        is whole is not made again: a call that was cut off goes on at the shard where it stopped, or in the training at
        its last checkpoint, `training.safetensors`, which is written every checkpoint_every steps and removed when the
        network is there. It ends as one that was not cut off, with the same bits in one process on one machine. A file
        that is cut off, or has other bytes than its SHA-256 says, counts as missing; of a checkpoint a warning says so.
        With torch.distributed every process calls this.

        Args:
            model: the 1-rectified flow's network, trained; not changed. Parameters that do not require a gradient are
                not trained; where none does, as in an average, all of them are.
            path: the folder of all rounds.
            shape: [count, ...], of the pairs of a round.
            rounds: >= 1.
            seed: of pairs and training; the pairs of the k-rectified flow's training have the stream k.
            fit: PairFitOptions: steps=, batch_size=, lr=, checkpoint_every=, ...
            train: instead of that, train(network, store, k) -> the trained network of the same class, which makes the
                k-rectified flow from a copy of the one before: a loop of one's own, with Lightning or Accelerate. It
                is known by its qualified name alone: a network it made is kept though the function is another now.
            options: of write_pairs(): steps=, sampler=, cond=, uncond=, guidance_scale=, x0=, ... Guidance is of the
                first round's pairs: the flows after it have it in them.

        Returns:
            The networks of the 2-, 3-, ... rectified flows, in eval mode, on the model's device; their parameters
            require a gradient where the model's do.

        Raises:
            ValueError: a folder there, a network or a checkpoint in it, was made with other settings; as write_pairs()
                and training.fit(). What is there stays.
            TypeError: an unknown option. ImportError: safetensors is not installed.
        """
        found: list[nn.Module] = []
        for k in range(2, check.integer("rounds", rounds, 1) + 2):
            folder = pathlib.Path(path) / f"{k}-rectified"
            before = found[-1] if found else model
            found.append(self._round(before, folder, shape, k, k, seed, fit, train, options, self.loss, {}))
            options = {name: value for name, value in options.items() if name not in GUIDANCE}
        return found

    def distill(
        self,
        model: nn.Module,
        path: str | pathlib.Path,
        shape: Sequence[int],
        *,
        student_steps: int = 1,
        seed: int = 0,
        fit: PairFitOptions | None = None,
        train: Train | None = None,
        **options: Any,
    ) -> nn.Module:
        """A student of K Euler steps, from the flow's weights and its own pairs: distill_loss() on write_pairs().

        Args:
            model: the flow's network, of any order of reflow; not changed.
            path: a folder for the pairs, the checkpoint of the training, and the network; what is whole there is kept.
            student_steps: K >= 1.
            shape, seed, fit, train, options: as of reflow(); the pairs have the stream 1, train is called with K, and a
                metric goes into fit={"loss_options": {"metric": ...}}.

        Returns:
            The student, in eval mode: sample(student, ..., steps=K). Its parameters require a gradient where the
            model's do.

        Raises:
            ValueError, TypeError, ImportError: as reflow().
        """
        k = check.integer("student_steps", student_steps, 1)
        loss = functools.partial(self.distill_loss, student_steps=k)
        return self._round(
            model, pathlib.Path(path), shape, k, PAIRS, seed, fit, train, options, loss, {"student_steps": k}
        )

    def _round(
        self, model: nn.Module, folder: pathlib.Path, shape: Sequence[int], k: int, stream: int, seed: int,
        fit: PairFitOptions | None, train: Train | None, options: Mapping[str, Any], loss: Callable[..., Tensor],
        of: Mapping[str, Any],
    ) -> nn.Module:  # fmt: skip
        """Pairs of a flow, and the network that is trained on them."""
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if fit is not None and train is not None:
            raise ValueError("fit: expected None beside train, which takes its place")
        asked, student = checked_options(fit or {}), copy.deepcopy(model).eval()
        device, every = network.device_of(student), asked.pop("checkpoint_every")  # which changes nothing
        flags = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
        frozen = sorted(name for name, flag in flags.items() if not flag) if any(flags.values()) else []
        store = self.write_pairs(student, folder / "pairs", shape, seed=seed, stream=stream, **options)
        how = {**of, "train": told(train)} if train is not None else {**of, "seed": seed, **told(asked)}
        how |= {"frozen": frozen} if frozen else {}
        where, named = folder / "network.safetensors", f"{store.fingerprint} {json.dumps(how, sort_keys=True)}"
        left, first = folder / "training.safetensors", ranks.placed(None, None)[0] == 0
        there = ranks.of_first(lambda: files.network_settings(where), device)
        if there is not None and there != named:
            raise ValueError(
                f"path: expected a network of the same settings, {where} has {there!r}, asked for {named!r}"
            )
        if there is not None:
            if first:
                left.unlink(missing_ok=True)
            return files.load_network(student, where).eval()
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name not in frozen)
        student.train()
        if train is None:
            student = fit_pairs(
                student, loss, store, seed=seed, progress=bool(options.get("progress")), checkpoint=left,
                checkpoint_every=every, **asked,
            )  # fmt: skip
        else:
            student = train(student, store, k)
        if not isinstance(student, nn.Module):
            raise TypeError(f"train: expected the trained network from it, got {type(student).__name__}")
        if first:
            files.save_network(student, where, named)
            left.unlink(missing_ok=True)
        ranks.barrier(device)
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(flags.get(name, False))
        return student.eval()
