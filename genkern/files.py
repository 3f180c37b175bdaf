"""Files that are whole or absent: written under a temporary name, synced to the disk, then renamed.

A process that is killed at any moment leaves the old file, or none, and at most a file *.tmp beside it, which a later
writer of the same file removes once it is an hour old: until then another process may be writing it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any

LEFT = 3600.0  # seconds since a temporary file was last written, after which its writer is taken to be gone


def safetensors() -> Any:
    """The package. ImportError: it is not installed."""
    try:
        import safetensors as found
        import safetensors.torch
    except ImportError:
        raise ImportError("pairs and networks on disk need safetensors: pip install 'genkern[reflow]'") from None
    return found


@contextlib.contextmanager
def replaced(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary name beside `path`; what is written there takes path's place when the block ends without an error.
    Of several writers at a time the last one's file stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):  # its writer, or another, was quicker
            if time.time() - left.stat().st_mtime > LEFT:
                left.unlink()
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # that of any new file here; safetensors makes files that only their owner may read
        _synced(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _synced(path.parent)  # the rename itself


def _synced(path: pathlib.Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(tensors: Mapping[str, Any]) -> str:
    """SHA-256 of tensors by name: their dtypes, shapes and bytes, on any device."""
    import torch

    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return found.hexdigest()


def save_tensors(tensors: Mapping[str, Any], path: pathlib.Path, settings: str) -> None:
    """Tensors by name as safetensors, what they were made with, and their SHA-256."""
    package = safetensors()
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with replaced(path) as temporary:
        package.torch.save_file(own, temporary, {"settings": settings, "sha256": digest(own)})


def read_tensors(path: pathlib.Path) -> tuple[str, dict[str, Any]] | None:
    """What the tensors of a file were made with, and they themselves, on the CPU; None where the file is missing, cut
    off, or has other bytes than were written. Reads all of it."""
    package = safetensors()
    try:
        with package.safe_open(path, "pt") as f:
            told = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except (FileNotFoundError, package.SafetensorError):
        return None
    whole = "settings" in told and told.get("sha256") == digest(tensors)
    return (told["settings"], tensors) if whole else None


def differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """In words, where two mappings of settings differ; "" where they do not."""
    keys = [key for key in sorted({*there, *asked}) if there.get(key) != asked.get(key)]
    return "; ".join(f"{key} {there.get(key)!r}, asked for {asked.get(key)!r}" for key in keys)


def save_network(network: Any, path: pathlib.Path, settings: str) -> None:
    """A Module's parameters and buffers as safetensors, what it was made with, and the SHA-256 of its tensors."""
    package = safetensors()
    with replaced(path) as temporary:
        package.torch.save_model(network, str(temporary))
        with package.safe_open(temporary, "pt") as f:
            told = f.metadata() or {}  # which names are one tensor
        tensors = package.torch.load(temporary.read_bytes())  # not mapped: the file is written anew
        told |= {"settings": settings, "sha256": digest(tensors)}
        package.torch.save_file(tensors, temporary, told)


def network_settings(path: pathlib.Path) -> str | None:
    """What the network of a file was made with; None where the file is missing, or not whole. Reads all of it."""
    found = read_tensors(path)
    return None if found is None else found[0]


def load_network(network: Any, path: pathlib.Path) -> Any:
    """The network, with the parameters and buffers of a file."""
    safetensors().torch.load_model(network, str(path))
    return network
