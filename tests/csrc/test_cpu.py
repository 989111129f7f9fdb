"""What the shared backend tests cannot see of the compiled CPU backend: its builds, its threads, its offsets."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd.backends import _arguments, cpu

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="needs the compiled CPU backend")


@pytest.fixture(autouse=True)
def restore() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if cpu._cpu is not None:
        cpu._cpu.use_isa("")


def run(student: Tensor, teacher: Tensor, labels: Tensor, **keywords: object) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    loss = fastkd.kd_loss(
        leaf, teacher, labels, temperature=2.0, hard_weight=0.5, reduction="none", backend="cpu", **keywords
    )
    loss.backward(torch.ones_like(loss))
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (
        (torch.randn(rows, columns) * 3).to(dtype),
        (torch.randn(rows, columns) * 3).to(dtype),
        torch.randint(columns, (rows,)),
    )


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "tvd", fastkd.JSD(0.3)], ids=str)
def test_builds_agree(isa: str, dtype: torch.dtype, divergence: str | fastkd.Divergence) -> None:
    case = inputs(3, 3001, dtype)
    best = run(*case, divergence=divergence)
    why = cpu._cpu.use_isa(isa)
    if why is not None:
        pytest.skip(why)
    assert cpu._cpu.isa() == isa
    loss, grad = run(*case, divergence=divergence)
    torch.testing.assert_close(loss, best[0], rtol=2e-6, atol=0)
    size = best[1].float().abs().max()
    torch.testing.assert_close(grad.float() / size, best[1].float() / size, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_builds_agree_on_hidden_states(isa: str, dtype: torch.dtype, kind: str) -> None:
    student, teacher, _ = inputs(3, 3001, dtype)

    def run() -> tuple[Tensor, Tensor]:
        leaf = student.clone().requires_grad_()
        loss = fastkd.hidden_loss(leaf, teacher, kind=kind, reduction="none", backend="cpu")
        return loss.detach(), torch.autograd.grad(loss, leaf, 100.0 * torch.ones_like(loss))[0]

    best = run()
    if why := cpu._cpu.use_isa(isa):
        pytest.skip(why)
    loss, grad = run()
    torch.testing.assert_close(loss, best[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(grad, best[1], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_builds_agree_on_a_top_k(isa: str, dtype: torch.dtype) -> None:
    """With listed columns in every tile, and none in some."""
    student, teacher, labels = inputs(3, 3001, dtype)
    best = [run(student, fastkd.top_k(teacher, k, temperature=2.0), labels) for k in (2, 200)]
    if why := cpu._cpu.use_isa(isa):
        pytest.skip(why)
    for k, (best_loss, best_grad) in zip((2, 200), best, strict=True):
        loss, grad = run(student, fastkd.top_k(teacher, k, temperature=2.0), labels)
        torch.testing.assert_close(loss, best_loss, rtol=2e-6, atol=0)
        size = best_grad.float().abs().max()
        torch.testing.assert_close(
            grad.float() / size, best_grad.float() / size, rtol=torch.finfo(dtype).eps, atol=1e-6
        )


def test_number_of_threads_changes_no_bit() -> None:
    case = inputs(67, 5000)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(run(*case))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_calls_from_many_threads() -> None:
    torch.set_num_threads(3)
    cases = [inputs(20 + i, 7000 + i) for i in range(6)]
    expected = [run(*case) for case in cases]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            for got, want in zip(pool.map(lambda case: run(*case), cases), expected, strict=True):
                assert torch.equal(got[0], want[0])
                assert torch.equal(got[1], want[1])


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "GOMP_parallel"), reason="needs an OpenMP to share"
)
def test_threads_are_pytorchs() -> None:
    """Others would have to share cores with these, which spin."""
    program = """
import os, torch, fastkd
torch.set_num_threads(3)
student = torch.randn(64, 8000, requires_grad=True)
(student + 1.0).sum().item()  # PyTorch has started its threads
before = len(os.listdir("/proc/self/task"))
fastkd.kd_loss(student, torch.randn(64, 8000), backend="cpu")
print(before, len(os.listdir("/proc/self/task")))
"""
    before, after = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    assert int(before) >= 3
    assert after == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_forked_child() -> None:
    """A child has none of its parent's threads, and must not wait for them."""
    rows = torch.randn(64, 1, 8000)
    out, lse = torch.zeros_like(rows), torch.empty(64, 2)
    matrix = _arguments.matrix

    def log_softmax(result: Tensor) -> None:
        cpu._cpu.log_softmax(matrix(rows), matrix(result), _arguments.ABSENT, lse.data_ptr(), 64, 1, 8000, 1.0, 2)

    expected = torch.empty_like(rows)
    log_softmax(expected)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a child that waits for ever is ended
        torch.set_num_threads(1)  # PyTorch's own threads did not survive either
        log_softmax(out)
        os._exit(0 if torch.equal(out, expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_offsets_beyond_32_bits() -> None:
    """Rows more than 2³¹ elements apart. Memory between them is never touched, so there is none."""
    stride = 2**31 + 5
    big = [torch.empty(0, dtype=torch.bfloat16) for _ in range(2)]
    try:
        for tensor in big:
            tensor.resize_(stride + 1000)
    except RuntimeError:
        pytest.skip("needs 8 GB of address space")
    student, teacher = (tensor.as_strided((2, 1000), (stride, 1)) for tensor in big)
    case = inputs(2, 1000, torch.bfloat16)
    student.copy_(case[0])
    teacher.copy_(case[1])
    got = fastkd.kd_loss(student, teacher, case[2], hard_weight=0.5, backend="cpu")
    assert torch.equal(got, fastkd.kd_loss(*case, hard_weight=0.5, backend="cpu"))
