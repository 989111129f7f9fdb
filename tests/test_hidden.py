"""The loss of hidden states above the row operation: arguments, autograd, and who computes it."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd
from fastkd import _dispatch
from fastkd.backends import cpu
from tests.assertions import check_gradient, same_bits

KINDS = ("mse", "cosine")
H = torch.zeros(2, 3, 8)
MASK = torch.ones(2, 3, dtype=torch.bool)

# (changed arguments, type of the error, its message from the start)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student_hidden": [[0.0]]}, TypeError, "student_hidden: got list, must be a tensor"),
    ({"teacher_hidden": None}, TypeError, "teacher_hidden: got NoneType, must be a tensor"),
    ({"student_hidden": H.long()}, TypeError, "student_hidden: got torch.int64, must be float32, bfloat16, float16 or"),
    ({"student_hidden": torch.tensor(0.0)}, ValueError, "student_hidden: got shape (), must be (..., H) with H >= 1"),
    ({"teacher_hidden": torch.zeros(2, 3, 0)}, ValueError, "teacher_hidden: got shape (2, 3, 0), must be (..., H)"),
    ({"teacher_hidden": H[:1]}, ValueError, "teacher_hidden: got shape (1, 3, 8), must match student_hidden's (2, 3,"),
    ({"teacher_hidden": H[0]}, ValueError, "teacher_hidden: got shape (3, 8), must match student_hidden's (2, 3, 8)"),
    ({"teacher_hidden": torch.zeros(2, 3, 9)}, ValueError, "teacher_hidden: got a width of 9, student_hidden has 8; "),
    ({"teacher_hidden": H.to("meta")}, ValueError, "teacher_hidden: got device meta, must be student_hidden's cpu"),
    ({"kind": "l2"}, ValueError, "kind: got 'l2', must be one of 'mse', 'cosine'"),
    ({"kind": None}, ValueError, "kind: got None, must be one of 'mse', 'cosine'"),
    ({"mask": MASK.long()}, TypeError, "mask: got torch.int64, must be torch.bool"),
    ({"mask": MASK[0]}, ValueError, "mask: got shape (3,), must be (2, 3), one entry a row of student_hidden; nothing"),
    ({"token_weights": MASK.long()}, TypeError, "token_weights: got torch.int64, must be torch.float32 or"),
    ({"token_weights": torch.ones(2, 3, requires_grad=True)}, ValueError, "token_weights: got a tensor that requires"),
    ({"reduction": "batchmean"}, ValueError, "reduction: got 'batchmean', must be one of 'mean', 'sum', 'none'"),
    ({"num_items": -1}, ValueError, "num_items: got -1, must be >= 0"),
    ({"num_items": (6, 6)}, TypeError, "num_items: got tuple, must be a number or a tensor"),
    ({"num_items": torch.ones((), device="meta")}, ValueError, "num_items: got device meta, must be student_hidden's"),
    ({"num_items": math.nan}, ValueError, "num_items: got nan, must be finite"),
    ({"num_items": torch.ones(2)}, ValueError, "num_items: got shape (2,), must be a number or have one element"),
    ({"student_hidden": H.to_sparse()}, TypeError, "student_hidden: got layout torch.sparse_coo, must be dense"),
    ({"num_items": 6, "reduction": "sum"}, ValueError, "num_items: got a value with reduction='sum'"),
    ({"backend": "cudnn"}, ValueError, "backend: got 'cudnn', must be one of 'cpu', 'cuda', 'torch', 'triton'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "kind", "message"), BAD, ids=[message[:45] for _, _, message in BAD])
def test_bad_argument(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    assert fastkd.hidden_loss(H, H, mask=MASK) == 0
    with pytest.raises(kind, match="^" + re.escape(message)):
        fastkd.hidden_loss(**{"student_hidden": H, "teacher_hidden": H, "mask": MASK} | changes)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str, reduction: str) -> None:
    student, teacher = (torch.randn(2, 2, 5, dtype=torch.float64) for _ in range(2))
    weights, mask = torch.rand(2, 2, dtype=torch.float64), torch.tensor([[True, True], [False, True]])
    assert torch.autograd.gradcheck(
        lambda s: fastkd.hidden_loss(s, teacher, kind=kind, mask=mask, token_weights=weights, reduction=reduction),
        student.requires_grad_(),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_users_write_by_hand(backend: str, device: str, kind: str) -> None:
    """With a mask from padding: DistilBERT's cosine loss, and the mean squared error of the rows that count."""
    student, teacher = torch.randn(2, 4, 16, device=device, requires_grad=True), torch.randn(2, 4, 16, device=device)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], device=device).bool()
    if kind == "mse":
        expected = F.mse_loss(student[mask], teacher[mask])
    else:
        expected = F.cosine_embedding_loss(student[mask], teacher[mask], torch.ones(5, device=device))
    loss = fastkd.hidden_loss(student, teacher, kind=kind, mask=mask, backend=backend)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(value, student)[0] for value in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


