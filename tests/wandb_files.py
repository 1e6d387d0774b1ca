"""Reads the files that wandb writes offline, for tests of what is logged there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def wandb_records(path: Path) -> Iterator[bytes]:
    """The serialised records of a ``run-*.wandb`` file, up to its end or to where a crash cut it off.

    The format is LevelDB's log: after a header of 7 bytes, blocks of 32 KiB (the header belongs to the first) that
    hold chunks of a checksum (4 bytes), a length (2) and a type (1: whole, 2: first, 3: middle, 4: last).

    Raises:
        ValueError: It is no such file.
    """
    data = path.read_bytes()
    if data[:4] != b":W&B":
        raise ValueError(f"{path} is no run file of Weights & Biases.")
    position, block, record = 7, 2**15, b""
    while position + 7 <= len(data):
        if block - position % block < 7:  # the rest of a block that no chunk header fits into
            position += block - position % block
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        chunk = data[position + 7 : position + 7 + length]
        position += 7 + length
        if len(chunk) < length or kind not in (1, 2, 3, 4):
            return
        record = chunk if kind in (1, 2) else record + chunk
        if kind in (1, 4):
            yield record
