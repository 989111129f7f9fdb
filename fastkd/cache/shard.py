"""One shard of a cache: a safetensors file of some sequences, laid end to end.

    offsets    (n + 1,)     int64    where each sequence begins in the two below, in tokens
    digests    (n, 2)       int64    the 16 bytes of each sequence's digest
    checksums  (n,)         int64    CRC-32 of each sequence's ids and log-probabilities
    ids        (tokens, k)  uint16 or uint32, with all bits set for padding
    log_probs  (tokens, k)  float16 or float32

What stands before ids and log_probs is the shard's head, whose checksum is in the index. So every byte is covered, and
a sequence is checked by reading no more than it: a worker that draws sequences at random does not read whole shards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from fastkd.cache.format import DamagedFileError, ShardEntry, checksum, publish
from fastkd.cache.tokens import DIGEST_BYTES

LENGTH_BYTES = 8  # of a safetensors file: the size of its JSON, little-endian


class Stored(NamedTuple):
    """A sequence as a shard has it."""

    digest: bytes
    ids: NDArray[Any]  # (tokens, k)
    log_probs: NDArray[Any]  # (tokens, k)
    padded: bool = False  # some of the ids are padding; known when they are read


def write_shard(path: Path, sequences: Sequence[Stored]) -> ShardEntry:
    tensors = {
        "offsets": np.cumsum([0, *(len(sequence.ids) for sequence in sequences)]),
        "digests": np.frombuffer(b"".join(sequence.digest for sequence in sequences), np.int64).reshape(-1, 2),
        "checksums": np.array([_checksum(sequence) for sequence in sequences]),
        "ids": np.concatenate([sequence.ids for sequence in sequences]),
        "log_probs": np.concatenate([sequence.log_probs for sequence in sequences]),
    }
    publish(path, lambda part: save_file(tensors, part))
    head = _head(path)
    return ShardEntry(
        file=path.name,
        bytes=path.stat().st_size,
        head_bytes=len(head),
        checksum=checksum(head),
        sequences=len(sequences),
        tokens=len(tensors["ids"]),
    )


def _head(path: Path) -> bytes:
    """All that safetensors puts before the two tensors of many bytes; it sorts them by the size of their elements."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(LENGTH_BYTES), "little")
        fields = json.loads(file.read(size))
        file.seek(0)
        return file.read(LENGTH_BYTES + size + min(fields[name]["data_offsets"][0] for name in ("ids", "log_probs")))


def _checksum(sequence: Stored) -> int:
    return int(checksum(sequence.ids, sequence.log_probs), 16)


def padding(ids: NDArray[Any]) -> int:
    """What stands for -1 among unsigned ids."""
    return int(np.iinfo(ids.dtype).max)


class Shard:
    """A shard, mapped into memory.

    Raises:
        DamagedFileError: it is not what the index says.
    """

    def __init__(self, path: Path, entry: ShardEntry) -> None:
        self.path, self.entry = path, entry
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                head = file.read(entry.head_bytes)
        except FileNotFoundError:
            raise DamagedFileError(f"{path}: is missing") from None
        if size != entry.bytes:
            raise DamagedFileError(f"{path}: has {size} bytes, the index says {entry.bytes}")
        if checksum(head) != entry.checksum:
            raise DamagedFileError(f"{path}: is damaged, the checksum of its head is not the index's")
        with safe_open(path, framework="pt") as file:  # which maps the file, where "np" would read it
            self._arrays = {name: file.get_tensor(name).numpy() for name in ("ids", "log_probs")}
            self._digests = file.get_tensor("digests").numpy().tobytes()
            self._offsets, self._checksums = file.get_tensor("offsets").tolist(), file.get_tensor("checksums").tolist()
        self._padded: list[bool | None] = [None] * entry.sequences  # None: not read yet

    def read(self, position: int) -> Stored:
        """The sequence at a position, its arrays views of the file; checked when it is first read.

        Raises:
            DamagedFileError: it is not what was written.
        """
        run = slice(self._offsets[position], self._offsets[position + 1])
        digest = self._digests[DIGEST_BYTES * position : DIGEST_BYTES * (position + 1)]
        found = Stored(digest, self._arrays["ids"][run], self._arrays["log_probs"][run])
        padded = self._padded[position]
        if padded is None:
            if _checksum(found) != self._checksums[position]:
                raise DamagedFileError(f"{self.path}: is damaged, the checksum of its sequence {position} is another")
            padded = self._padded[position] = bool(found.ids.max(initial=0) == padding(found.ids))
        return found._replace(padded=padded)
