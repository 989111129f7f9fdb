"""How the loss takes part in autograd: gradcheck, what is refused, modes, autocast, in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from tests.assertions import check_gradient, check_loss, expect, same_bits
from tests.cases import DIVERGENCES, inputs, keywords

BOTH = {"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "tvd"])
def test_gradcheck(name: str, reduction: str) -> None:
    student, teacher, labels = inputs((2, 2), 5, torch.float64, spread=1.0)
    weights = torch.rand(2, 2, dtype=torch.float64)
    arguments = keywords(name) | {"reduction": reduction, "token_weights": weights, "label_smoothing": 0.1}
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: fastkd.kd_loss(z, teacher, labels, backend="torch", **arguments), student)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_of_tvd(reduction: str) -> None:
    """Away from its kink at p_s = p_t."""
    student = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.5, 0.5]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.0, 0.0, 1.0], [1.0, -1.0, 2.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: fastkd.kd_loss(z, teacher, divergence="tvd", reduction=reduction, backend="torch"), student
    )


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_gradcheck_of_log_softmax(temperature: float) -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: fastkd.log_softmax(z, temperature=temperature, backend="torch"), logits)


FUNCTIONS: dict[str, Any] = {
    "mean": lambda z, u, y, backend: fastkd.kd_loss(z, u, y, backend=backend, **BOTH),
    "none": lambda z, u, y, backend: fastkd.kd_loss(z, u, y, reduction="none", backend=backend, **BOTH).sum(),
    "log_softmax": lambda z, u, y, backend: -(u.softmax(-1) * fastkd.log_softmax(z, backend=backend)).sum(),
}


@pytest.mark.parametrize("function", FUNCTIONS)
class TestSecondOrder:
    """A second derivative raises; it never is a wrong number, such as the 0 of a gradient taken for a constant."""

    def test_gradient_of_the_gradient(self, backend: str, function: str) -> None:
        student, *rest = inputs((2,), 17)
        student.requires_grad_()
        (grad,) = torch.autograd.grad(FUNCTIONS[function](student, *rest, backend), student, create_graph=True)
        with pytest.raises(RuntimeError, match="second-order"):
            torch.autograd.grad(grad.square().sum(), student)

    def test_gradient_penalty(self, backend: str, function: str) -> None:
        """Added to the loss, so that a first-order path to the parameter is there too."""
        weight = torch.randn(4, 17, requires_grad=True)
        hidden = torch.randn(2, 4)
        _, *rest = inputs((2,), 17)
        loss = FUNCTIONS[function](hidden @ weight, *rest, backend)
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        with pytest.raises(RuntimeError, match="second-order"):
            (loss + grad.norm()).backward()

    def test_unused_is_allowed(self, backend: str, function: str) -> None:
        """PyTorch's helpers ask with allow_unused=True and take an unconnected input for a derivative of 0."""
        student, *rest = inputs((2,), 17)
        with pytest.raises(RuntimeError, match="second-order"):
            torch.autograd.functional.hvp(
                lambda z: FUNCTIONS[function](z, *rest, backend), student, torch.ones_like(student)
            )

    def test_by_what_weighs_the_loss(self, backend: str, function: str) -> None:
        """The gradient is a multiple of a weight that learns by its size (Chen et al., 2018, GradNorm)."""
        student, *rest = inputs((2,), 17)
        student.requires_grad_()
        weight = torch.tensor(2.0, requires_grad=True)
        loss = weight * FUNCTIONS[function](student, *rest, backend)
        (grad,) = torch.autograd.grad(loss, student, create_graph=True)
        with pytest.raises(RuntimeError, match="second-order"):
            torch.autograd.grad(grad.norm() + weight, weight)

    def test_jvp_by_double_backward(self, backend: str, function: str) -> None:
        student, *rest = inputs((2,), 17)
        with pytest.raises(RuntimeError, match="second-order"):
            torch.autograd.functional.jvp(
                lambda z: FUNCTIONS[function](z, *rest, backend), student, torch.ones_like(student)
            )

    def test_create_graph_alone(self, backend: str, function: str) -> None:
        """Is harmless: the same first gradients, bit by bit, and again from the graph it keeps."""
        student, *rest = inputs((2,), 17)
        student.requires_grad_()
        (plain,) = torch.autograd.grad(FUNCTIONS[function](student, *rest, backend), student)
        loss = FUNCTIONS[function](student, *rest, backend)
        for _ in range(2):
            (grad,) = torch.autograd.grad(2.0 * loss, student, create_graph=True)
            torch.testing.assert_close(grad.detach(), 2.0 * plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_teacher_gets_no_gradient(backend: str, reduction: str) -> None:
    student, teacher, labels = inputs((2,), 17)
    student.requires_grad_(), teacher.requires_grad_()
    loss = fastkd.kd_loss(student, teacher, labels, reduction=reduction, backend=backend, **BOTH)
    loss.sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    only_teacher = fastkd.kd_loss(student.detach(), teacher, labels, reduction=reduction, backend=backend, **BOTH)
    assert not only_teacher.requires_grad


def test_student_is_its_own_teacher(backend: str) -> None:
    """Self-distillation from the same tensor: it is the constant in the teacher's place."""
    student, _, labels = inputs((2,), 17)
    student.requires_grad_()
    fastkd.kd_loss(student, student, labels, backend=backend, divergence="cross_entropy", **BOTH).backward()
    expected = expect(student.detach(), student.detach(), labels, divergence="cross_entropy", **BOTH)[1]
    check_gradient(student.grad, expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(backend: str, device: str, reduction: str) -> None:
    """The loss keeps float32's digits on what autocast's layers gave, and gradients reach float32 parameters."""
    linear = torch.nn.Linear(8, 127)
    hidden = torch.randn(3, 8)
    _, teacher, labels = inputs((3,), 127)
    with torch.autocast(device, dtype=torch.bfloat16):
        student = linear(hidden)
        loss = fastkd.kd_loss(student, teacher, labels, reduction=reduction, backend=backend, **BOTH)
    assert student.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    check_loss(loss.detach(), expect(student.detach(), teacher, labels, reduction=reduction, **BOTH)[0])
    loss.sum().backward()
    assert linear.weight.grad.dtype == torch.float32
    assert linear.weight.grad.abs().sum() > 0


def test_autocast_leaves_float32_alone(backend: str, device: str) -> None:
    given = inputs((2,), 127)
    plain = fastkd.kd_loss(*given, backend=backend, **BOTH)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(fastkd.kd_loss(*given, backend=backend, **BOTH), plain)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_without_grad(backend: str, mode: Any, reduction: str) -> None:
    """The same loss with no graph; asked for in place, nothing is written either."""
    student, teacher, labels = inputs((2,), 127)
    student.requires_grad_()
    arguments: dict[str, Any] = BOTH | {"reduction": reduction, "backend": backend}
    expected = fastkd.kd_loss(student, teacher, labels, **arguments).detach()
    before = student.detach().clone()
    with mode():
        for inplace in (False, True):
            loss = fastkd.kd_loss(student, teacher, labels, inplace_backward=inplace, **arguments)
            assert not loss.requires_grad
            torch.testing.assert_close(loss.clone(), expected, rtol=1e-6, atol=1e-7)
    assert same_bits(student.detach(), before)


def test_inference_tensors(backend: str) -> None:
    """A teacher computed, and tokens sampled, in inference mode beside a student that trains."""
    for dtype in (torch.float32, torch.float16):
        student, *given = inputs((2,), 127, dtype)
        with torch.inference_mode():
            inferred = [tensor.clone() for tensor in given]
        for reduction in ("mean", "none"):
            grads = []
            for teacher, labels in (given, inferred):
                leaf = student.clone().requires_grad_()
                fastkd.kd_loss(leaf, teacher, labels, reduction=reduction, backend=backend, **BOTH).sum().backward()
                grads.append(leaf.grad)
            assert same_bits(*grads)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_batched_gradients(backend: str, dtype: torch.dtype, reduction: str, inplace: bool) -> None:
    """Several grad_outputs at once (is_grads_batched) are as many gradients, one of them of a grad_output of 1."""
    student, teacher, labels = inputs((3,), 17, dtype)
    labels[1] = -100
    arguments: dict[str, Any] = {"reduction": reduction, "inplace_backward": inplace, "backend": backend, **BOTH}
    leaf = student.requires_grad_()
    loss = fastkd.kd_loss(leaf * 1, teacher, labels, **arguments)
    grad_outputs = torch.cat((torch.ones(1, *loss.shape), torch.randn(2, *loss.shape)))
    (batched,) = torch.autograd.grad(loss, leaf, grad_outputs, is_grads_batched=True)
    for grad, grad_output in zip(batched, grad_outputs, strict=True):
        loss = fastkd.kd_loss(leaf * 1, teacher, labels, **arguments)
        torch.testing.assert_close(grad, torch.autograd.grad(loss, leaf, grad_output)[0])


def test_batched_gradients_of_log_softmax(backend: str) -> None:
    logits = torch.randn(2, 17, requires_grad=True)
    log_probs = fastkd.log_softmax(logits, backend=backend)
    grad_outputs = torch.randn(3, 2, 17)
    (batched,) = torch.autograd.grad(log_probs, logits, grad_outputs, is_grads_batched=True, retain_graph=True)
    for grad, grad_output in zip(batched, grad_outputs, strict=True):
        expected = torch.autograd.grad(log_probs, logits, grad_output, retain_graph=True)[0]
        torch.testing.assert_close(grad, expected)


class TestInPlace:
    """What else holds the overwritten logits must hear of it."""

    @pytest.fixture(params=["mean", "none"])
    def reduction(self, request: pytest.FixtureRequest) -> str:
        reduction: str = request.param
        return reduction

    @staticmethod
    def loss(student: Tensor, backend: str, reduction: str, inplace: bool = True) -> Tensor:
        torch.manual_seed(1)
        _, teacher, labels = inputs((2,), 17)
        arguments = keywords("forward_kl") | {"reduction": reduction, "inplace_backward": inplace, "backend": backend}
        return fastkd.kd_loss(student, teacher, labels, **arguments).sum()

    def test_used_again(self, backend: str) -> None:
        """The scalar loss has overwritten the logits when it returns."""
        student = torch.randn(2, 17, requires_grad=True) * 1
        loss = self.loss(student, backend, "mean")
        with pytest.raises(RuntimeError, match="inplace_backward: student_logits were overwritten"):
            (loss + student.mean()).backward()

    def test_used_again_before_backward(self, backend: str) -> None:
        """The loss per row overwrites them in its backward; what used them later has its own behind it by then."""
        leaf = torch.randn(2, 17, requires_grad=True)
        grads = []
        for inplace in (False, True):
            student = leaf * 1
            loss = self.loss(student, backend, "none", inplace)
            grads.append(torch.autograd.grad(loss + student.square().sum(), leaf)[0])
        torch.testing.assert_close(*grads)

    def test_saved_before(self, backend: str, reduction: str) -> None:
        """square() saved the logits for its own backward."""
        student = torch.randn(2, 17, requires_grad=True) * 1
        other = student.square().sum()
        loss = self.loss(student, backend, reduction)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (loss + other).backward()

    def test_used_where_no_values_are_needed(self, backend: str, reduction: str) -> None:
        """An addition saves nothing, so logits that were added to something before are free."""
        leaf = torch.randn(2, 17, requires_grad=True)
        grads = []
        for inplace in (False, True):
            student = leaf * 1
            other = (student + 1.0).sum()
            grads.append(torch.autograd.grad(self.loss(student, backend, reduction, inplace) + other, leaf)[0])
        torch.testing.assert_close(*grads)

    def test_second_backward(self, backend: str, reduction: str) -> None:
        """Right where the gradient is kept, refused where the logits it would be computed from are gone."""
        leaf = torch.randn(2, 17, requires_grad=True)
        loss = self.loss(leaf * 1, backend, reduction)
        loss.backward(retain_graph=True)
        first = leaf.grad.clone()
        if reduction == "mean":
            loss.backward()
            torch.testing.assert_close(leaf.grad, 2.0 * first)
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
