"""A user's own dataset with what the teacher said of each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from fastkd.cache.reader import Cache

Row = Mapping[str, Any]
# Of what rows hold a value a token, what padding is.
PADDING = {"input_ids": 0, "attention_mask": 0, "labels": -100}


class Rows(Protocol):
    """A dataset of rows with ``input_ids``: a list, a ``torch.utils.data.Dataset``, one of Hugging Face's."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


class CachedDataset(Dataset[tuple[int, Row]]):
    """A dataset whose row i the teacher read as sequence i of a cache, and the ``collate_fn`` that goes with it.

    ``DataLoader(cached, batch_size, collate_fn=cached.collate)`` gives the batches that ``collate`` makes of the rows,
    with a :class:`fastkd.TopK` as ``"teacher"``, ``(batch, length, k)``. Workers may be forked or spawned, and shuffle.

    Args:
        rows: a dataset of dictionaries with ``input_ids``, a list or a tensor, such as Hugging Face ``datasets`` has.
        cache: of as many sequences, or more.
        collate: makes a batch of a list of rows, with ``input_ids`` (batch, length), and where tokens are padded on the
            left, or are cut, an ``attention_mask``: such as ``transformers.DataCollatorWithPadding``. By default
            :func:`pad`.

    Raises:
        ValueError: the cache has fewer sequences than there are rows. In ``collate``: what :meth:`Cache.batch` raises.

    Example:
        >>> import tempfile, torch, fastkd
        >>> from fastkd import cache
        >>> rows, path = [{"input_ids": [5, 3]}, {"input_ids": [4, 0, 1]}], tempfile.mkdtemp()
        >>> with cache.Writer(path, k=1, temperature=1.0, vocab_size=10, teacher="mine") as writer:
        ...     for row in rows:
        ...         input_ids = torch.tensor(row["input_ids"])
        ...         writer.add(input_ids, fastkd.TopK(input_ids[:, None], torch.zeros(len(input_ids), 1)))
        >>> data = cache.CachedDataset(rows, cache.Cache(path))
        >>> batch = next(iter(torch.utils.data.DataLoader(data, batch_size=2, collate_fn=data.collate)))
        >>> batch["input_ids"].tolist(), batch["teacher"].ids[..., 0].tolist()
        ([[5, 3, 0], [4, 0, 1]], [[5, 3, -1], [4, 0, 1]])
    """

    def __init__(self, rows: Rows, cache: Cache, collate: Callable[[list[Row]], Any] | None = None) -> None:
        if len(cache) < len(rows):
            raise ValueError(
                f"cache: got {len(cache)} sequences, must be one of each of {len(rows)} rows; where its writer has not "
                "come to the end, give a Subset of the rows"
            )
        self.rows, self.cache = rows, cache
        self._collate: Callable[[list[Row]], Any] = collate or pad

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Row]:
        return range(len(self))[index], self.rows[index]  # a negative one counts from the last row

    def collate(self, items: Sequence[tuple[int, Row]]) -> Any:
        """The batch of numbered rows."""
        indices, rows = zip(*items, strict=True)
        batch = self._collate(list(rows))
        mask = batch.get("attention_mask")
        batch["teacher"] = self.cache.batch(indices, batch["input_ids"], None if mask is None else mask.bool())
        return batch


def pad(rows: Sequence[Row]) -> dict[str, Tensor]:
    """``input_ids`` and, where rows have them, ``labels``, padded on the right, with the ``attention_mask``."""
    rows = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in rows]
    return {
        name: pad_sequence([_integers(row[name]) for row in rows], batch_first=True, padding_value=padding)
        for name, padding in PADDING.items()
        if name in rows[0]
    }


def _integers(values: Any) -> Tensor:
    tensor = torch.as_tensor(values)
    return tensor if tensor.numel() else tensor.long()  # of an empty list PyTorch makes floats
