"""One shard of a cache: a safetensors file of some sequences, laid end to end.

    offsets    (n + 1,)     int64    where each sequence begins in the two below, in tokens
    digests    (n, 2)       int64    the 16 bytes of each sequence's digest
    checksums  (n,)         int64    CRC-32 of each sequence's ids and log-probabilities
    ids        (tokens, k)  uint16 or uint32, id + 1, 0 for padding
    log_probs  (tokens, k)  float16 or float32

What stands before ids and log_probs is the shard's head, whose checksum is in the index. So every byte is covered, and
a sequence is checked by reading no more than it: a worker that draws sequences at random does not read whole shards.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastkd.cache.format import DamagedFileError, ShardEntry, checksum, publish

LENGTH_BYTES = 8  # of a safetensors file: the size of its JSON, little-endian


class Stored(NamedTuple):
    """A sequence as a shard has it."""

    digest: bytes
    ids: Tensor  # (tokens, k)
    log_probs: Tensor  # (tokens, k)


def write_shard(path: Path, sequences: Sequence[Stored]) -> ShardEntry:
    lengths = torch.tensor([0, *(len(sequence.ids) for sequence in sequences)])
    digests = [torch.frombuffer(bytearray(sequence.digest), dtype=torch.int64) for sequence in sequences]
    tensors = {
        "offsets": lengths.cumsum(0),
        "digests": torch.stack(digests),
        "checksums": torch.tensor([_checksum(sequence) for sequence in sequences]),
        "ids": torch.cat([sequence.ids for sequence in sequences]),
        "log_probs": torch.cat([sequence.log_probs for sequence in sequences]),
    }
    heads = []

    def write(part: Path) -> None:
        save_file(tensors, part)
        heads.append(_head(part))

    publish(path, write)
    return ShardEntry(
        file=path.name,
        bytes=path.stat().st_size,
        head_bytes=len(heads[0]),
        checksum=checksum(heads[0]),
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
    return int(checksum(sequence.ids.numpy(), sequence.log_probs.numpy()), 16)


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
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
        self._offsets = tensors["offsets"].tolist()
        self._checksums = tensors["checksums"].tolist()
        self._digests, self._ids, self._log_probs = tensors["digests"], tensors["ids"], tensors["log_probs"]
        self._checked = bytearray(entry.sequences)

    def read(self, position: int) -> Stored:
        """The sequence at a position, its tensors views of the file; checked when it is first read.

        Raises:
            DamagedFileError: it is not what was written.
        """
        start, stop = self._offsets[position], self._offsets[position + 1]
        found = Stored(self._digests[position].numpy().tobytes(), self._ids[start:stop], self._log_probs[start:stop])
        if not self._checked[position]:
            if _checksum(found) != self._checksums[position]:
                raise DamagedFileError(f"{self.path}: is damaged, the checksum of its sequence {position} is another")
            self._checked[position] = True
        return found
