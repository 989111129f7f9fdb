"""Every bad argument is refused with a message that names it, what came and what is allowed."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd

Z = torch.zeros(2, 3, 8)
LABELS = torch.zeros(2, 3, dtype=torch.int64)
MASK = torch.ones(2, 3, dtype=torch.bool)

# (changed arguments, type of the error, its message from the start)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student_logits": [[0.0]]}, TypeError, "student_logits: got list, must be a tensor"),
    ({"teacher_logits": None}, TypeError, "teacher_logits: got NoneType, must be a tensor"),
    ({"student_logits": Z.long()}, TypeError, "student_logits: got torch.int64, must be float32, bfloat16, float16 or"),
    ({"teacher_logits": Z.bool()}, TypeError, "teacher_logits: got torch.bool, must be float32, bfloat16, float16 or"),
    ({"student_logits": torch.tensor(0.0)}, ValueError, "student_logits: got shape (), must be (..., V) with V >= 1"),
    ({"teacher_logits": torch.zeros(2, 3, 0)}, ValueError, "teacher_logits: got shape (2, 3, 0), must be (..., V)"),
    ({"temperature": 0.0}, ValueError, "temperature: got 0.0, must be > 0"),
    ({"temperature": -1.0}, ValueError, "temperature: got -1.0, must be > 0"),
    ({"temperature": math.inf}, ValueError, "temperature: got inf, must be finite"),
    ({"temperature": math.nan}, ValueError, "temperature: got nan, must be finite"),
    ({"temperature": "2"}, TypeError, "temperature: got str, must be a number"),
    ({"temperature": True}, TypeError, "temperature: got bool, must be a number"),
    ({"temperature": torch.tensor(2.0)}, TypeError, "temperature: got Tensor, must be a number"),
    ({"hard_weight": None}, ValueError, "hard_weight: got None with labels, must be a number"),
    ({"hard_weight": math.nan}, ValueError, "hard_weight: got nan, must be finite"),
    ({"hard_weight": "0.5"}, TypeError, "hard_weight: got str, must be a number"),
    ({"labels": None}, ValueError, "labels: got None with hard_weight=0.5, must be given"),
    ({"soft_weight": math.inf}, ValueError, "soft_weight: got inf, must be finite"),
    ({"soft_weight": None}, TypeError, "soft_weight: got NoneType, must be a number"),
    ({"divergence": "kl"}, ValueError, "divergence: got 'kl', must be one of 'forward_kl', 'reverse_kl'"),
    ({"divergence": 0.5}, TypeError, "divergence: got 0.5, must be a name or a fastkd.Divergence"),
    ({"divergence": fastkd.JSD}, TypeError, "divergence: got <function JSD"),
    ({"label_smoothing": 1.0}, ValueError, "label_smoothing: got 1.0, must be in [0, 1)"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing: got -0.1, must be in [0, 1)"),
    ({"label_smoothing": None}, TypeError, "label_smoothing: got NoneType, must be a number"),
    ({"labels": LABELS.int()}, TypeError, "labels: got torch.int32, must be torch.int64"),
    ({"labels": LABELS.tolist()}, TypeError, "labels: got list, must be a tensor"),
    ({"mask": MASK.long()}, TypeError, "mask: got torch.int64, must be torch.bool"),
    ({"mask": True}, TypeError, "mask: got bool, must be a tensor"),
    ({"token_weights": LABELS}, TypeError, "token_weights: got torch.int64, must be torch.float32 or torch.bfloat16"),
    ({"token_weights": torch.ones(2, 3, requires_grad=True)}, ValueError, "token_weights: got a tensor that requires"),
    ({"reduction": "batchmean"}, ValueError, "reduction: got 'batchmean', must be one of 'mean', 'sum', 'none'"),
    ({"reduction": None}, ValueError, "reduction: got None, must be one of 'mean', 'sum', 'none'"),
    ({"num_items": 0}, ValueError, "num_items: got 0, must be > 0"),
    ({"num_items": -2.0}, ValueError, "num_items: got -2.0, must be > 0"),
    ({"num_items": math.nan}, ValueError, "num_items: got nan, must be finite"),
    ({"num_items": "6"}, TypeError, "num_items: got str, must be a number"),
    ({"num_items": torch.tensor([6])}, ValueError, "num_items: got shape (1,), must be a number or a 0-d tensor"),
    ({"num_items": torch.ones((), requires_grad=True)}, ValueError, "num_items: got a tensor that requires a grad"),
    ({"ignore_index": None}, TypeError, "ignore_index: got NoneType, must be an int"),
    ({"num_items": 6, "reduction": "sum"}, ValueError, "num_items: got a value with reduction='sum'"),
    ({"num_items": 6, "reduction": "none"}, ValueError, "num_items: got a value with reduction='none'"),
    ({"vocab_size": 0}, ValueError, "vocab_size: got 0, must be in [1, 8]"),
    ({"vocab_size": 9}, ValueError, "vocab_size: got 9, must be in [1, 8]"),
    ({"vocab_size": 4.0}, TypeError, "vocab_size: got float, must be an int"),
    ({"vocab_size": True}, TypeError, "vocab_size: got bool, must be an int"),
    ({"backend": "cudnn"}, ValueError, "backend: got 'cudnn', must be one of 'cpu', 'cuda', 'torch', 'triton'"),
    ({"teacher_logits": Z.to("meta")}, ValueError, "teacher_logits: got device meta, must be student_logits' cpu"),
    ({"labels": LABELS.to("meta")}, ValueError, "labels: got device meta, must be student_logits' cpu"),
    ({"mask": MASK.to("meta")}, ValueError, "mask: got device meta, must be student_logits' cpu"),
]  # fmt: skip


def call(**changes: Any) -> Any:
    arguments: dict[str, Any] = {"student_logits": Z, "teacher_logits": Z, "labels": LABELS, "hard_weight": 0.5}
    return fastkd.kd_loss(**arguments | changes)


def test_the_good_call() -> None:
    """What the cases below change one argument of."""
    assert call() == pytest.approx(0.5 * math.log(8), rel=1e-6)


@pytest.mark.parametrize(("changes", "kind", "message"), BAD, ids=[message[:45] for _, _, message in BAD])
def test_bad_argument(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(message)):
        call(**changes)


@pytest.mark.parametrize("argument", ["labels", "mask", "token_weights"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 3), (2, 1), (3, 2), (6,), (2, 3, 1), (1, 2, 3)], ids=str)
def test_nothing_broadcasts_over_rows(argument: str, shape: tuple[int, ...]) -> None:
    """Nor is anything reshaped."""
    values = {"labels": LABELS, "mask": MASK, "token_weights": torch.ones(2, 3)}
    value = values[argument].new_zeros(shape)
    message = f"{argument}: got shape {shape}, must be (2, 3), one entry a row of student_logits; nothing broadcasts"
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        call(**{argument: value})


@pytest.mark.parametrize("shape", [(8,), (3, 8), (1, 3, 8), (2, 1, 8), (6, 8), (2, 3, 1, 8)], ids=str)
def test_nothing_broadcasts_over_logits(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"teacher_logits: got shape {shape}, must match student_logits'")):
        call(teacher_logits=torch.zeros(shape))


@pytest.mark.parametrize("columns", [1, 7, 9])
def test_unequal_vocabularies(columns: int) -> None:
    """The message says both sizes and what to do."""
    message = f"teacher_logits: got a vocabulary of {columns}, student_logits has 8; .*vocab_size"
    with pytest.raises(ValueError, match=message):
        call(teacher_logits=torch.zeros(2, 3, columns))
    with pytest.raises(ValueError, match=re.escape(f"vocab_size: got 20, must be in [1, {min(columns, 8)}]")):
        call(teacher_logits=torch.zeros(2, 3, columns), vocab_size=20)


def test_keywords_are_keywords() -> None:
    """A fourth positional argument could be a temperature or a mask: neither is guessed."""
    with pytest.raises(TypeError, match="positional"):
        fastkd.kd_loss(Z, Z, LABELS, 2.0)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"logits": Z.long()}, TypeError, "logits: got torch.int64, must be float32"),
        ({"logits": torch.tensor(1.0)}, ValueError, "logits: got shape (), must be (..., V)"),
        ({"temperature": 0}, ValueError, "temperature: got 0, must be > 0"),
        ({"dtype": torch.int32}, TypeError, "dtype: got torch.int32, must be float32, bfloat16, float16 or float64"),
        ({"backend": "cudnn"}, ValueError, "backend: got 'cudnn', must be one of"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_log_softmax(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match="^" + re.escape(message)):
        fastkd.log_softmax(**{"logits": Z} | changes)


def leaf() -> Tensor:
    return torch.randn(2, 3, 8, requires_grad=True)


def retained(logits: Tensor) -> Tensor:
    logits.retain_grad()
    return logits


@pytest.mark.parametrize(
    ("student", "why"),
    [
        (leaf, "are a leaf tensor"),
        (lambda: (leaf() * 1)[:, :2], "are a view"),
        (lambda: (leaf() * 1).view(6, 8), "are a view"),
        (lambda: leaf().transpose(0, 1) * 1, "are not contiguous"),
        (lambda: retained(leaf() * 1), "retain their gradient"),
    ],
    ids=["leaf", "slice", "view", "transposed", "retained"],
)
def test_in_place_where_it_would_be_wrong(student: Any, why: str) -> None:
    logits = student()
    before = logits.clone()
    with pytest.raises(ValueError, match=f"^inplace_backward: got True, but student_logits {why}.*must be False here"):
        fastkd.kd_loss(logits, torch.zeros(logits.shape), inplace_backward=True)
    assert torch.equal(logits, before)


def test_in_place_of_nothing() -> None:
    """Two empty tensors share no memory, though both are nowhere."""
    student = torch.empty(0, 8, requires_grad=True)
    fastkd.kd_loss(student * 1, torch.empty(0, 8), inplace_backward=True).backward()
    assert student.grad is not None and student.grad.shape == (0, 8)


@pytest.mark.parametrize("of", ["itself", "detached", "a_view"])
def test_in_place_over_the_teacher(of: str) -> None:
    student = leaf() * 1
    teacher = {"itself": student, "detached": student.detach(), "a_view": student.detach().view(2, 3, 8)}[of]
    with pytest.raises(ValueError, match=r"^inplace_backward: got True, but student_logits share memory with t"):
        fastkd.kd_loss(student, teacher, inplace_backward=True)
