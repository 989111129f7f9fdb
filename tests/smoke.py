"""Try an installed fastkd: ``python tests/smoke.py``, in an environment that has it and mypy, from another folder.

Each backend that can run here is held to PyTorch's own functions in float64, in a few calls: the question is whether
the package is whole. ``make smoke`` and the wheels' workflow run it.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import fastkd
from fastkd import _dispatch

TESTS = Path(__file__).parent


def installed() -> None:
    """It is not the checkout's."""
    package = Path(fastkd.__file__).parent
    assert TESTS.parent not in package.parents or "site-packages" in package.parts, package
    assert importlib.metadata.version("fastkd") == fastkd.__version__
    print(f"fastkd {fastkd.__version__} · Python {platform.python_version()} · torch {torch.__version__} · {package}")
    subprocess.run([sys.executable, "-m", "fastkd", "info"], check=True, stdout=subprocess.DEVNULL)
    for name in filter(None, os.environ.get("FASTKD_REQUIRE", "").split(",")):
        assert (why := _dispatch.refusal(torch.empty(1, 1), name)) is None, why


def right(logits: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient by PyTorch."""
    logits = logits.detach().double().requires_grad_()
    log_p, log_q = (F.log_softmax(z.double() / 2, -1) for z in (teacher, logits))
    loss = 0.3 * F.cross_entropy(logits, labels) + 0.7 * 4 * F.kl_div(
        log_q, log_p, reduction="batchmean", log_target=True
    )
    return loss.detach(), torch.autograd.grad(loss, logits)[0]


def computes(backend: str) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 16), torch.randn(301, 16, requires_grad=True)
    teacher, labels = torch.randn(7, 301) * 3, torch.randint(301, (7,))
    keywords = {"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7, "backend": backend}
    logits = (hidden @ weight.T).detach().requires_grad_()
    loss, grad = right(logits, teacher, labels)
    for student, leaf, expected in (
        (logits, logits, grad),
        (fastkd.LinearLogits(hidden, weight), weight, grad.T @ hidden.double()),
    ):
        found = fastkd.kd_loss(student, teacher, labels, **keywords)
        found.backward()
        torch.testing.assert_close(found.double(), loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(leaf.grad.double(), expected, rtol=1e-4, atol=1e-6)
    # Traced as for compiling, which needs no compiler.
    traced = torch.compile(fastkd.kd_loss, fullgraph=True, backend="eager")
    listed = fastkd.top_k(teacher, 8, temperature=2.0)
    assert traced(logits, listed, labels, **keywords) == fastkd.kd_loss(logits, listed, labels, **keywords)
    print(f"{backend}: loss and gradients, and traced")


def types(**environment: str) -> None:
    """mypy --strict passes what is right in a user's program, and finds what is wrong: the lines that say so.

    (Tensor.backward has no types in PyTorch itself.)
    """
    program = TESTS / "users_program.py"
    command = [sys.executable, "-m", "mypy", "--strict", "--allow-untyped-calls", "--follow-imports=silent"]
    command += ["--config-file=", str(program)]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    found = {int(line) for line in re.findall(r"users_program\.py:(\d+): error", result.stdout)}
    lines = enumerate(program.read_text().splitlines(), start=1)
    assert found == {number for number, line in lines if "# error" in line}, result.stdout + result.stderr
    print(f"types: {len(found)} mistakes found")


if __name__ == "__main__":
    installed()
    for name in _dispatch.NAMES:
        if _dispatch.refusal(torch.empty(1, 1), name) is None:
            computes(name)
    types()
