"""Writes a .cu file as C++: kernel<<<grid, block, 0, stream>>>(arguments) becomes emulation::launch(...)."""

from __future__ import annotations

import re
import sys
from pathlib import Path

LAUNCH = re.compile(r"(\b\w+(?:<[^;{}<>]*>)?)\s*<<<([^;]*?), 0, stream>>>\(([^;]*?)\);", re.S)


def main(source: Path, target: Path) -> None:
    text, n = LAUNCH.subn(r"emulation::launch(\2, [&] { \1(\3); });", source.read_text())
    if n == 0 or "<<<" in text:
        sys.exit(f"{source}: a launch was not understood")
    target.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
