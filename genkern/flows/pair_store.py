"""Pairs (x0, x1) of a coupling on disk: safetensors shards beside a JSON manifest.

    manifest.json                what the pairs are: how many, how many a shard, how they were drawn
    pairs-00000.safetensors      pairs 0 .. shard_size - 1, and so on; the last shard may be shorter
        sample_ids               int64 [n], the numbers of the pairs
        x0, x1                   [n, ...]
        cond.NAME                [n, ...], the model's keyword arguments, where there are any
        guidance_scale           float64 [n], where x1 was drawn under guidance

Pair i is a function of the manifest and of i, so a shard can be drawn by any process, in any order, and again. A file
appears under its name when it is whole (genkern.files); its metadata name the manifest, by its SHA-256, and the shard,
and hold the SHA-256 of its tensors. A file that is cut off, or of another manifest, counts as missing: writing goes on
where it stopped, and no pair is left out or drawn twice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import check, files, ranks

FORMAT, VERSION = "genkern pairs", 1
KEY = (
    "pairs"  # of the metadata: one, as safetensors writes several in any order, and equal shards are to be equal files
)


class Pairs(NamedTuple):
    """Some pairs.  x0, x1: [n, ...].  cond: tensors [n, ...] by name.  sample_ids: int64 [n].  guidance_scale: [n],
    or None where there was no guidance."""

    x0: Tensor
    x1: Tensor
    cond: dict[str, Tensor]
    sample_ids: Tensor
    guidance_scale: Tensor | None = None


class PairStore:
    """Pairs on disk, read in place: a batch takes from the disk what it needs. A dataset for torch's DataLoader too.

    Args:
        path: the folder of a store.

    Attributes:
        count, shard_size: pairs in all, and in a shard.   settings: how they were drawn, as the manifest has it.

    Raises:
        FileNotFoundError: no manifest there. ValueError: a manifest of something else. ImportError: no safetensors.
    """

    def __init__(self, path: str | pathlib.Path) -> None:
        files.safetensors()
        self.path = pathlib.Path(path)
        try:
            text = (self.path / "manifest.json").read_text(encoding="utf-8")
        except FileNotFoundError:
            raise FileNotFoundError(
                f"path: expected a folder of pairs, found no {self.path / 'manifest.json'}"
            ) from None
        try:
            found = json.loads(text)
            if (found["format"], found["version"]) != (FORMAT, VERSION):
                raise ValueError(f"format {found['format']!r}, version {found['version']}")
            self.count, self.shard_size, self.settings = found["count"], found["shard_size"], found["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"path: expected a manifest of pairs in {self.path / 'manifest.json'}, got {error}"
            ) from None
        self.fingerprint = hashlib.sha256(_canonical(found).encode()).hexdigest()
        self._open: dict[int, dict[str, Tensor]] = {}

    @staticmethod
    def exists(path: str | pathlib.Path) -> bool:
        """Whether there is a store at this path, of whatever settings."""
        return (pathlib.Path(path) / "manifest.json").exists()

    @classmethod
    def create(cls, path: str | pathlib.Path, count: int, shard_size: int, settings: Mapping[str, Any]) -> PairStore:
        """The store of these settings: made, or, where it is there already, opened.

        Args:
            path: the folder; made where it is missing.
            count: pairs, >= 1.
            shard_size: pairs in a shard, >= 1.
            settings: what else the pairs are a function of: numbers, strings, lists and mappings of them.

        Raises:
            ValueError: the store there was made with other settings; the message names them.
        """
        files.safetensors()
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "count": check.integer("count", count, 1),
            "shard_size": check.integer("shard_size", shard_size, 1),
            "settings": json.loads(json.dumps(settings)),  # as they will be read
        }
        where = pathlib.Path(path) / "manifest.json"
        if not cls.exists(path):
            with files.replaced(where) as temporary:  # others may do so too; their shards tell stores apart
                temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        store = cls(path)
        asked = {**manifest["settings"], "count": manifest["count"], "shard_size": manifest["shard_size"]}
        there = {**store.settings, "count": store.count, "shard_size": store.shard_size}
        words = files.differences(there, asked)
        if words:
            raise ValueError(f"path: expected a folder of the same settings, {store.path} has pairs of {words}")
        return store

    @property
    def shards(self) -> int:
        """How many shards the store has when it is complete."""
        return -(-self.count // self.shard_size)

    def ids(self, shard: int) -> range:
        """The numbers of a shard's pairs."""
        low = check.integer("shard", shard, 0, self.shards - 1) * self.shard_size
        return range(low, min(low + self.shard_size, self.count))

    def file(self, shard: int) -> pathlib.Path:
        """Where a shard is, or will be."""
        return self.path / f"pairs-{shard:05d}.safetensors"

    def missing(self) -> list[int]:
        """The shards that are not there whole, by their headers and lengths; verify() reads them too."""
        return [shard for shard in range(self.shards) if not self._is_whole(shard)]

    def verify(self) -> list[int]:
        """The shards whose bytes are not those that were written, or that are not there. Reads the whole store."""
        found = self.missing()
        for shard in sorted(set(range(self.shards)) - set(found)):
            with files.safetensors().safe_open(self.file(shard), "pt") as f:
                wanted = _metadata(f)["sha256"]
                if files.digest({name: f.get_tensor(name) for name in f.keys()}) != wanted:  # noqa: SIM118
                    found.append(shard)
        return sorted(found)

    def write(self, shard: int, pairs: Pairs) -> None:
        """A shard, whole or not at all.

        Raises:
            ValueError: sample_ids are not the shard's, or tensors of another length.
        """
        ids = self.ids(shard)
        if pairs.sample_ids.tolist() != list(ids):
            raise ValueError(f"sample_ids: expected {ids.start} to {ids.stop - 1} of shard {shard}, got others")
        tensors = _named(pairs)
        for name, value in tensors.items():
            if value.ndim == 0 or len(value) != len(ids):
                raise ValueError(f"{name}: expected {len(ids)} pairs of shard {shard}, got shape {tuple(value.shape)}")
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        told = {"manifest": self.fingerprint, "shard": shard, "sha256": files.digest(tensors)}
        self._open.pop(shard, None)
        with files.replaced(self.file(shard)) as temporary:
            files.safetensors().torch.save_file(tensors, temporary, metadata={KEY: json.dumps(told)})

    def read(self, shard: int) -> Pairs:
        """A shard's pairs, mapped from the disk. FileNotFoundError: it is missing, or cut off."""
        return _pairs(self._tensors(shard))

    def batch(self, indices: Any) -> Pairs:
        """Pairs by their numbers, in that order.

        Args:
            indices: integers of 0 .. count - 1, a sequence or a tensor [n], n >= 1.

        Raises:
            IndexError: another number. FileNotFoundError: a shard is missing.
        """
        ids = torch.as_tensor(indices, dtype=torch.int64, device="cpu")
        if ids.ndim != 1 or not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= self.count:
            raise IndexError(f"indices: expected one or more integers from 0 to {self.count - 1}, got {indices}")
        of = ids // self.shard_size
        found: dict[str, Tensor] = {}
        for shard in of.unique().tolist():
            at = (of == shard).nonzero()[:, 0]
            for name, value in self._tensors(shard).items():
                if name not in found:
                    found[name] = value.new_empty((len(ids), *value.shape[1:]))
                found[name][at] = value[ids[at] - shard * self.shard_size]
        return _pairs(found)

    def batches(
        self, size: int, *, seed: int = 0, start: int = 0, device: torch.device | str = "cpu", rank: int | None = None,
        world_size: int | None = None,
    ) -> Iterator[Pairs]:  # fmt: skip
        """Without end: batches of `size` pairs, each pair once an epoch, in an order drawn from the seed.

        With several processes a batch of world_size * size pairs is drawn, of which each takes its own part.

        Args:
            size: pairs in a batch of this process, >= 1.
            seed: of the order, 0 to 2^63 - 1.
            start: batches left out at the beginning, >= 0; they are not read.
            device: of the tensors.
            rank, world_size: of this process; default those of torch.distributed, else 0 and 1.
        """
        check.integer("size", size, 1)
        check.integer("start", start, 0)
        rank, world_size = ranks.placed(rank, world_size)
        generator = torch.Generator().manual_seed(seed)
        whole, order = size * world_size, torch.empty(0, dtype=torch.int64)
        for number in itertools.count():
            while len(order) < whole:
                order = torch.cat([order, torch.randperm(self.count, generator=generator)])
            mine, order = order[rank * size : (rank + 1) * size], order[whole:]
            if number < start:
                continue
            found = self.batch(mine)
            yield _pairs({name: value.to(device, non_blocking=True) for name, value in _named(found).items()})

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One pair, as a mapping that torch's default_collate stacks: x0, x1, sample_ids, cond, guidance_scale."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Several, in one look at each shard: what a DataLoader asks for."""
        try:
            wrapped = [range(self.count)[i] for i in indices]
        except IndexError:
            raise IndexError(f"indices: expected integers from 0 to {self.count - 1}, got {list(indices)}") from None
        found = self.batch(wrapped)._asdict()
        cond = found.pop("cond")
        plain = {name: value for name, value in found.items() if value is not None}
        return [
            {name: value[k] for name, value in plain.items()}
            | {"cond": {name: value[k] for name, value in cond.items()}}
            for k in range(len(wrapped))
        ]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a DataLoader's process maps the files itself

    def _is_whole(self, shard: int) -> bool:
        package = files.safetensors()
        try:
            with package.safe_open(self.file(shard), "pt") as f:  # raises where the length is not the header's
                told, ids = _metadata(f), self.ids(shard)
                return (
                    told.get("manifest") == self.fingerprint
                    and told.get("shard") == shard
                    and f.get_tensor("sample_ids").tolist() == list(ids)
                )
        except (FileNotFoundError, ValueError, package.SafetensorError):
            return False

    def _tensors(self, shard: int) -> dict[str, Tensor]:
        if shard not in self._open:
            if not self._is_whole(shard):
                raise FileNotFoundError(
                    f"pairs: expected shard {shard} of {self.shards} in {self.file(shard)}, which is missing or cut off"
                )
            with files.safetensors().safe_open(self.file(shard), "pt") as f:
                self._open[shard] = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        return self._open[shard]


def _metadata(f: Any) -> dict[str, Any]:
    """A shard's metadata; of a file that is none of a store, nothing."""
    found = json.loads((f.metadata() or {}).get(KEY, "{}"))
    return found if isinstance(found, dict) else {}


def _named(pairs: Pairs) -> dict[str, Tensor]:
    """By the names that a shard has."""
    found = {"x0": pairs.x0, "x1": pairs.x1, "sample_ids": pairs.sample_ids}
    found |= {f"cond.{name}": value for name, value in pairs.cond.items()}
    return found if pairs.guidance_scale is None else {**found, "guidance_scale": pairs.guidance_scale}


def _pairs(named: Mapping[str, Tensor]) -> Pairs:
    cond = {name.removeprefix("cond."): value for name, value in named.items() if name.startswith("cond.")}
    return Pairs(named["x0"], named["x1"], cond, named["sample_ids"], named.get("guidance_scale"))


def _canonical(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":"))
