"""Reading a cache."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastkd import _validate
from fastkd.cache import format, tokens
from fastkd.cache.format import DamagedFileError, ShardEntry
from fastkd.cache.shard import Shard, Stored, padding
from fastkd.sources import TopK


class Cache:
    """A cache on disk, as it is now: what a writer adds later is not seen.

    ``len(cache)`` is how many sequences there are from number 0 on; where several writers were stopped midway, later
    ones may be there too, which are not counted, and no number reaches them. Shards are mapped into memory when they
    are first needed, and a sequence is checked when a process first reads it. A cache can be given to worker processes,
    which map it themselves.

    Args:
        path: its folder.

    Raises:
        FileNotFoundError: there is no cache at ``path``.
        DamagedFileError: an index is damaged, or they are not of one cache; the message names it. A damaged shard is
            found when a sequence of it is read, and keeps nobody from reading others.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        names = format.index_paths(self.path)
        if not names:
            raise FileNotFoundError(f"{self.path}: there is no cache, a writer makes {format.index_name(0)} at once")
        indexes = {name: format.read_index(name) for name in names}
        self.header = indexes[names[0]].header
        for name, index in indexes.items():
            if index.header != self.header or name.name != format.index_name(index.rank):
                raise DamagedFileError(f"{name}: is of another cache than {names[0].name}")
        self._indexes = {index.rank: index for index in indexes.values()}
        # Of each rank, the number among its sequences with which each shard begins, and in the end how many there are.
        self._starts = {
            rank: [0, *accumulate(shard.sequences for shard in index.shards)] for rank, index in self._indexes.items()
        }
        ranks = range(self.header.world_size)
        self._len = min(rank + self._starts.get(rank, [0])[-1] * len(ranks) for rank in ranks)
        self._shards: dict[str, Shard] = {}

    def __len__(self) -> int:
        return self._len

    def __reduce__(self) -> tuple[type[Cache], tuple[Path]]:
        return Cache, (self.path,)

    def shards(self) -> Iterator[ShardEntry]:
        """What the indexes say of all shards, rank by rank."""
        for rank in sorted(self._indexes):
            yield from self._indexes[rank].shards

    def open(self, entry: ShardEntry) -> Shard:
        """A shard, mapped once.

        Raises:
            DamagedFileError: it is damaged.
        """
        if entry.file not in self._shards:
            self._shards[entry.file] = Shard(self.path / entry.file, entry)
        return self._shards[entry.file]

    def __getitem__(self, number: int) -> tuple[bytes, TopK]:
        """A sequence's digest (16 bytes) and what the teacher said: ``(length, k)``, int32 ids and the stored dtype.

        Raises:
            IndexError: there is no such sequence.
            DamagedFileError: it is damaged on disk.
        """
        _validate.check_int("index", number)
        found = self._read(number + len(self) if -len(self) <= number < 0 else number)
        ids, log_probs = self._empty(len(found.ids))
        _fill(ids.numpy(), log_probs.numpy(), 0, found)
        return found.digest, self._topk(ids, log_probs)

    def batch(self, indices: Sequence[int] | Tensor, input_ids: Tensor, mask: Tensor | None = None) -> TopK:
        """What the teacher said of a padded batch: ``(batch, length, k)``, on the device of ``input_ids``.

        Padding gets ids of -1 and log-probabilities of -inf: such rows are not to count in a loss.

        Args:
            indices: the batch's numbers in the cache.
            input_ids: ``(batch, length)`` int64 or int32, padded on either side.
            mask: ``(batch, length)`` bool, where its tokens are; without it each row begins with its sequence, and what
                comes after is taken for padding.

        Raises:
            ValueError: a sequence is not the one that the teacher read; the message says which.
            ValueError, TypeError: a bad argument.
            IndexError: there is no such sequence.
            DamagedFileError: a file is damaged; the message names it.
        """
        tokens.check_batch(input_ids, mask)
        if not isinstance(indices, Iterable):
            raise TypeError(f"indices: got {type(indices).__name__}, must be a sequence of ints")
        numbers = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        if len(numbers) != len(input_ids):
            raise ValueError(f"indices: got {len(numbers)}, must be {len(input_ids)}, one a row of input_ids")
        read = tokens.on_cpu(input_ids)
        ids, log_probs = self._empty(*read.shape)
        rows = zip(numbers, read, ids.numpy(), log_probs.numpy(), tokens.runs(input_ids, mask), strict=True)
        for row, (number, row_read, row_ids, row_log_probs, (start, stop)) in enumerate(rows):
            found = self._read(number)
            length = len(found.ids)
            if mask is None:
                stop = min(stop, length)
            if stop - start != length or tokens.digest(row_read[start:stop]) != found.digest:
                raise ValueError(
                    f"input_ids: row {row} is not what the teacher read as sequence {number} ({length} tokens)"
                )
            _fill(row_ids, row_log_probs, start, found)
        return self._topk(ids.to(input_ids.device), log_probs.to(input_ids.device))

    def _read(self, number: int) -> Stored:
        _validate.check_int("index", number)
        if not 0 <= number < len(self):
            raise IndexError(f"index: got {number}, the cache at {self.path} has {len(self)} sequences")
        among, rank = divmod(number, self.header.world_size)
        starts = self._starts[rank]
        shard = bisect_right(starts, among) - 1
        return self.open(self._indexes[rank].shards[shard]).read(among - starts[shard])

    def _empty(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities on the CPU, whatever PyTorch's default device is."""
        ids = torch.empty(*shape, self.header.k, dtype=torch.int32, device="cpu")
        return ids, torch.empty_like(ids, dtype=getattr(torch, self.header.log_probs))

    def _topk(self, ids: Tensor, log_probs: Tensor) -> TopK:
        return TopK(ids, log_probs, self.header.temperature, self.header.tail)


def _fill(ids: NDArray[np.int32], log_probs: NDArray[Any], start: int, found: Stored) -> None:
    """A row of a batch, (length, k): the sequence begins at ``start``, and padding is around it."""
    stop = start + len(found.ids)
    ids[:start], ids[stop:] = -1, -1
    log_probs[:start], log_probs[stop:] = -np.inf, -np.inf
    log_probs[start:stop] = found.log_probs
    ids[start:stop] = found.ids  # uint32's padding is -1 then, and uint16's is not yet
    if found.padded:
        ids[ids == padding(found.ids)] = -1
