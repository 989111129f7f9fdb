"""The public functions above the row operation: log_softmax, and the algebra of weights and reductions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd
from tests.assertions import GRAD_RELATIVE, check_gradient, check_loss, same_bits
from tests.cases import DTYPES, LAYOUTS, inputs

# Rounding of a log-probability to its storage: half a unit in the last place.
STORAGE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-14}


def check_log_softmax(
    logits: Tensor, backend: str, temperature: float = 1.0, dtype: torch.dtype | None = None, scale: float = 1.0
) -> None:
    """Value and gradient, under a random grad_output, against float64 on the same values."""
    leaf = logits.detach().requires_grad_()
    out = fastkd.log_softmax(leaf, temperature=temperature, dtype=dtype, backend=backend)
    assert (out.dtype, out.shape) == (dtype or logits.dtype, logits.shape)
    grad_output = (torch.randn(logits.shape, device=logits.device) * scale).to(out.dtype)
    (grad,) = torch.autograd.grad(out, leaf, grad_output)
    assert grad.dtype == logits.dtype

    exact = logits.detach().double().requires_grad_()
    expected = torch.log_softmax(exact / temperature, -1)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad_output.double())
    torch.testing.assert_close(out.detach().double(), expected.detach(), rtol=STORAGE[out.dtype], atol=1e-6)
    check_gradient(grad, expected_grad)


class TestLogSoftmax:
    @pytest.mark.parametrize("columns", [1, 2, 127, 2048, 4099])
    def test_size(self, backend: str, device: str, columns: int) -> None:
        check_log_softmax(inputs((2,), columns, device=device).student, backend)

    @pytest.mark.parametrize("temperature", [0.5, 2.0, 1.7])
    def test_temperature(self, backend: str, device: str, temperature: float) -> None:
        check_log_softmax(inputs((2,), 127, device=device).student, backend, temperature)

    @pytest.mark.parametrize("out", [None, *DTYPES], ids=str)
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtype(self, backend: str, device: str, dtype: torch.dtype, out: torch.dtype | None) -> None:
        if backend != "torch" and dtype == torch.float64:
            pytest.skip("float64 is the PyTorch backend's (test_dispatch)")
        check_log_softmax(inputs((2,), 127, dtype, device=device).student, backend, 2.0, out)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_layout(self, backend: str, device: str, layout: str) -> None:
        check_log_softmax(LAYOUTS[layout](inputs((2, 2), 131, device=device).student), backend)

    @pytest.mark.parametrize("shape", [(7,), (2, 1, 2, 7), (0, 7), (2, 0, 7)], ids=str)
    def test_shape(self, backend: str, device: str, shape: tuple[int, ...]) -> None:
        check_log_softmax(torch.randn(shape, device=device), backend)

    @pytest.mark.parametrize("kind", ["expanded", "transposed", "one_row_zero"])
    def test_grad_output(self, backend: str, device: str, kind: str) -> None:
        logits = inputs((3,), 131, device=device).student.requires_grad_()
        grad_output = torch.randn(3, 131, device=device)
        if kind == "expanded":
            grad_output = torch.tensor(0.5, device=device).expand(3, 131)
        elif kind == "transposed":
            grad_output = grad_output.t().contiguous().t()
        else:
            grad_output[1] = 0.0
        grads = [
            torch.autograd.grad(out, logits, grad_output)[0]
            for out in (fastkd.log_softmax(logits, backend=backend), torch.log_softmax(logits, -1))
        ]
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)

    def test_minus_inf(self, backend: str, device: str) -> None:
        """A masked token has log-probability −inf and no gradient."""
        logits = inputs((2,), 131, device=device).student
        logits[:, ::3] = -torch.inf
        logits.requires_grad_()
        out = fastkd.log_softmax(logits, backend=backend)
        assert torch.equal(out.isneginf(), logits.isneginf())
        picked = out[:, 1::3].sum()
        (grad,) = torch.autograd.grad(picked, logits)
        exact = logits.detach().double().requires_grad_()
        check_gradient(grad, torch.autograd.grad(torch.log_softmax(exact, -1)[:, 1::3].sum(), exact)[0])

    def test_far_from_0(self, backend: str, device: str) -> None:
        """An offset that float32 holds exactly, and softmax does not see."""
        logits = inputs((2,), 131, device=device).student.round(decimals=2)
        check_log_softmax(logits + 4096.0, backend)

    def test_gradient_does_not_come_from_the_rounded_output(self, backend: str, device: str) -> None:
        """From bfloat16 log-probabilities, 0.06 apart near −10, probabilities would be wrong by percents."""
        logits = inputs((2,), 2048, torch.bfloat16, device=device, spread=1.0).student.requires_grad_()
        out = fastkd.log_softmax(logits, backend=backend)
        (grad,) = torch.autograd.grad(out, logits, torch.ones_like(out))
        expected = 1.0 - 2048 * torch.softmax(logits.detach().double(), -1)
        error = (grad.double() - expected).norm() / expected.norm()
        assert error < GRAD_RELATIVE[torch.bfloat16]

    def test_nothing_is_written(self, backend: str, device: str) -> None:
        logits = inputs((2,), 131, device=device).student
        before = logits.clone()
        check_log_softmax(logits, backend)
        assert same_bits(logits, before)


@pytest.mark.parametrize(("temperature", "scaled"), [(1.0, True), (2.0, True), (2.0, False), (0.5, True)])
def test_what_users_write_by_hand(backend: str, device: str, temperature: float, scaled: bool) -> None:
    """The usual recipe of F.cross_entropy and F.kl_div, in float64."""
    student, teacher, labels = inputs((4,), 127, device=device)
    labels[2] = -100
    t2 = temperature**2 if scaled else 1.0
    exact, counts = student.double().requires_grad_(), labels != -100
    soft = F.kl_div(
        F.log_softmax(exact[counts] / temperature, -1), F.softmax(teacher.double()[counts] / temperature, -1),
        reduction="batchmean",
    )  # fmt: skip
    expected = 0.3 * F.cross_entropy(exact, labels, label_smoothing=0.1) + 0.7 * t2 * soft
    (expected_grad,) = torch.autograd.grad(expected, exact)

    leaf = student.requires_grad_()
    loss = fastkd.kd_loss(
        leaf, teacher, labels, temperature=temperature, hard_weight=0.3, soft_weight=0.7, label_smoothing=0.1,
        scale_soft_by_t2=scaled, backend=backend,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, leaf)
    check_loss(loss.detach(), expected.detach())
    check_gradient(grad, expected_grad)


@pytest.mark.parametrize("items", [0, 0.0, 7, 2.5], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("leading", [(), (2, 3)], ids=str)
def test_num_items_as_number_and_as_tensor(leading: tuple[int, ...], shape: tuple[int, ...], items: float) -> None:
    """The same, whatever the tensor's shape; the mean of 0 items is 0, and so is its gradient."""
    given = inputs(leading, 17)
    leaf = given[0].requires_grad_()
    results = []
    for value in (items, torch.full(shape, items)):
        parts = fastkd.kd_loss(leaf, *given[1:], hard_weight=0.5, num_items=value, return_parts=True)
        results.append((*parts, *torch.autograd.grad(parts.loss, leaf)))
    for one, other in zip(*results, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=2e-7, atol=0)
    loss, hard, soft, grad = results[0]
    assert bool(loss) == bool(hard) == bool(soft) == bool(grad.any()) == bool(items)