def test_half_of_pkds_distance(device: str) -> None:
    student, teacher = torch.randn(2, 5, 16, device=device), torch.randn(2, 5, 16, device=device)
    pkd = (F.normalize(student, dim=-1) - F.normalize(teacher, dim=-1)).square().sum(-1)
    torch.testing.assert_close(2.0 * fastkd.hidden_loss(student, teacher, kind="cosine", reduction="none"), pkd)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", KINDS)
class TestAutograd:
    def test_second_derivative(self, backend: str, kind: str, reduction: str) -> None:
        """Raises, with a first-order path to the parameter there too."""
        weight, x, teacher = torch.randn(4, 17, requires_grad=True), torch.randn(2, 4), torch.randn(2, 17)
        loss = fastkd.hidden_loss(x @ weight, teacher, kind=kind, reduction=reduction, backend=backend).sum()
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        with pytest.raises(RuntimeError, match="second-order"):
            (loss + grad.norm()).backward()

    def test_teacher_gets_no_gradient(self, backend: str, kind: str, reduction: str) -> None:
        student, teacher = torch.randn(2, 17, requires_grad=True), torch.randn(2, 17, requires_grad=True)
        fastkd.hidden_loss(student, teacher, kind=kind, reduction=reduction, backend=backend).sum().backward()
        assert teacher.grad is None and student.grad is not None
        loss = fastkd.hidden_loss(student.detach(), teacher, kind=kind, reduction=reduction, backend=backend)
        assert not loss.requires_grad

    def test_batched_gradients(self, backend: str, kind: str, reduction: str) -> None:
        student, teacher = torch.randn(3, 17, requires_grad=True), torch.randn(3, 17)
        loss = fastkd.hidden_loss(student, teacher, kind=kind, reduction=reduction, backend=backend)
        several = torch.randn(2, *loss.shape)
        (grads,) = torch.autograd.grad(loss, student, several, is_grads_batched=True, retain_graph=True)
        for grad, grad_output in zip(grads, several, strict=True):
            check_gradient(grad, torch.autograd.grad(loss, student, grad_output, retain_graph=True)[0])

    def test_within_a_transform(self, backend: str, kind: str, reduction: str) -> None:
        """Refused with a way out."""
        teacher = torch.randn(2, 17)
        with pytest.raises(RuntimeError, match=r"fastkd does not work within transforms of torch\.func"):
            torch.func.grad(
                lambda s: fastkd.hidden_loss(s, teacher, kind=kind, reduction=reduction, backend=backend).sum()
            )(torch.randn(2, 17))

    def test_without_grad(self, backend: str, kind: str, reduction: str) -> None:
        student, teacher = torch.randn(2, 17, requires_grad=True), torch.randn(2, 17)
        expected = fastkd.hidden_loss(student, teacher, kind=kind, reduction=reduction, backend=backend)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                loss = fastkd.hidden_loss(student, teacher, kind=kind, reduction=reduction, backend=backend)
                assert not loss.requires_grad
                assert torch.equal(loss.clone(), expected.detach())

    def test_inference_tensors(self, backend: str, kind: str, reduction: str) -> None:
        """A teacher and weights that were made in inference mode beside a student that trains."""
        for dtype in (torch.float32, torch.float16):
            student, *given = torch.randn(2, 17, dtype=dtype), torch.randn(2, 17, dtype=dtype), torch.rand(2)
            with torch.inference_mode():
                inferred = [tensor.clone() for tensor in given]
            grads = []
            for teacher, weights in (given, inferred):
                leaf = student.clone().requires_grad_()
                keywords: dict[str, Any] = {"token_weights": weights, "reduction": reduction, "backend": backend}
                fastkd.hidden_loss(leaf, teacher, kind=kind, **keywords).sum().backward()
                grads.append(leaf.grad)
            assert same_bits(*grads)

    def test_autocast(self, backend: str, device: str, kind: str, reduction: str) -> None:
        linear, x, teacher = torch.nn.Linear(8, 17), torch.randn(3, 8), torch.randn(3, 17)
        with torch.autocast(device, dtype=torch.bfloat16):
            student = linear(x)
            loss = fastkd.hidden_loss(student, teacher, kind=kind, reduction=reduction, backend=backend)
        assert (student.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
        loss.sum().backward()
        assert linear.weight.grad.dtype == torch.float32 and linear.weight.grad.any()


def test_row_that_does_not_count_has_no_gradient(backend: str, device: str) -> None:
    """Whatever comes from above: the square root of its loss of 0 has a derivative of infinity."""
    student, mask = torch.randn(3, 33, device=device, requires_grad=True), torch.tensor([True, False, True])
    loss = fastkd.hidden_loss(student, torch.randn(3, 33), mask=mask.to(device), reduction="none", backend=backend)
    loss.sqrt().sum().backward()
    assert not student.grad[1].any() and student.grad.isfinite().all()


def test_gradient_accumulation(backend: str, device: str) -> None:
    """Micro-batches of unequal length with the step's number of rows add up to the whole batch."""
    student, teacher = torch.randn(5, 17, device=device, requires_grad=True), torch.randn(5, 17, device=device)
    mask = torch.tensor([True, False, True, True, True], device=device)
    fastkd.hidden_loss(student, teacher, mask=mask, backend=backend).backward()
    whole, student.grad = student.grad, None
    for at in (slice(0, 2), slice(2, 5)):
        fastkd.hidden_loss(student[at], teacher[at], mask=mask[at], num_items=mask.sum(), backend=backend).backward()
    check_gradient(student.grad, whole.double())


@pytest.mark.usefixtures("restore_backend")
class TestBackends:
    def test_cuda_lacks_it(self) -> None:
        """By name it is refused with that reason, where the backend is built at all."""
        x = torch.zeros(1, 8)
        why = _dispatch.refusal(x, "cuda", None, "hidden_rows")
        assert why and (why == "it has no hidden_rows" or why == _dispatch.refusal(x, "cuda"))

    def test_a_backend_that_lacks_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Is passed over by the automatic choice and refused by name, for this operation alone."""
        x = torch.zeros(1, 8)
        if cpu.unavailable():
            pytest.skip("needs the compiled CPU backend")
        assert _dispatch.choose(x, "", None, "hidden_rows") is cpu
        monkeypatch.delattr(cpu, "hidden_rows")
        fastkd.hidden_loss(x, x)
        with pytest.raises(RuntimeError, match=r"^backend 'cpu' cannot run here: it has no hidden_rows$"):
            fastkd.hidden_loss(x, x, backend="cpu")
        with pytest.raises(RuntimeError, match="it has no hidden_rows"), fastkd.use_backend("cpu"):
            fastkd.hidden_loss(x, x)
        fastkd.kd_loss(x, x, backend="cpu")

    def test_float64(self) -> None:
        x = torch.zeros(1, 8, dtype=torch.float64)
        fastkd.hidden_loss(x, x)
        with pytest.raises(RuntimeError, match=r"^backend 'triton' cannot run here: .*float64"):
            fastkd.hidden_loss(x, x, backend="triton")


class TestAttention:
    """MiniLM's relations and attention maps are distributions over positions: kd_loss, and −inf where masked."""

    @staticmethod
    def scores(heads: int = 2, length: int = 5, width: int = 4) -> tuple[Tensor, Tensor]:
        """q·k/√d [batch, heads, length, length] of two sequences, the second with two padded positions."""
        q, k = torch.randn(2, 2, heads, length, width)
        real = torch.tensor([[True] * length, [True] * (length - 2) + [False] * 2])
        return (q @ k.transpose(-1, -2) / width**0.5).masked_fill(~real[:, None, None], -math.inf), real

    @pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
    def test_relations(self, backend: str, device: str, divergence: str) -> None:
        student, real = self.scores()
        teacher, _ = self.scores()
        student.requires_grad_()
        rows = real[:, None].expand(2, 2, 5).to(device)  # (batch, heads, length): which positions ask
        loss = fastkd.kd_loss(student.to(device), teacher.to(device), mask=rows, divergence=divergence, backend=backend)
        (grad,) = torch.autograd.grad(loss, student)

        exact = student.detach().double().requires_grad_()
        total = exact.new_zeros(())
        for batch, length in enumerate((5, 3)):  # by hand: without the padding at all
            log_s, log_t = (x[batch, :, :length, :length].log_softmax(-1) for x in (exact, teacher.double()))
            log_p, log_q = (log_t, log_s) if divergence == "forward_kl" else (log_s, log_t)
            total = total + (log_p.exp() * (log_p - log_q)).sum()
        expected = total / (2 * (5 + 3))
        torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-5, atol=0)
        check_gradient(grad, torch.autograd.grad(expected, exact)[0])

    def test_maps(self, backend: str, device: str) -> None:
        """Probabilities, as models return them: their logarithms are logits. That of 0 would have no derivative."""
        (student, real), (teacher, _) = self.scores(), self.scores()
        student, teacher = student.to(device).requires_grad_(), teacher.to(device)
        rows, tiny = real[:, None].expand(2, 2, 5).to(device), torch.finfo(torch.float32).tiny
        of_maps = (x.softmax(-1).clamp_min(tiny).log() for x in (student, teacher))
        losses = [fastkd.kd_loss(*given, mask=rows, backend=backend) for given in ((student, teacher), of_maps)]
        torch.testing.assert_close(*losses)
        grads = [torch.autograd.grad(loss, student)[0] for loss in losses]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)
