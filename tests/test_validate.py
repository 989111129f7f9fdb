"""Every bad argument is refused with a message that names it, what came and what is allowed."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastkd

Z = torch.zeros(2, 3, 8)
LABELS = torch.zeros(2, 3, dtype=torch.int64)
MASK = torch.ones(2, 3, dtype=torch.bool)
JAGGED = torch.nested.nested_tensor([Z[0], Z[1, :2]], layout=torch.jagged)

# (changed arguments, type of the error, its message from the start)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student_logits": [[0.0]]}, TypeError, "student_logits: got list, must be a tensor"),
    ({"teacher_logits": None}, TypeError, "teacher_logits: got NoneType, must be a tensor"),
    ({"student_logits": SimpleNamespace(logits=Z)}, TypeError, "student_logits: got SimpleNamespace, must be a tensor"),
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
    ({"temperature": 1e30}, ValueError, "temperature: got 1e+30, must be <= 1e19: T² overflows float32"),
    ({"temperature": torch.rand(2, 3)}, TypeError, "temperature: got Tensor, must be a number; for one a row divide b"),
    ({"hard_weight": None}, ValueError, "hard_weight: got None with labels, must be a number"),
    ({"hard_weight": math.nan}, ValueError, "hard_weight: got nan, must be finite"),
    ({"hard_weight": "0.5"}, TypeError, "hard_weight: got str, must be a number"),
    ({"hard_weight": torch.nn.Parameter(torch.ones(()))}, TypeError, "hard_weight: got Parameter, must be a number; o"),
    ({"labels": None}, ValueError, "labels: got None with hard_weight=0.5, must be given"),
    ({"soft_weight": math.inf}, ValueError, "soft_weight: got inf, must be finite"),
    ({"soft_weight": None}, TypeError, "soft_weight: got NoneType, must be a number"),
    ({"soft_weight": torch.tensor(1.0)}, TypeError, "soft_weight: got Tensor, must be a number; one that learns"),
    ({"divergence": "kl"}, ValueError, "divergence: got 'kl', must be one of 'forward_kl', 'reverse_kl'"),
    ({"divergence": 0.5}, TypeError, "divergence: got 0.5, must be a name or a fastkd.Divergence"),
    ({"divergence": fastkd.JSD}, TypeError, "divergence: got <function JSD"),
    ({"label_smoothing": 1.0}, ValueError, "label_smoothing: got 1.0, must be in [0, 1)"),
    ({"label_smoothing": -0.1}, ValueError, "label_smoothing: got -0.1, must be in [0, 1)"),
    ({"label_smoothing": None}, TypeError, "label_smoothing: got NoneType, must be a number"),
    ({"z_loss_weight": math.nan}, ValueError, "z_loss_weight: got nan, must be finite"),
    ({"chunk_rows": 0}, ValueError, "chunk_rows: got 0, must be >= 1"),
    ({"chunk_rows": 1.0}, TypeError, "chunk_rows: got float, must be an int"),
    ({"labels": LABELS.int()}, TypeError, "labels: got torch.int32, must be torch.int64"),
    ({"labels": LABELS.tolist()}, TypeError, "labels: got list, must be a tensor"),
    ({"mask": MASK.long()}, TypeError, "mask: got torch.int64, must be torch.bool; an attention mask of 0 and 1 becom"),
    ({"mask": True}, TypeError, "mask: got bool, must be a tensor"),
    ({"soft_mask": MASK.int()}, TypeError, "soft_mask: got torch.int32, must be torch.bool; an attention mask of 0 an"),
    ({"soft_mask": MASK, "mask": MASK, "labels": None, "hard_weight": None}, ValueError, "mask: got one with soft_mas"),
    ({"token_weights": (MASK, MASK)}, TypeError, "token_weights: got tuple, must be a tensor; they weigh both terms:"),
    ({"token_weights": LABELS}, TypeError, "token_weights: got torch.int64, must be torch.float32 or torch.bfloat16"),
    ({"token_weights": torch.ones(2, 3, requires_grad=True)}, ValueError, "token_weights: got a tensor that requires"),
    ({"reduction": "batchmean"}, ValueError, "reduction: got 'batchmean', must be one of 'mean', 'sum', 'none'; 'mean"),
    ({"reduction": None}, ValueError, "reduction: got None, must be one of 'mean', 'sum', 'none'"),
    ({"num_items": -2.0}, ValueError, "num_items: got -2.0, must be >= 0"),
    ({"num_items": math.nan}, ValueError, "num_items: got nan, must be finite"),
    ({"num_items": "6"}, TypeError, "num_items: got str, must be a number"),
    ({"num_items": torch.tensor([6, 6])}, ValueError, "num_items: got shape (2,), must be a number or have one elemen"),
    ({"num_items": torch.tensor(True)}, TypeError, "num_items: got torch.bool, must be a number, or a tensor of an i"),
    ({"num_items": torch.tensor(6j)}, TypeError, "num_items: got torch.complex64, must be a number, or a tensor"),
    ({"num_items": (6, 6)}, TypeError, "num_items: got tuple, must be a number or a tensor"),
    ({"num_items": 6, "soft_mask": MASK}, TypeError, "num_items: got int, must be a pair with soft_mask, of the hard"),
    ({"num_items": (6, 6, 6), "soft_mask": MASK}, ValueError, "num_items: got 3, must be two, of the hard and of the"),
    ({"num_items": (6, -1), "soft_mask": MASK}, ValueError, "num_items: got -1, must be >= 0"),
    ({"num_items": torch.ones((), requires_grad=True)}, ValueError, "num_items: got a tensor that requires a grad"),
    ({"ignore_index": None}, TypeError, "ignore_index: got NoneType, must be an int"),
    ({"num_items": 6, "reduction": "sum"}, ValueError, "num_items: got a value with reduction='sum'"),
    ({"num_items": 6, "reduction": "none"}, ValueError, "num_items: got a value with reduction='none'"),
    ({"scale_soft_by_t2": "false"}, TypeError, "scale_soft_by_t2: got str, must be a bool"),
    ({"inplace_backward": 1}, TypeError, "inplace_backward: got int, must be a bool"),
    ({"return_parts": None}, TypeError, "return_parts: got NoneType, must be a bool"),
    ({"vocab_size": 0}, ValueError, "vocab_size: got 0, must be >= 1"),
    ({"vocab_size": 9}, ValueError, "vocab_size: got 9, must be in [1, 8]"),
    ({"vocab_size": 4.0}, TypeError, "vocab_size: got float, must be an int"),
    ({"vocab_size": True}, TypeError, "vocab_size: got bool, must be an int"),
    ({"backend": "cudnn"}, ValueError, "backend: got 'cudnn', must be one of 'cpu', 'cuda', 'torch', 'triton'"),
    ({"vocab_group": "tp"}, TypeError, "vocab_group: got str, must be a process group"),
    ({"teacher_logits": Z.to("meta")}, ValueError, "teacher_logits: got device meta, must be student_logits' cpu"),
    ({"labels": LABELS.to("meta")}, ValueError, "labels: got device meta, must be student_logits' cpu"),
    ({"mask": MASK.to("meta")}, ValueError, "mask: got device meta, must be student_logits' cpu"),
    ({"student_logits": Z.to_sparse()}, TypeError, "student_logits: got layout torch.sparse_coo, must be dense: to_de"),
    ({"teacher_logits": Z.to_sparse()}, TypeError, "teacher_logits: got layout torch.sparse_coo, must be dense: to_d"),
    ({"mask": MASK.to_sparse()}, TypeError, "mask: got layout torch.sparse_coo, must be dense: to_dense()"),
    ({"student_logits": JAGGED}, TypeError, "student_logits: got a nested tensor, must be dense; values() of a jagged"),
    ({"labels": JAGGED}, TypeError, "labels: got a nested tensor, must be dense; values() of a jagged one is (tokens,"),
    ({"alpha": 0.5}, TypeError, "kd_loss: got an unknown keyword 'alpha'; hard_weight is the cross-entropy's weight a"),
    ({"num_items_in_batch": 6}, TypeError, "kd_loss: got an unknown keyword 'num_items_in_batch'; it is num_items her"),
    ({"attention_mask": MASK}, TypeError, "kd_loss: got an unknown keyword 'attention_mask'; give mask=attention_mask"),
    ({"temprature": 2.0}, TypeError, "kd_loss: got an unknown keyword 'temprature'; did you mean 'temperature'?"),
    ({"qqq": 2.0}, TypeError, "kd_loss: got an unknown keyword 'qqq'; must be one of student_logits, teacher_logits,"),
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


@pytest.mark.parametrize("number", [Fraction, np.float32, np.float64], ids=lambda number: number.__name__)
def test_real_numbers_of_other_types(number: Any) -> None:
    names = ("temperature", "hard_weight", "soft_weight", "label_smoothing", "z_loss_weight", "num_items")
    assert call(**dict.fromkeys(names, number(0.5))) == call(**dict.fromkeys(names, 0.5))


@pytest.mark.parametrize("argument", ["labels", "mask", "soft_mask", "token_weights"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 3), (2, 1), (3, 2), (6,), (2, 3, 1), (1, 2, 3)], ids=str)
def test_nothing_broadcasts_over_rows(argument: str, shape: tuple[int, ...]) -> None:
    """Nor is anything reshaped."""
    values = {"labels": LABELS, "mask": MASK, "soft_mask": MASK, "token_weights": torch.ones(2, 3)}
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


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("kl", "'forward_kl' is KL(teacher‖student), 'reverse_kl' KL(student‖teacher)"),
        ("kl_div", "'forward_kl'"),
        ("rkl", "'reverse_kl'"),
        ("ce", "'cross_entropy'"),
        ("symmetric_kl", "fastkd.SymmetricKL(forward), whose forward weighs KL(teacher‖student)"),
        ("jeffreys", "half of it is fastkd.SymmetricKL(0.5)"),
        ("mixed", "fastkd.SymmetricKL(forward)"),
        ("jsd", "fastkd.JSD(beta), whose beta weighs the teacher"),
        ("skew_kl", "fastkd.SkewKL(lam)"),
    ],
)
def test_divergences_by_other_names(name: str, meant: str) -> None:
    """The refusal says what they are here."""
    with pytest.raises(ValueError, match=rf"^divergence: got '{name}', must be .*; [^;]*{re.escape(meant)}[^;]*$"):
        call(divergence=name)


def test_the_signature_shows_the_keywords_alone() -> None:
    """What is there to explain an unknown keyword is not one."""
    for function in (fastkd.kd_loss, fastkd.KDLoss, fastkd.KDLoss.forward):
        assert "unknown" not in inspect.signature(function).parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_temperature_whose_square_is_a_number(dtype: torch.dtype) -> None:
    """The largest: a finite loss and gradient."""
    student = torch.randn(2, 8, dtype=dtype, requires_grad=True)
    loss = fastkd.kd_loss(student, torch.zeros(2, 8, dtype=dtype), temperature=1e19)
    loss.backward()
    assert loss.isfinite() and student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("divergence", ["forward_kl", "tvd"])
def test_the_way_to_a_temperature_a_row(divergence: str) -> None:
    """That the refusal names: value and gradient of a call for each row."""
    student, teacher = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
    temperatures = torch.tensor([1.0, 2.0, 3.5])
    by_row = temperatures.unsqueeze(1)
    together = fastkd.kd_loss(
        student / by_row, teacher / by_row, divergence=divergence, reduction="sum", token_weights=temperatures**2
    )
    alone = sum(
        fastkd.kd_loss(student[row], teacher[row], divergence=divergence, temperature=temperature)
        for row, temperature in enumerate(temperatures.tolist())
    )
    torch.testing.assert_close(together, alone)
    torch.testing.assert_close(*(torch.autograd.grad(loss, student)[0] for loss in (together, alone)))


def test_dtensor() -> None:
    """Where it is copied to all ranks, as a tensor; refused with a student's that is none, and by other functions."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh

        logits = distribute_tensor(Z, init_device_mesh("cpu", (1,)), [Replicate()])
        with pytest.raises(TypeError, match=r"^student_logits: got Tensor with DTensors"):
            call(teacher_logits=logits)
        with pytest.raises(TypeError, match=r"^logits: got a DTensor, must be a tensor: full_tensor\(\), or"):
            fastkd.log_softmax(logits)
        assert torch.equal(call(student_logits=logits).full_tensor(), call())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap, torch.func.jacrev], ids=lambda t: t.__name__)
def test_transforms_of_torch_func(transform: Any, reduction: str) -> None:
    functions: tuple[Callable[[Tensor], Tensor], ...] = (
        lambda z: fastkd.kd_loss(z, torch.zeros(z.shape), reduction=reduction).sum(),
        lambda z: fastkd.log_softmax(z).sum(),
    )
    for function in functions:
        with pytest.raises(RuntimeError, match=r"^fastkd does not work within transforms of torch\.func .* backward"):
            transform(function)(Z)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript() -> None:
    """It cannot compile them, and says what can."""
    for module in (fastkd.KDLoss(), torch.nn.Sequential(fastkd.KDLoss())):
        with pytest.raises(RuntimeError, match=r"^KDLoss: got compiled by TorchScript, .*use torch\.compile"):
            torch.jit.script(module)
    with pytest.raises(torch.jit.frontend.NotSupportedError, match=r"use torch\.compile"):
        torch.jit.script(fastkd.kd_loss)


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
