"""What only a GPU shows: sizes past 2³¹, streams, graphs, synchronisation, several devices, memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import _labels
from tests.assertions import check_call, check_gradient, check_loss, expect, run
from tests.cases import QWEN, STRUCTURES, inputs, keywords

pytestmark = pytest.mark.gpu

GIB = 2**30


def gradient(student: Tensor, *rest: Tensor, **arguments: Any) -> tuple[Tensor, Tensor]:
    """(loss, gradient) under a grad_output that is not 1."""
    leaf = student.detach().requires_grad_()
    loss = fastkd.kd_loss(leaf, *rest, **arguments)
    (grad,) = torch.autograd.grad(loss, leaf, torch.full_like(loss, 0.5))
    return loss.detach(), grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_more_than_2_31_elements(backend: str, reduction: str) -> None:
    """16384 × 151936 in bfloat16: ordinary logits of one step, 4.6 GiB each."""
    if torch.cuda.mem_get_info()[0] < 40 * GIB:
        pytest.skip("needs 40 GiB of free memory")
    rows = 16384
    student, teacher = (torch.empty(rows, QWEN, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    student.normal_(std=3.0), teacher.normal_(std=3.0)
    labels = torch.randint(0, QWEN, (rows,), device="cuda")
    arguments: dict[str, Any] = {"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7, "reduction": reduction}
    loss, grad = gradient(student, teacher, labels, backend=backend, **arguments)
    for row in (0, 1, 2**31 // QWEN, 2**31 // QWEN + 1, rows - 1):
        at = slice(row, row + 1)
        expected, expected_grad = expect(student[at], teacher[at], labels[at], **arguments | {"reduction": "none"})
        if reduction == "none":
            check_loss(loss[at], expected)
        check_gradient(grad[at], 0.5 * expected_grad / (rows if reduction == "mean" else 1))
    assert torch.isfinite(loss).all()


# One of each cluster size in either dtype, what lies about 48 KB and an SM's half, and the longest row of one pass.
@pytest.mark.parametrize("columns", [5500, 6100, 11500, 12270, 23000, 24500, 52000, 54000, 108000, 216000, 262144])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_grids(backend: str, dtype: torch.dtype, columns: int) -> None:
    given = inputs((3,), columns, dtype, device="cuda")
    for name in ("forward_kl", "jsd(0.5)"):
        arguments = {"temperature": 2.0, "hard_weight": 0.3, "divergence": name, "backend": backend}
        check_call(*given, **arguments)
        check_call(*given, reduction="none", **arguments)
    logits = given.student.requires_grad_()
    log_probs = fastkd.log_softmax(logits, temperature=2.0, backend=backend)
    (grad,) = torch.autograd.grad(log_probs, logits, given.teacher)
    exact = logits.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(torch.log_softmax(exact / 2.0, -1), exact, given.teacher.double())
    check_gradient(grad, expected)


def test_lengths_in_turn(backend: str) -> None:
    """A kernel that has been launched for short rows still is for long ones, whose grid was chosen before."""
    for columns in (54000, 6100, 54000):
        given = inputs((3,), columns, torch.bfloat16, device="cuda")
        check_call(*given, backend=backend, temperature=2.0, hard_weight=0.3)
        logits = given.student.requires_grad_()
        fastkd.log_softmax(logits, backend=backend).backward(given.teacher)
        assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_graph_capture(backend: str, name: str, reduction: str) -> None:
    """Captured once, forward and backward, and replayed on other logits and labels, masked ones too."""
    given = inputs((4,), 4099, torch.bfloat16, device="cuda")
    arguments = keywords(name) | {"reduction": reduction, "backend": backend}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            gradient(*given, **arguments)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = gradient(*given, **arguments)
    for _ in range(2):
        others = inputs((4,), 4099, torch.bfloat16, device="cuda")
        others.labels[1] = -100
        for static, fresh in zip(given, others, strict=True):
            static.copy_(fresh)
        graph.replay()
        expected_loss, expected_grad = gradient(*others, **arguments)
        assert torch.equal(loss, expected_loss)
        assert torch.equal(grad, expected_grad)


def test_side_stream(backend: str) -> None:
    """Everything runs on the current stream: behind what made the logits, ahead of what follows."""
    student, teacher, labels = inputs((64,), 32000, device="cuda")
    arguments = keywords("jsd(0.5)") | {"backend": backend}
    expected = gradient(student, teacher, labels, **arguments)
    late = torch.zeros_like(student)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(student)
        loss, grad = gradient(late, teacher, labels, **arguments)
        late.zero_()
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_no_synchronisation(backend: str, name: str, reduction: str) -> None:
    given = inputs((4,), 1000, device="cuda")
    weights = torch.ones(4, device="cuda")
    arguments = keywords(name) | {"reduction": reduction, "backend": backend, "token_weights": weights}
    gradient(*given, **arguments)  # compiles, which may synchronise
    leaf = given.student.clone().requires_grad_()
    with no_synchronisation():
        gradient(*given, mask=weights > 0, **arguments)
        parts = fastkd.kd_loss(*given, return_parts=True, **arguments)
        fastkd.log_softmax(leaf, backend=backend).sum().backward()
    assert parts.loss.is_cuda
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
        weights[0].item()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_another_device_than_the_current(backend: str, reduction: str) -> None:
    given = inputs((4,), 4099, device="cuda:1")
    with torch.cuda.device(0):
        check_call(*given, backend=backend, reduction=reduction, temperature=2.0, hard_weight=0.3)
    with pytest.raises(ValueError, match="teacher_logits: got device cuda:0, must be student_logits' cuda:1"):
        fastkd.kd_loss(given.student, given.teacher.to("cuda:0"), backend=backend)


@pytest.mark.parametrize("label", [-1, 1000, 10**9])
@pytest.mark.parametrize("name", STRUCTURES)
def test_label_out_of_range(backend: str, name: str, label: int) -> None:
    """NaN in that row's loss, and the others are right. Nothing is read outside the row."""
    student, teacher, labels = inputs((4,), 1000, device="cuda")
    arguments = {"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7, "reduction": "none"}
    expected, expected_grad = expect(student, teacher, labels, divergence=name, **arguments)
    labels[2] = label
    loss, grad = run(student, teacher, labels, backend=backend, **arguments | keywords(name))
    others = torch.tensor([0, 1, 3], device="cuda")
    assert loss[2].isnan()
    check_loss(loss[others], expected[others])
    check_gradient(grad[others], expected_grad[others])


def test_label_out_of_range_in_the_mean(backend: str) -> None:
    student, teacher, labels = inputs((4,), 1000, device="cuda")
    labels[2] = 1000
    assert run(student, teacher, labels, hard_weight=0.5, backend=backend)[0].isnan()
    labels[2] = -100
    assert run(student, teacher, labels, hard_weight=0.5, backend=backend)[0].isfinite()


def test_label_check_on_request(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTKD_CHECK_LABELS=1 looks at every call."""
    monkeypatch.setattr(_labels, "ALWAYS", True)
    student, teacher, labels = inputs((4,), 1000, device="cuda")
    labels[2] = 1000
    with pytest.raises(ValueError, match=r"^labels: got 1000 in row 2"):
        fastkd.kd_loss(student, teacher, labels, hard_weight=0.5, backend=backend)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_memory_of_the_gradient_in_place(backend: str, name: str, reduction: str) -> None:
    """Peak memory is the inputs': what is allocated on the way is a few numbers a row."""
    leaf, teacher, labels = inputs((2048,), 32000, torch.bfloat16, device="cuda")
    student = leaf.requires_grad_() * 1
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    if backend == "torch":
        pytest.skip("its chunks are large on a GPU (test_torch_memory has it on a CPU)")
    arguments = keywords(name) | {"reduction": reduction, "inplace_backward": True, "backend": backend}
    loss = fastkd.kd_loss(student, teacher, labels, **arguments)
    torch.autograd.grad(loss, student, torch.ones_like(loss))
    assert torch.cuda.max_memory_allocated() - before < student.numel() * student.element_size() / 20
