"""Writing a cache."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor
from typing_extensions import Self

from fastkd import _sparse, _validate
from fastkd.cache import format, tokens
from fastkd.cache.format import Header, Index
from fastkd.cache.shard import Stored, write_shard
from fastkd.sources import TopK

LOG_PROBS = {torch.float16: "float16", torch.float32: "float32"}


class Writer:
    """Writes a cache, or goes on with one that another writer, killed or finished, left at ``path``.

    ``len(writer)`` is how many sequences its rank has on disk or in memory: where to go on. Sequences reach the disk a
    shard at a time; a writer that is killed loses those of the shard that it had begun. Used in a ``with`` statement
    it closes itself, also after an exception.

    With several processes each is the writer of a rank, one at a time, and sequence j of rank r is number
    ``r + j·world_size`` of the cache: what ``DistributedSampler(shuffle=False)`` gives the rank, in that order.

    Args:
        path: the folder of the cache; made if it is not there.
        k: how many tokens a row has.
        temperature: at which the log-probabilities are.
        vocab_size: ids lie in [0, vocab_size).
        teacher: the teacher's name, for whoever finds the cache.
        tail: as :class:`fastkd.TopK` has it.
        dtype: of the log-probabilities on disk: ``torch.float16``, whose rounding changes a probability by no more than
            a factor of 1 ± 2⁻¹¹·log p, or ``torch.float32``.
        shard_bytes: a shard is written when it has as many.
        rank, world_size: of this process.

    Raises:
        ValueError, TypeError: a bad argument, or one that differs from that of the cache at ``path``; the message names
            it, what came and what is allowed.
        DamagedFileError: the index at ``path`` is damaged.

    Example:
        >>> import tempfile, torch, fastkd
        >>> from fastkd import cache
        >>> input_ids = torch.tensor([5, 3, 8])
        >>> topk = fastkd.TopK(torch.tensor([[3, 1], [8, 0], [2, 9]]), torch.tensor([[0.7, 0.2]] * 3).log())
        >>> path = tempfile.mkdtemp()
        >>> with cache.Writer(path, k=2, temperature=1.0, vocab_size=10, teacher="mine") as writer:
        ...     writer.add(input_ids, topk)
        >>> cache.Cache(path).batch([0], input_ids[None]).ids.tolist()
        [[[3, 1], [8, 0], [2, 9]]]
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        k: int,
        temperature: float,
        vocab_size: int,
        teacher: str,
        tail: str = "bucket",
        dtype: torch.dtype = torch.float16,
        shard_bytes: int = 2**27,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        _validate.check_temperature(temperature)
        _validate.check_one_of("tail", tail, _validate.TAILS)
        numbers = {"k": k, "vocab_size": vocab_size, "shard_bytes": shard_bytes, "rank": rank, "world_size": world_size}
        for name, value in numbers.items():
            _validate.check_int(name, value)
        k, vocab_size, shard_bytes, rank, world_size = map(int, numbers.values())  # JSON has none of NumPy's
        if not isinstance(teacher, str):
            raise TypeError(f"teacher: got {type(teacher).__name__}, must be a string, the teacher's name")
        if not 1 <= k <= vocab_size < 2**31:
            raise ValueError(f"k, vocab_size: got {k} and {vocab_size}, must be 1 <= k <= vocab_size < 2³¹")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: got {rank}, must be in [0, {world_size}), world_size being {world_size}")
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes: got {shard_bytes}, must be >= 1")
        if dtype not in LOG_PROBS:
            raise TypeError(f"dtype: got {dtype}, must be torch.float16 or torch.float32")
        self._folder = Path(path)
        self._shard_bytes, self._dtype = shard_bytes, dtype
        ids = "uint16" if vocab_size < 2**16 else "uint32"  # one value is padding's
        header = Header(k, float(temperature), vocab_size, teacher, tail, ids, LOG_PROBS[dtype], world_size)
        self._index = self._resumed(Index(header, rank, ()))
        self._pending: list[Stored] = []
        self._pending_bytes = 0

    def _resumed(self, index: Index) -> Index:
        """The one that is there, if it is of such a cache; a rank's index is there from its start."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in format.index_paths(self._folder):
            there = format.read_index(path)
            for name, value in vars(index.header).items():
                if (other := getattr(there.header, name)) != value:
                    raise ValueError(f"{name}: got {value!r}, the cache at {self._folder} has {other!r}")
            if there.rank == index.rank:
                index = there
        self._publish(index)
        return index

    def __len__(self) -> int:
        return sum(shard.sequences for shard in self._index.shards) + len(self._pending)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()

    def add(self, input_ids: Tensor, topk: TopK, mask: Tensor | None = None) -> None:
        """Add a sequence, or a batch of them.

        Args:
            input_ids: ``(length,)`` or ``(batch, length)``, int64 or int32: what the teacher read.
            topk: what it said at each, ``(length, k)`` or ``(batch, length, k)``; nothing is shifted.
            mask: ``(batch, length)`` bool: where the tokens of each sequence are. The rest is padding, on either side,
                and not stored.

        Raises:
            ValueError, TypeError: a bad argument, log-probabilities of a mass above 1 or NaN among them; the message
                names it, what came and what is allowed.
        """
        if not isinstance(topk, TopK):
            raise TypeError(f"topk: got {type(topk).__name__}, must be a fastkd.TopK")
        ids, log_probs, temperature, tail = topk
        _validate.check_ids("topk.ids", ids)
        _validate.check_logits("topk.log_probs", log_probs, "k")
        if isinstance(input_ids, Tensor) and input_ids.dim() == 1:
            input_ids, ids, log_probs = input_ids[None], ids[None], log_probs[None]
            mask = mask if mask is None else mask[None]
        tokens.check_batch(input_ids, mask)
        header = self._index.header
        shape = (*input_ids.shape, header.k)
        for name, given in (("topk.ids", ids), ("topk.log_probs", log_probs)):
            if given.shape != shape:
                raise ValueError(f"{name}: got shape {tuple(given.shape)}, must be {shape}, k a token")
        if (temperature, tail) != (header.temperature, header.tail):
            raise ValueError(
                f"topk: got temperature {temperature} and tail {tail!r}, must be the writer's {header.temperature} and "
                f"{header.tail!r}"
            )
        where = tokens.runs(input_ids, mask)
        listed, given = (t.flatten(0, 1) if mask is None else t[mask.to(t.device)] for t in (ids, log_probs))
        if listed.numel() and not -1 <= int(listed.min()) <= int(listed.max()) < header.vocab_size:
            raise ValueError(
                f"topk.ids: got {int(listed.min())} to {int(listed.max())}, must be in [0, {header.vocab_size}), or -1"
            )
        _sparse.check_mass(listed, given)
        read = tokens.on_cpu(input_ids)
        # Copies: what is the caller's may change before it is written. -1 becomes what has all bits set.
        stored_ids = ids.to("cpu").numpy().astype(header.ids)
        stored_log_probs = log_probs.detach().to("cpu", self._dtype, copy=True).numpy()
        for row, (start, stop) in enumerate(where):
            run = (row, slice(start, stop))
            found = Stored(tokens.digest(read[run]), stored_ids[run], stored_log_probs[run])
            self._pending.append(found)
            self._pending_bytes += found.ids.nbytes + found.log_probs.nbytes
            if self._pending_bytes >= self._shard_bytes:
                self.flush()

    def flush(self) -> None:
        """Write what has been added so far, as a shard of its own, however small."""
        if not self._pending:
            return
        shards = self._index.shards
        name = format.shard_name(self._index.rank, len(shards))
        entry = write_shard(self._folder / name, self._pending)
        self._publish(Index(self._index.header, self._index.rank, (*shards, entry)))
        self._pending, self._pending_bytes = [], 0

    def _publish(self, index: Index) -> None:
        format.write_index(self._folder / format.index_name(index.rank), index)
        self._index = index