@pytest.mark.parametrize("weights", [{"soft_weight": 0.0}, {"hard_weight": 0.0}, {}], ids=str)
def test_a_term_of_weight_0_is_not_computed(device: str, weights: dict[str, float]) -> None:
    """The operator is called without the tensors of a term that is absent."""
    given = inputs((2,), 127, device=device)
    calls = record_operators(lambda: fastkd.kd_loss(*given, **{"hard_weight": 0.5, "soft_weight": 0.5} | weights))
    (arguments,) = calls["fastkd::kd_rows"]
    _, teacher, labels, hard_scale, soft_scale = arguments[:5]
    assert (teacher is None, soft_scale is None) == (weights.get("soft_weight") == 0.0,) * 2
    assert (labels is None, hard_scale is None) == (weights.get("hard_weight") == 0.0,) * 2


def test_both_weights_0(backend: str, device: str) -> None:
    """A legal point of a schedule."""
    student, teacher, labels = inputs((2,), 127, device=device)
    student.requires_grad_()
    loss = fastkd.kd_loss(student, teacher, labels, hard_weight=0.0, soft_weight=0.0, backend=backend)
    loss.backward()
    assert loss == 0
    assert (student.grad == 0).all()


@pytest.mark.parametrize("wanted", [True, False])
def test_gradient_is_computed_if_wanted(device: str, wanted: bool) -> None:
    """Evaluation pays for the loss alone: no memory of the logits' size. Nor does training under no_grad."""
    student, teacher, _ = inputs((2,), 127, device=device)
    for mode in (torch.enable_grad, torch.no_grad):
        leaf = student.clone().requires_grad_(wanted)
        with mode():
            calls = record_operators(lambda leaf=leaf: fastkd.kd_loss(leaf, teacher))
        want_grad = calls["fastkd::kd_rows"][0][-4]
        assert want_grad == (wanted and mode is torch.enable_grad)


def record_operators(function: Any) -> dict[str, list[tuple[Any, ...]]]:
    """The package's operators that a call dispatches, and their arguments."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls: dict[str, list[tuple[Any, ...]]] = {}

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "fastkd":
                calls.setdefault(func._schema.name, []).append(args)
            return func(*args, **kwargs or {})

    with Recorder():
        function()
    return calls
