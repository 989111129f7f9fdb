"""Every backend on what a training loop does with the gradient: grad_output, a second backward, in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import fastkd
from tests.assertions import check_call, check_gradient, expect, same_bits
from tests.cases import STRUCTURES, inputs, keywords

BOTH = {"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7}
HALVES = (torch.float32, torch.bfloat16, torch.float16)

GRAD_OUTPUTS: dict[str, Callable[[], Tensor]] = {
    "random": lambda: torch.randn(3),
    "some_zero": lambda: torch.tensor([0.0, 2.0, 0.0]),
    "stride_0": lambda: torch.tensor(-1.5).expand(3),
    "stride_2": lambda: torch.randn(6)[::2],
    "negative": lambda: -torch.ones(3),
}


@pytest.mark.parametrize("value", [3.7, -0.5, 0.0, 1024.0])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_grad_output_of_a_scalar_loss(backend: str, device: str, dtype: torch.dtype, value: float) -> None:
    """A scaled loss: gradient scaling of mixed precision, a weighted sum of losses."""
    given = inputs((2,), 127, dtype, device=device)
    check_call(*given, backend=backend, grad_output=torch.tensor(value, device=device), **BOTH)


def test_scaling_of_the_smallest_float16(backend: str, device: str) -> None:
    """Below 6e-5 they have fewer digits, and no kernel may take them for 0."""
    grad = torch.tensor([1e-5, -3e-6, 6e-8, 2e-4], dtype=torch.float16, device=device).repeat(3, 40)
    expected = (grad.double() * 64.0).half()
    torch.ops.fastkd.scale_(grad, torch.tensor(64.0, device=device), backend)
    assert torch.equal(grad, expected)


def test_grad_output_over_tiles(backend: str, device: str) -> None:
    given = inputs((2,), 4099, device=device)
    check_call(*given, backend=backend, grad_output=torch.tensor(2.5, device=device), **BOTH)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("kind", GRAD_OUTPUTS)
def test_grad_output_per_row(backend: str, device: str, kind: str, name: str) -> None:
    given = inputs((3,), 127, device=device)
    grad_output = GRAD_OUTPUTS[kind]().to(device)
    check_call(*given, backend=backend, divergence=name, reduction="none", grad_output=grad_output, **BOTH)


def test_loss_in_a_larger_graph(backend: str, device: str) -> None:
    """The student's logits are computed, and the loss is one term among others."""
    hidden, head = torch.randn(3, 8, device=device), torch.randn(8, 127, device=device, requires_grad=True)
    _, teacher, labels = inputs((3,), 127, device=device)
    student = hidden @ head
    loss = fastkd.kd_loss(student, teacher, labels, backend=backend, **BOTH)
    (0.25 * loss.exp() + (student**2).mean()).backward()

    grad_logits = expect(student.detach(), teacher, labels, **BOTH)[1]
    expected = hidden.double().T @ (
        0.25 * loss.detach().double().exp() * grad_logits + student.detach().double() * 2 / 381
    )
    check_gradient(head.grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(backend: str, device: str, reduction: str, dtype: torch.dtype) -> None:
    """A backward under retain_graph leaves what the next one needs, whatever its grad_output."""
    student, teacher, labels = inputs((2,), 127, dtype, device=device)
    student.requires_grad_()
    loss = fastkd.kd_loss(student, teacher, labels, reduction=reduction, backend=backend, **BOTH)
    ones = torch.ones_like(loss)
    grads = [
        torch.autograd.grad(loss, student, grad_output, retain_graph=True)[0]
        for grad_output in (ones, 3.0 * ones, ones)
    ]
    grads.append(torch.autograd.grad(loss, student, ones)[0])
    assert same_bits(grads[0], grads[2])
    assert same_bits(grads[0], grads[3])
    check_gradient(grads[1], 3.0 * grads[0].double())


def test_gradients_accumulate(backend: str, device: str) -> None:
    """A gradient handed to the caller is not overwritten by the next backward of the same graph."""
    student, teacher, labels = inputs((2,), 127, device=device)
    student.requires_grad_()
    loss = fastkd.kd_loss(student, teacher, labels, backend=backend, **BOTH)
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    (2.0 * loss).backward()
    torch.testing.assert_close(student.grad, 3.0 * once, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_in_place(backend: str, device: str, reduction: str, dtype: torch.dtype) -> None:
    """The same bits as out of place, over the memory of the logits."""
    leaf, teacher, labels = inputs((2,), 127, dtype, device=device)
    leaf.requires_grad_()
    for name in STRUCTURES:
        results = []
        for inplace in (False, True):
            student = leaf * 1
            address, addresses = student.data_ptr(), []
            student.register_hook(lambda grad, addresses=addresses: addresses.append(grad.data_ptr()))
            arguments = keywords(name) | {"reduction": reduction, "inplace_backward": inplace, "backend": backend}
            loss = fastkd.kd_loss(student, teacher, labels, **arguments)
            (0.5 * loss.sum()).backward()
            assert (addresses == [address]) == inplace
            results.append((loss.detach(), leaf.grad.clone()))
            leaf.grad = None
        assert same_bits(results[0][0], results[1][0])
        assert same_bits(results[0][1], results[1][1])


@pytest.mark.parametrize("name", STRUCTURES)
def test_in_place_over_tiles(backend: str, device: str, name: str) -> None:
    """Every column is read before it is overwritten; padding columns too become 0."""
    leaf, teacher, labels = inputs((2,), 4101, torch.bfloat16, device=device)
    labels %= 4003
    leaf.requires_grad_()
    grads = []
    for inplace in (False, True):
        arguments = keywords(name) | {"vocab_size": 4003, "inplace_backward": inplace, "backend": backend}
        fastkd.kd_loss(leaf * 1, teacher, labels, **arguments).backward()
        grads.append(leaf.grad)
        leaf.grad = None
    assert same_bits(*grads)
    assert (grads[1][:, 4003:] == 0).all()


def test_no_gradient_asked_for(backend: str, device: str) -> None:
    """A student that requires none: the loss alone, in evaluation."""
    student, teacher, labels = inputs((2,), 127, device=device)
    expected = expect(student, teacher, labels, **BOTH)[0]
    for inplace in (False, True):
        before = student.clone()
        loss = fastkd.kd_loss(student, teacher, labels, inplace_backward=inplace, backend=backend, **BOTH)
        assert not loss.requires_grad
        torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0.0)
        assert same_bits(student, before)
