"""Batches of a user's own dataset, with their teacher."""

from __future__ import annotations

from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Subset

import fastkd
from fastkd import cache
from tests.cache.sequences import check, sequence, write

COUNT = 13


def rows() -> list[dict[str, Any]]:
    """Lists, as ``datasets`` of Hugging Face has them, and columns that are no tensors."""
    return [
        {"input_ids": sequence(number)[0].tolist(), "labels": [number] * len(sequence(number)[0]), "text": str(number)}
        for number in range(COUNT)
    ]


@pytest.fixture
def stored(tmp_path: Path) -> cache.Cache:
    write(tmp_path, range(COUNT))
    return cache.Cache(tmp_path)


def check_epoch(loader: DataLoader[Any]) -> None:
    """Every row once, each with its teacher."""
    numbers = []
    for batch in loader:
        teacher = batch["teacher"]
        assert isinstance(teacher, fastkd.TopK)
        for row, mask in enumerate(batch["attention_mask"].bool()):
            tokens = batch["input_ids"][row, mask]
            number = next(number for number in range(COUNT) if torch.equal(sequence(number)[0], tokens))
            check(teacher._replace(ids=teacher.ids[row, mask], log_probs=teacher.log_probs[row, mask]), number)
            assert (teacher.ids[row, ~mask] == -1).all()
            numbers.append(number)
    assert sorted(numbers) == list(range(COUNT))


def left_padded(rows: list[dict[str, Any]]) -> UserDict[str, Any]:
    """A collator of the user's, such as those of transformers, which return no plain dictionary."""
    batch = cache.dataset.pad([{"input_ids": row["input_ids"][::-1]} for row in rows])
    return UserDict({name: tensor.flip(1) for name, tensor in batch.items()})


@pytest.mark.parametrize(("workers", "start"), [(0, None), (2, "fork"), (1, "spawn")])
def test_loading(stored: cache.Cache, workers: int, start: str | None) -> None:
    data = cache.CachedDataset(rows(), stored)
    check_epoch(DataLoader(data, 4, shuffle=True, num_workers=workers, collate_fn=data.collate,
                           multiprocessing_context=start))  # fmt: skip


def test_padding(stored: cache.Cache) -> None:
    """By default to the right, labels with what a loss ignores; by a collator of the user's as that has it."""
    data = cache.CachedDataset(rows(), stored)
    batch = data.collate([data[0], data[4]])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "teacher"}
    assert batch["labels"].tolist() == [[0, 0, 0, -100, -100, -100, -100], [4] * 7]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0, 0], [1] * 7]
    left = cache.CachedDataset(rows(), stored, left_padded)
    batch = left.collate([left[0], left[4]])
    assert batch["attention_mask"].tolist() == [[0, 0, 0, 0, 1, 1, 1], [1] * 7]
    check_epoch(DataLoader(left, 4, collate_fn=left.collate))
    first_empty = cache.pad([{"input_ids": []}, {"input_ids": [3]}])["input_ids"]
    assert first_empty.tolist() == [[0], [3]] and first_empty.dtype == torch.int64


def test_other_rows_are_refused(stored: cache.Cache) -> None:
    """Where the dataset is not the one that the teacher read: by its length, or by its tokens."""
    with pytest.raises(ValueError, match=r"cache: got 13 sequences, must be one of each of 26 rows; .* a Subset"):
        cache.CachedDataset(rows() * 2, stored)
    data = cache.CachedDataset(rows()[::-1], stored)
    with pytest.raises(ValueError, match="input_ids: row 1 is not what the teacher read as sequence 2"):
        data.collate([data[6], data[2]])


def test_a_part_of_the_rows(stored: cache.Cache) -> None:
    data = cache.CachedDataset(rows(), stored)
    loader = DataLoader(Subset(data, [3, 7]), 2, collate_fn=data.collate)
    assert next(iter(loader))["labels"][:, 0].tolist() == [3, 7]


def test_rows_from_the_end(stored: cache.Cache) -> None:
    """Of the rows, where the cache has more."""
    data = cache.CachedDataset(rows()[:5], stored)
    batch = data.collate([data[-1], data[-5]])
    assert batch["labels"][:, 0].tolist() == [4, 0]
    check(batch["teacher"]._replace(ids=batch["teacher"].ids[0], log_probs=batch["teacher"].log_probs[0]), 4)
