"""Every backend on teachers who list a few tokens, against the reference."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import LinearLogits, TopK, _dispatch
from tests import reference
from tests.assertions import check_gradient, check_loss, same_bits
from tests.backends.test_linear import leaves, source, tensors, whole
from tests.cases import DIVERGENCES, DTYPES, STRUCTURES, inputs, without_last

TAILS = ("bucket", "renormalize", "support", "truncate")
BOTH = {"hard_weight": 0.3, "soft_weight": 0.7}
COLUMNS, K = 131, 6


@pytest.fixture(autouse=True)
def skip_without(backend: str, device: str) -> None:
    if why := _dispatch.refusal(torch.zeros(1, 1, device=device), backend, None, "rest_rows"):
        pytest.skip(why)


def skip_unsupported(backend: str, device: str, dtype: torch.dtype) -> None:
    if why := _dispatch.refusal(torch.zeros(1, 1, dtype=dtype, device=device), backend, None, "rest_rows"):
        pytest.skip(why)


def listed(logits: Tensor, k: int = K, temperature: float = 2.0, tail: str = "bucket", padding: bool = True) -> TopK:
    """The k most probable and, with ``padding``, of the first row one less, in any order."""
    log_probs, ids = torch.log_softmax(logits.float() / temperature, -1).topk(k)
    if padding and k > 1:
        ids.view(-1, k)[0, k // 2] = -1
        log_probs.view(-1, k)[0, k // 2] = 7.0  # whatever
    return TopK(ids, log_probs, temperature, tail)


def allowed(name: str, tail: str) -> bool:
    return tail != "renormalize" or not reference.is_infinite_without_mass(DIVERGENCES[name].definition)


def check(
    student: Tensor, teacher: TopK, labels: Tensor | None = None, *, backend: str, divergence: str = "forward_kl",
    **keys: Any,
) -> Tensor:  # fmt: skip
    """Loss and gradient agree with the reference; the inputs stay as they were. Gives the gradient."""
    before = [t.clone() for t in (student, *teacher[:2])]
    leaf, exact = student.detach().requires_grad_(), student.detach().double().requires_grad_()
    member = DIVERGENCES[divergence]
    keys["temperature"] = teacher.temperature
    loss = fastkd.kd_loss(leaf, teacher, labels, backend=backend, divergence=member.argument, **keys)
    grad_output = torch.rand_like(loss) + 0.5 if loss.dim() else torch.ones_like(loss)
    (grad,) = torch.autograd.grad(loss, leaf, grad_output)
    of_teacher = reference.Listed(teacher.ids, teacher.log_probs, teacher.tail)
    expected = reference.kd_loss(exact, of_teacher, labels, divergence=member.definition, **keys).loss
    (expected_grad,) = torch.autograd.grad(expected, exact, grad_output.double())
    assert loss.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    assert grad.dtype == student.dtype
    check_loss(loss.detach(), expected.detach())
    check_gradient(grad, expected_grad)
    for tensor, copy in zip((student, *teacher[:2]), before, strict=True):
        assert same_bits(tensor, copy), "an input was written"
    return grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail", TAILS)
def test_grid(backend: str, device: str, tail: str, dtype: torch.dtype) -> None:
    """Labels inside and outside the K; every structure and reduction."""
    skip_unsupported(backend, device, dtype)
    for name, reduction in zip(STRUCTURES, cycle(("mean", "none", "sum"))):
        if allowed(name, tail):
            student, logits, labels = inputs((2,), COLUMNS, dtype, device=device)
            teacher = listed(logits, tail=tail)
            labels[0] = teacher.ids[0, 0]
            check(student, teacher, labels, backend=backend, divergence=name, reduction=reduction, **BOTH)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_alone(backend: str, device: str, name: str) -> None:
    student, logits, _ = inputs((2,), COLUMNS, device=device)
    for tail, temperature, reduction in zip(TAILS, (1.0, 1.7, 3.0, 0.5), cycle(("none", "mean"))):
        if allowed(name, tail):
            check(
                student,
                listed(logits, temperature=temperature, tail=tail),
                backend=backend,
                divergence=name,
                reduction=reduction,
            )


@pytest.mark.parametrize("tail", TAILS)
def test_k(backend: str, device: str, tail: str) -> None:
    """One token, all but one, and all, where nothing is left: in one vocabulary of one token, too."""
    for columns, k in ((COLUMNS, 1), (COLUMNS, COLUMNS - 1), (COLUMNS, COLUMNS), (2, 1), (1, 1)):
        for name in ("forward_kl", "reverse_kl", "jsd(0.5)"):
            if allowed(name, tail):
                student, logits, labels = inputs((1,), columns, device=device)
                teacher = listed(logits, k, tail=tail, padding=False)
                check(student, teacher, labels, backend=backend, divergence=name, **BOTH)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtype_of_the_log_probabilities(backend: str, device: str, dtype: torch.dtype) -> None:
    """Whose sum rounding may bring over 1; int32 and int64 ids."""
    student, logits, labels = inputs((2,), COLUMNS, device=device)
    teacher = listed(logits, 64)
    teacher = teacher._replace(ids=teacher.ids.int(), log_probs=teacher.log_probs.to(dtype))
    check(student, teacher, labels, backend=backend, **BOTH)
    one_too_many = TopK(teacher.ids, (teacher.log_probs.float().exp() * 1.002).log().to(dtype), 2.0)
    one_too_many.log_probs[1] -= one_too_many.log_probs[1].float().logsumexp(-1).to(dtype) - 0.002
    for name in ("forward_kl", "reverse_kl"):
        check(student, one_too_many, labels, backend=backend, divergence=name, **BOTH)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_rows_that_do_not_count(backend: str, device: str, reduction: str) -> None:
    """They may hold anything; a row may count for one term alone."""
    student, logits, labels = inputs((5,), COLUMNS, device=device)
    teacher = listed(logits)
    labels[0] = -100
    student[0] = teacher.log_probs[0] = torch.nan
    teacher.ids[0] = 10**6
    grad = check(student, teacher, labels, backend=backend, reduction=reduction, **BOTH)
    assert not grad[0].any()
    soft_mask = torch.tensor([False, False, True, True, True], device=device)
    mask = torch.tensor([True, True, True, False, True], device=device)
    keys: dict[str, Any] = BOTH | {"token_weights": torch.rand(5, device=device), "z_loss_weight": 0.03}
    if reduction == "mean":
        keys["num_items"] = (3, 7)
    check(student, teacher, labels, backend=backend, reduction=reduction, mask=mask, soft_mask=soft_mask, **keys)


@pytest.mark.parametrize("tail", TAILS)
def test_a_row_that_lists_nothing(backend: str, device: str, tail: str) -> None:
    """It says that all mass is in the rest, or nothing."""
    student, logits, labels = inputs((2,), COLUMNS, device=device)
    teacher = listed(logits, tail=tail)
    teacher.ids[1] = -1
    check(student, teacher, labels, backend=backend, reduction="none", **BOTH)


def test_every_keyword(backend: str, device: str) -> None:
    student, logits, labels = inputs((2, 3), COLUMNS, device=device)
    student[..., 127:] = torch.nan
    labels %= 127
    keys = {
        "vocab_size": 127, "label_smoothing": 0.1, "z_loss_weight": 0.02, "scale_soft_by_t2": False,
        "mask": torch.rand(2, 3, device=device) > 0.3,
    }  # fmt: skip
    for tail in TAILS:
        grad = check(student, listed(logits[..., :127], tail=tail), labels, backend=backend, **BOTH, **keys)
        assert not grad[..., 127:].any()


def test_layouts(backend: str, device: str) -> None:
    """Rows in groups, and ids of any strides."""
    student, logits, labels = inputs((2, 3), COLUMNS, device=device)
    teacher = listed(logits)
    ids, log_probs = (torch.stack((t, t), -1)[..., 0] for t in teacher[:2])
    for reduction in ("mean", "none"):
        check(
            without_last(student),
            TopK(ids, log_probs, 2.0),
            labels,
            backend=backend,
            reduction=reduction,
            **BOTH,
        )


def test_minus_inf(backend: str, device: str) -> None:
    """Masked tokens of the student and of the teacher."""
    for name in ("forward_kl", "reverse_kl", "jsd(0.5)", "tvd"):
        for tail in TAILS:
            if allowed(name, tail):
                student, logits, labels = inputs((1,), COLUMNS, device=device)
                teacher = listed(logits, tail=tail, padding=False)
                masked = torch.ones_like(student[0], dtype=torch.bool)
                masked[teacher.ids[0]] = masked[labels[0]] = False
                masked[: COLUMNS // 2] = False
                student[0, masked] = -torch.inf
                check(student, teacher, labels, backend=backend, divergence=name, **BOTH)
                teacher.log_probs[0, -1] = -torch.inf  # of a teacher with fewer tokens than k
                student[0, teacher.ids[0, -1]] = -torch.inf
                labels[0] = teacher.ids[0, 0]
                check(student, teacher, labels, backend=backend, divergence=name, **BOTH)


@pytest.mark.parametrize("tail", TAILS)
def test_a_token_that_the_student_cannot_give(backend: str, device: str, tail: str) -> None:
    """Forward KL is infinite, and has the gradient that it has anywhere: that of cross-entropy."""
    student, logits, _ = inputs((1,), COLUMNS, device=device)
    teacher = listed(logits, tail=tail)
    student[0, teacher.ids[0, 0]] = -torch.inf
    grads = []
    for divergence in ("forward_kl", "cross_entropy"):
        leaf = student.detach().requires_grad_()
        loss = fastkd.kd_loss(leaf, teacher, temperature=2.0, divergence=divergence, backend=backend)
        assert loss.isposinf()
        grads += torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(*grads)
    assert grads[0][0, teacher.ids[0, 0]] < 0


@pytest.mark.parametrize("shift", [0.0, 1e4])
def test_digits_of_the_rest(backend: str, device: str, shift: float) -> None:
    """A sure student and a doubting teacher: the student's mass of the rest is 1e-6, the teacher's 0.5."""
    student = torch.zeros(1, 1000, device=device, dtype=torch.float64)
    ids = torch.randperm(1000, device=device)[:8].unsqueeze(0)
    student += torch.randn(1, 1000, device=device)
    student[0, ids[0]] += 13.8 + 4.8
    student = (student + shift).float()
    q = torch.softmax(student.double(), -1)
    assert 1e-7 < 1.0 - q[0, ids[0]].sum() < 1e-5
    teacher = TopK(ids, torch.full((1, 8), 0.5 / 8, device=device).log())
    for name in ("forward_kl", "reverse_kl", "jsd(0.5)"):
        check(student, teacher, backend=backend, divergence=name)
    check(student, TopK(ids, torch.softmax(torch.randn(1, 8, device=device), -1).log() - 1e-5), backend=backend)


def test_a_sure_teacher(backend: str, device: str) -> None:
    """Whose listed mass rounds to 1: a reverse KL stays finite, and has a gradient."""
    student, logits, _ = inputs((2,), COLUMNS, device=device)
    logits[:, 3] = 60.0
    teacher = listed(logits, temperature=1.0)
    for name in ("forward_kl", "reverse_kl", "cross_entropy"):
        assert check(student, teacher, backend=backend, divergence=name).abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_place(backend: str, device: str, reduction: str, dtype: torch.dtype) -> None:
    """The gradient over the logits is the same, bit by bit; using them after that is an error."""
    student, logits, labels = inputs((3,), COLUMNS, dtype, device=device)
    student.requires_grad_()
    teacher = listed(logits)
    labels[1] = -100
    grads = []
    for inplace in (False, True):
        copy = student * 1
        loss = fastkd.kd_loss(
            copy, teacher, labels, inplace_backward=inplace, temperature=2.0, reduction=reduction, backend=backend,
            **BOTH,
        )  # fmt: skip
        grads.append(torch.autograd.grad(loss.sum(), student)[0])
    assert torch.equal(*grads)
    copy = student * 1
    squares = copy.square().sum()  # saves them
    loss = fastkd.kd_loss(copy, teacher, temperature=2.0, inplace_backward=True, backend=backend, reduction=reduction)
    loss.sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_student_of_hidden_states(backend: str, device: str, reduction: str, dtype: torch.dtype) -> None:
    """As good as of the logits that they make."""
    student = source((5,), dtype, 24, device, softcap=20.0)
    labels = torch.randint(0, COLUMNS, (5,), device=device)
    labels[2] = -100
    for name, tail in zip(STRUCTURES, cycle(("bucket", "support", "renormalize", "truncate"))):
        teacher = listed(torch.randn(5, COLUMNS, device=device) * 3, tail=tail)
        keys = BOTH | {"temperature": 2.0, "reduction": reduction}
        leaf = leaves(student)
        assert isinstance(leaf, LinearLogits)
        loss = fastkd.kd_loss(
            leaf, teacher, labels, chunk_rows=2, backend=backend, divergence=DIVERGENCES[name].argument, **keys
        )
        found = [loss.detach(), *torch.autograd.grad(loss.sum(), tensors(leaf))]
        exact = leaves(student, torch.float64)
        of_teacher = reference.Listed(teacher.ids, teacher.log_probs, tail)
        loss = reference.kd_loss(whole(exact), of_teacher, labels, divergence=DIVERGENCES[name].definition, **keys).loss
        expected = [loss.detach(), *torch.autograd.grad(loss.sum(), tensors(exact))]
        for actual, wanted in zip(found, expected, strict=True):
            limit = 5e-5 if dtype == torch.float32 else 1e-2
            assert (actual.double() - wanted).norm() <= limit * wanted.norm()


def test_parts(backend: str, device: str) -> None:
    student, logits, labels = inputs((4,), COLUMNS, device=device)
    labels[0] = -100
    teacher = listed(logits)
    of_teacher = reference.Listed(teacher.ids, teacher.log_probs, "bucket")
    for weights in (BOTH, {"hard_weight": 0.0}, {"hard_weight": 1.0, "soft_weight": 0.0}):
        found = fastkd.kd_loss(student, teacher, labels, return_parts=True, temperature=2.0, backend=backend, **weights)
        expected = reference.kd_loss(student, of_teacher, labels, temperature=2.0, **weights)
        for part, wanted in zip(found, expected, strict=True):
            check_loss(part, wanted)
