"""Faults known of other implementations of this loss: each a test by its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import _dispatch, _labels
from fastkd._request import NUM_STATS, Place, Rows, RowSpec
from fastkd.divergences import resolve
from tests.assertions import check_call, check_gradient, expect, run
from tests.cases import DIVERGENCES, STRUCTURES, inputs, keywords

BOTH = {"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7}


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_t2_in_value_and_gradient(backend: str, device: str, reduction: str) -> None:
    """T² multiplies the soft term's value and its gradient, and nothing of the hard term."""
    student, teacher, labels = inputs((2,), 127, device=device)
    for given, ratio in (((student, teacher), 9.0), ((student, teacher, labels), None)):
        weights = {} if ratio else {"hard_weight": 1.0, "soft_weight": 0.0}
        with_t2, without = (
            run(*given, *(None,) * (3 - len(given)), temperature=3.0, scale_soft_by_t2=scaled, reduction=reduction,
                backend=backend, **weights)
            for scaled in (True, False)
        )  # fmt: skip
        for left, right in zip(with_t2, without, strict=True):
            expected = (ratio or 1.0) * right
            assert (left - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
@pytest.mark.parametrize("inplace", [False, True])
def test_float16_gradients_do_not_vanish(backend: str, device: str, inplace: bool, scale: float) -> None:
    """A mean over many rows, times a GradScaler's factor: what float16 holds of the product, not of the mean alone."""
    rows, columns = 6, 600
    many = dict(BOTH, num_items=600)
    student, teacher, labels = inputs((rows,), columns, torch.float16, device=device, spread=0.3)
    leaf = student.clone().requires_grad_()
    loss = fastkd.kd_loss(leaf * 1, teacher, labels, inplace_backward=inplace, backend=backend, **many)
    (loss * scale).backward()
    _, expected = expect(student, teacher, labels, grad_output=torch.tensor(scale, device=device), **many)
    rounded = expected.half().double()
    assert leaf.grad is not None
    error = (leaf.grad.double() - rounded).norm() / rounded.norm()
    assert error <= 1e-3 if scale == 1.0 else error <= 5e-4
    assert (expected.half() == 0).float().mean() < 0.01 or scale == 1.0


@pytest.mark.parametrize("name", STRUCTURES)
def test_grad_output_other_than_1(backend: str, device: str, name: str) -> None:
    """Scaled losses, and per-row ones, reach the gradient."""
    student, teacher, labels = inputs((3,), 127, device=device)
    arguments = keywords(name) | {"backend": backend}
    plain = run(student, teacher, labels, **arguments)[1]
    scaled = run(student, teacher, labels, grad_output=torch.tensor(-3.0, device=device), **arguments)[1]
    check_gradient(scaled, -3.0 * plain.double())
    per_row = torch.tensor([1.0, 0.0, -2.0], device=device)
    plain = run(student, teacher, labels, reduction="none", **arguments)[1]
    scaled = run(student, teacher, labels, grad_output=per_row, reduction="none", **arguments)[1]
    check_gradient(scaled, per_row.double().unsqueeze(1) * plain.double())


@pytest.mark.parametrize("name", DIVERGENCES)
def test_ignore_index_is_honoured(backend: str, device: str, name: str) -> None:
    """By the soft term as well: an ignored row changes neither value, gradient nor denominator."""
    student, teacher, labels = inputs((3,), 127, device=device)
    labels[1] = -100
    arguments = keywords(name) | {"backend": backend}
    loss, grad = run(student, teacher, labels, **arguments)
    left = torch.tensor([0, 2], device=device)
    loss_left, grad_left = run(student[left], teacher[left], labels[left], **arguments)
    torch.testing.assert_close(loss, loss_left, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(grad[left], grad_left, rtol=1e-5, atol=1e-9)
    assert (grad[1] == 0).all()


def test_padding_columns_have_no_mass(backend: str, device: str) -> None:
    """A column of zeros would be given exp(0). Whatever is there, the loss is that of the tokens alone."""
    student, teacher, labels = inputs((2,), 120, device=device)
    arguments = BOTH | {"backend": backend, "label_smoothing": 0.1}
    loss, grad = run(student, teacher, labels, **arguments)
    for filling in (0.0, 50.0, torch.nan):
        padding = torch.full((2, 8), filling, device=device)
        padded = torch.cat([student, padding], -1), torch.cat([teacher, padding], -1)
        padded_loss, padded_grad = run(*padded, labels, vocab_size=120, **arguments)
        torch.testing.assert_close(padded_loss, loss, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(padded_grad[:, :120], grad, rtol=1e-5, atol=1e-9)
        assert (padded_grad[:, 120:] == 0).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_minus_inf_is_not_nan(backend: str, device: str, name: str) -> None:
    """Both mask the same tokens, as constrained decoding does: as if those columns were not there."""
    student, teacher, labels = inputs((2,), 126, device=device)
    labels = labels // 2 * 2
    kept = slice(None, None, 2)
    expected = run(
        student[:, kept].contiguous(), teacher[:, kept].contiguous(), labels // 2, backend=backend, **keywords(name)
    )
    student[:, 1::2] = teacher[:, 1::2] = -torch.inf
    loss, grad = run(student, teacher, labels, backend=backend, **keywords(name))
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad[:, kept], expected[1], rtol=1e-4, atol=1e-6)
    assert (grad[:, 1::2] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_in_place_corrupts_nobody(backend: str, device: str, reduction: str) -> None:
    """By default the logits stay whole for other losses, before and after; so does the gradient of a first."""
    leaf, teacher, labels = inputs((2,), 127, device=device)
    leaf.requires_grad_()
    student = leaf * 1
    before, values = student.square().sum(), student.detach().clone()
    first = fastkd.kd_loss(student, teacher, labels, reduction=reduction, backend=backend, **BOTH).sum()
    second = fastkd.kd_loss(student, teacher, reduction=reduction, backend=backend).sum()
    after = student.pow(3).sum()
    (before + first + second + after).backward()
    assert torch.equal(student.detach(), values)
    z = values.double()
    losses = [
        expect(values, teacher, labels, reduction=reduction, **BOTH),
        expect(values, teacher, None, reduction=reduction),
    ]
    check_gradient(leaf.grad, 2.0 * z + 3.0 * z**2 + losses[0][1] + losses[1][1])


@pytest.mark.parametrize("backend", _dispatch.NAMES)
def test_offsets_past_2_31(backend: str, device: str) -> None:
    """The third row begins past 2³¹ elements, at a stride below: a product of two 32-bit numbers would not reach it.

    The memory between the rows is reserved and never touched.
    """
    if why := _dispatch.refusal(torch.zeros(1, 1, device=device), backend):
        pytest.skip(why)
    stride = 2**30 + 16
    values = inputs((3,), 131, torch.bfloat16, device=device)
    far = []
    for logits in values[:2]:
        store = torch.empty(2 * stride + 131, dtype=torch.bfloat16, device=device)  # 4 GiB
        far.append(store.as_strided((3, 131), (stride, 1)).copy_(logits))
    student, teacher = far
    check_call(student, teacher, values.labels, backend=backend, divergence="jsd(0.5)", **BOTH)
    scales = torch.rand(2, 3, device=device)
    spec = (2.0, 0, 0.5, 0.5, 0.5, 0.0, 131, None)
    rest = (values.labels, *scales, None, *spec)
    expected = torch.ops.fastkd.kd_rows(values.student, values.teacher, *rest, True, *Place(backend))[3]
    torch.ops.fastkd.kd_rows_(student, teacher, *rest, *Place(backend))
    torch.testing.assert_close(student, expected, rtol=torch.finfo(torch.bfloat16).eps, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("extra", ["plain", "everything"])
def test_the_call_does_not_synchronise(reduction: str, extra: str) -> None:
    """From the public functions to the operators and back; see below for what is behind those, and tests/gpu.

    Meta tensors have no data, and are not on a CPU: to ask for a value of theirs is an error.
    """
    student, teacher = (torch.empty(3, 50, device="meta", requires_grad=True) for _ in range(2))
    labels = torch.empty(3, dtype=torch.int64, device="meta")
    arguments: dict[str, Any] = BOTH | {"reduction": reduction}
    if extra == "everything":
        arguments |= {
            "mask": labels > 3, "token_weights": torch.empty(3, device="meta"), "label_smoothing": 0.1,
            "vocab_size": 47, "divergence": fastkd.JSD(0.5), "return_parts": True,
        }  # fmt: skip
        arguments |= {"num_items": torch.empty((), device="meta")} if reduction == "mean" else {}
    result = fastkd.kd_loss(student, teacher, labels, **arguments)
    loss = result.loss if extra == "everything" else result
    (2.0 * loss).sum().backward()
    fastkd.log_softmax(student, temperature=2.0).sum().backward()


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_pytorch_backend_does_not_synchronise(name: str) -> None:
    """It looks at data on a CPU alone, where that costs nothing."""
    backend, spec = _dispatch.backend("torch"), RowSpec(2.0, *numbers(name), 0.1, 47)
    student, teacher, grad = (torch.empty(1, 3, 50, device="meta") for _ in range(3))
    labels = torch.empty(3, dtype=torch.int64, device="meta")
    scale, hard, soft = (torch.empty(3, device="meta") for _ in range(3))
    stats = torch.empty(3, NUM_STATS, device="meta")
    rows = Rows(student, teacher, labels, scale, scale)
    backend.kd_rows(rows, spec, hard, soft, stats, grad)
    backend.kd_grad(rows, spec, stats, grad)
    backend.scale_(grad, torch.empty((), device="meta"))
    lse = torch.empty(3, 2, device="meta")
    backend.log_softmax(student, grad, lse, 2.0)
    backend.log_softmax_backward(student, teacher, lse, grad, 2.0)


class NoSync(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    FORBIDDEN = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name not in self.FORBIDDEN, f"{func} synchronises"
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_triton_backend_does_not_synchronise(device: str, name: str) -> None:
    """The operators, down to the launches. Labels are looked at on a CPU alone (test_labels), so not here."""
    student, teacher, labels = inputs((2,), 50, device=device)
    scales = torch.rand(2, 2, device=device)
    spec = (2.0, *numbers(name), 0.1, 47, None)
    rows = (teacher, labels % 47, *scales, None)
    operators = torch.ops.fastkd
    with NoSync(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(_labels, "check_rows", lambda *_: None)
        *_, stats, grad = operators.kd_rows(student, *rows, *spec, True, *Place("triton"))
        operators.kd_grad(student, *rows, stats, *spec, *Place("triton"))
        operators.scale_(grad, scales[0, 0], "triton")
        out, lse = operators.log_softmax(student, 2.0, None, torch.float32, "triton")
        operators.log_softmax_backward(out, student, lse, 2.0, None, "triton")
    with NoSync(), pytest.raises(AssertionError, match="synchronises"):
        scales[0, 0].item()


def numbers(name: str) -> tuple[int, float, float, float]:
    """(formula, c_t, c_s, w)"""
    member = resolve(DIVERGENCES[name].argument)
    return int(member.formula), member.c_t, member.c_s, member.w


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mean_is_not_divided_by_the_vocabulary(backend: str, device: str, reduction: str) -> None:
    """Two one-hot distributions differ by log V's worth whatever V, and twice the columns do not halve the loss."""
    losses = []
    for columns in (64, 128):
        student = torch.zeros(3, columns, device=device)
        labels = torch.zeros(3, dtype=torch.int64, device=device)
        loss = fastkd.kd_loss(student, student, labels, hard_weight=1.0, reduction=reduction, backend=backend)
        losses.append(loss.mean() / (3.0 if reduction == "sum" else 1.0))
    expected = torch.tensor([64.0, 128.0], device=device).log()
    torch.testing.assert_close(torch.stack(losses), expected, rtol=1e-6, atol=0.0)


def test_no_cross_entropy_by_silent_default(backend: str, device: str) -> None:
    """Labels without a weight are an error; without labels the loss is the divergence, whole, and nothing else."""
    student, teacher, labels = inputs((2,), 127, device=device)
    with pytest.raises(ValueError, match="hard_weight"):
        fastkd.kd_loss(student, teacher, labels, backend=backend)
    check_call(student, teacher, backend=backend, hard_weight=None, soft_weight=1.0, temperature=1.0)
    assert torch.equal(
        fastkd.kd_loss(student, teacher, backend=backend),
        fastkd.kd_loss(student, teacher, backend=backend, soft_weight=1.0, temperature=1.0, divergence="forward_kl"),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", STRUCTURES)
def test_half_precision_is_computed_in_float32(backend: str, device: str, name: str, dtype: torch.dtype) -> None:
    """The loss of rounded logits is that of the same values in float32, to float32's digits."""
    student, teacher, labels = inputs((2,), 2100, dtype, device=device)
    arguments = keywords(name) | {"backend": backend, "reduction": "none"}
    loss, grad = run(student, teacher, labels, **arguments)
    exact_loss, exact_grad = run(student.float(), teacher.float(), labels, **arguments)
    torch.testing.assert_close(loss, exact_loss, rtol=1e-6, atol=1e-7)
    # The gradient is rounded once, on its way to storage; a unit for a tie that falls the other way.
    torch.testing.assert_close(grad, exact_grad.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-7)
