"""Ranks that do not make the same call: all of them raise, and say which differs. None waits for another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed import ProcessGroup

import fastkd
from tests.cases import inputs
from tests.distributed.ranks import Ranks


def call(group: ProcessGroup, odd: dict[str, Any], rows: int = 6, dtype: torch.dtype = torch.float32) -> Any:
    """What is raised, on a rank whose arguments these are, or None; and then a loss that must still be right."""
    torch.manual_seed(0)
    student, teacher, labels = inputs((rows,), 20, dtype)
    keywords = {"hard_weight": 0.5, "labels": labels, "teacher_logits": teacher, "backend": "torch"} | odd
    raised = None
    try:
        fastkd.kd_loss(student, **keywords, vocab_group=group)
    except (RuntimeError, ValueError, TypeError) as error:
        raised = f"{type(error).__name__}: {error}"
    ones = torch.zeros(2, 5)
    return raised, fastkd.kd_loss(ones, ones, vocab_group=group, backend="torch").item()


def one_differs(group: ProcessGroup, odd: dict[str, Any], rows: int, dtype: torch.dtype) -> Any:
    if group.rank() == 1:
        return call(group, odd, rows, dtype)
    return call(group, {})


FAULTS: dict[str, tuple[dict[str, Any], int, torch.dtype, str]] = {
    "rows": ({}, 7, torch.float32, "rank 1 .* in rows: 7 and 6"),
    "dtype": ({}, 6, torch.bfloat16, "rank 1 .* in student_dtype: torch.bfloat16 and torch.float32"),
    "wider": ({}, 6, torch.float64, "rank 1 .* in student_dtype: torch.float64 and torch.float32"),
    "temperature": ({"temperature": 3.0}, 6, torch.float32, "rank 1 .* in temperature: 3 and 1"),
    "divergence": ({"divergence": "tvd"}, 6, torch.float32, "rank 1 .* in formula: 2 and 0"),
    "number": ({"divergence": fastkd.JSD(0.3)}, 6, torch.float32, "rank 1 .* in c_t: 0.3 and 1"),
    "terms": ({"labels": None, "hard_weight": None}, 6, torch.float32, "rank 1 .* in terms"),
    "vocab_size": ({"vocab_size": 30}, 6, torch.float32, "rank 1 .* in vocab_size: 30 and"),
    "labels": ({"labels": torch.zeros(6, dtype=torch.int64)}, 6, torch.float32, "rank 1 .* other rows than rank 0"),
    "listed": (
        {"teacher_logits": fastkd.TopK(torch.zeros(6, 1).long(), torch.zeros(6, 1))},
        6,
        torch.float32,
        "rank 1 .* in operation: rest_rows and kd_rows",
    ),
    "weights": ({"token_weights": torch.full((6,), 2.0)}, 6, torch.float32, "rank 1 .* other rows than rank 0"),
}


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("size", [2, 3])
def test_another_call(ranks: Ranks, name: str, size: int) -> None:
    odd, rows, dtype, message = FAULTS[name]
    for raised, loss in ranks.run(one_differs, odd, rows, dtype, size=size):
        assert raised is not None and raised.startswith("RuntimeError"), raised
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(raised)
        assert loss == 0.0


@pytest.mark.parametrize(
    ("odd", "message"),
    [({"temperature": -1.0}, "temperature"), ({"teacher_logits": torch.zeros(6, 21)}, "slices of as many columns"),
     ({"labels": torch.full((6,), 77)}, "labels: got 77"), ({"backend": "none"}, "backend: got 'none'"),
     ({"backend": "cuda"}, "backend 'cuda' cannot run here"), ({"temp": 2.0}, "it is temperature here")],
)  # fmt: skip
def test_a_bad_argument_of_one_rank(ranks: Ranks, odd: dict[str, Any], message: str) -> None:
    """It raises what is wrong, and the others that it did."""
    results = ranks.run(one_differs, odd, 6, torch.float32, size=3)
    for rank, (raised, loss) in enumerate(results):
        assert raised is not None
        assert (message if rank == 1 else "rank 1 of the group has raised") in raised
        assert loss == 0.0


def other_tails(group: ProcessGroup) -> Any:
    teacher = fastkd.TopK(torch.zeros(6, 1).long(), torch.zeros(6, 1), tail="truncate" if group.rank() else "bucket")
    return call(group, {"teacher_logits": teacher})


def test_another_tail(ranks: Ranks) -> None:
    """Of which one exchanges less than the other."""
    for raised, loss in ranks.run(other_tails, size=2):
        assert raised is not None and "in terms" in raised
        assert loss == 0.0


def chunks(group: ProcessGroup, differ: Callable[[int], dict[str, Any]]) -> str | None:
    torch.manual_seed(0)
    source = fastkd.LinearLogits(torch.randn(10, 4), torch.randn(6, 4))
    keywords = differ(group.rank())
    rows = keywords.pop("rows", 10)
    source = source._replace(hidden=source.hidden[:rows].requires_grad_(keywords.pop("learns", True)))
    try:
        fastkd.kd_loss(source, source, vocab_group=group, backend="torch", **keywords)
    except RuntimeError as error:
        return str(error)
    return None


def other_rows(rank: int) -> dict[str, Any]:
    return {"chunk_rows": 4, "rows": 8 if rank else 10}


def other_chunks(rank: int) -> dict[str, Any]:
    return {"chunk_rows": 5 if rank else 4}


def no_rows(rank: int) -> dict[str, Any]:
    return {"labels": torch.full((10,), -100 if rank else 2), "hard_weight": 0.5}


def other_gradients(rank: int) -> dict[str, Any]:
    return {"learns": rank == 0}


@pytest.mark.parametrize(
    ("differ", "message"),
    [
        (other_rows, "in rows_in_all: 8 and 10"),
        (other_chunks, "in rows: 5 and 4"),
        (other_gradients, "in terms"),
        (no_rows, "in rows: 0 and 10"),
    ],
)
def test_another_number_of_exchanges(ranks: Ranks, differ: Callable[[int], dict[str, Any]], message: str) -> None:
    """Chunks that begin alike, of fewer rows on one rank; a sum of gradients that one rank would not take part in."""
    for raised in ranks.run(chunks, differ, size=2):
        assert raised is not None and message in raised, raised
