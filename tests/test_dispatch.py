"""Which backend runs: by argument, by use_backend, by environment, by itself; and what is said if it cannot."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch

import fastkd
from fastkd import _dispatch
from tests.cases import inputs

pytestmark = pytest.mark.usefixtures("restore_backend")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, without this suite's environment."""
    own = ("FASTKD_BACKEND", "FASTKD_CHECK_LABELS", "TRITON_INTERPRET")
    clean = {name: value for name, value in os.environ.items() if name not in own}
    return subprocess.run([sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that ran."""
    names: list[str] = []
    choose = _dispatch.choose

    def choose_and_tell(*arguments: Any) -> Any:
        chosen: Any = choose(*arguments)
        names.append(chosen.__name__.rpartition(".")[2])
        return chosen

    monkeypatch.setattr(_dispatch, "choose", choose_and_tell)
    return names


def call(**keywords: Any) -> None:
    fastkd.kd_loss(torch.zeros(1, 8), torch.zeros(1, 8), **keywords)


@pytest.fixture
def automatic(device: str) -> str:
    """What runs where nothing is asked for."""
    order = {"cuda": ("triton", "cuda"), "cpu": ("cpu", "torch")}[device]
    return next(name for name in order if _dispatch.refusal(torch.zeros(1, 8, device=device), name) is None)


def test_what_must_run_here(device: str) -> None:
    """Backends that the shared tests may not skip: there is a compiler for the one that needs it."""
    compiled = device == "cpu" and (shutil.which("g++") or shutil.which("clang++"))
    for name in ("torch", "triton", "cpu") if compiled else ("torch", "triton"):
        assert _dispatch.refusal(torch.zeros(1, 8, device=device), name) is None


def test_by_itself(ran: list[str], automatic: str) -> None:
    call()
    fastkd.log_softmax(torch.zeros(1, 8))
    assert ran == [automatic] * 2


def test_by_argument(ran: list[str], backend: str) -> None:
    call(backend=backend)
    fastkd.log_softmax(torch.zeros(1, 8), backend=backend)
    fastkd.KDLoss(backend=backend)(torch.zeros(1, 8), torch.zeros(1, 8))
    assert ran == [backend] * 3


def test_backward_runs_where_forward_did(ran: list[str], backend: str) -> None:
    student, teacher, _ = inputs((2,), 17)
    for reduction in ("mean", "none"):
        with fastkd.use_backend(backend):
            loss = fastkd.kd_loss(student.requires_grad_(), teacher, reduction=reduction).sum()
        (2.0 * loss).backward()
    assert set(ran) == {backend}


def test_use_backend_as_a_function(ran: list[str], automatic: str) -> None:
    fastkd.use_backend("triton")
    call()
    call(backend="torch")  # the argument goes first
    fastkd.use_backend(None)
    call()
    assert ran == ["triton", "torch", automatic]


def test_use_backend_for_a_block(ran: list[str], automatic: str) -> None:
    with fastkd.use_backend("triton"):
        call()
        with fastkd.use_backend("torch"):
            call()
        call()
        with fastkd.use_backend(None):
            call()
    call()
    assert ran == ["triton", "torch", "triton", automatic, automatic]


def test_use_backend_again(ran: list[str], automatic: str) -> None:
    """One object may serve several blocks."""
    chosen = fastkd.use_backend("torch")
    for _ in range(2):
        with chosen:
            call()
            with chosen:
                pass
            call()
        call()
    assert ran == ["torch", "torch", automatic] * 2


def test_use_backend_after_an_error(ran: list[str], automatic: str) -> None:
    with pytest.raises(ZeroDivisionError), fastkd.use_backend("triton"):
        raise ZeroDivisionError
    call()
    assert ran == [automatic]


@pytest.mark.parametrize("name", ["opencl", "", "Torch", 1])
def test_unknown_name(name: Any) -> None:
    for function, argument in ((fastkd.use_backend, "use_backend"), (lambda name: call(backend=name), "backend")):
        with pytest.raises(
            ValueError, match=f"^{argument}: got {name!r}, must be one of 'cpu', 'cuda', 'torch', 'triton'$"
        ):
            function(name)
    assert _dispatch._override == ""


def test_environment() -> None:
    """Goes last, and is checked when the package is imported."""
    code = "import fastkd; from fastkd import _dispatch as d; print(repr(d.requested(None)), d.requested('torch'));"
    code += "fastkd.use_backend('torch'); print(d.requested(None)); fastkd.use_backend(None); print(d.requested(None))"
    result = python(code, FASTKD_BACKEND="triton")
    assert result.stdout.split() == ["'triton'", "torch", "torch", "triton"]
    result = python("import fastkd", FASTKD_BACKEND="cudnn")
    assert "ValueError: FASTKD_BACKEND: got 'cudnn', must be one of 'cpu', 'cuda', 'torch', 'triton'" in result.stderr


@pytest.mark.parametrize("name", [name for name in _dispatch.NAMES if name != "torch"])
def test_float64_by_name(name: str, device: str) -> None:
    """No silent fallback: what the backend cannot do is an error, in the loss and in log_softmax."""
    if why := _dispatch.refusal(torch.zeros(1, 1, device=device), name):
        pytest.skip(why)
    logits = torch.zeros(1, 8, dtype=torch.float64)
    message = f"^backend '{name}' cannot run here: .*float64"
    with pytest.raises(RuntimeError, match=message):
        fastkd.kd_loss(logits, logits, backend=name)
    with pytest.raises(RuntimeError, match=message):
        fastkd.log_softmax(logits, backend=name)
    with pytest.raises(RuntimeError, match=message), fastkd.use_backend(name):
        fastkd.kd_loss(logits, logits)


def test_float64_by_itself(ran: list[str], device: str) -> None:
    logits = torch.zeros(1, 8, dtype=torch.float64, device=device)
    fastkd.kd_loss(logits, logits)
    assert ran == ["torch"]


TRITON_BY_NAME = "import fastkd, torch; z = torch.zeros(1, 8); fastkd.kd_loss(z, z, backend='triton')"


def test_triton_on_a_cpu() -> None:
    result = python(TRITON_BY_NAME)
    assert re.search("RuntimeError: backend 'triton' cannot run here: .*CPU.*TRITON_INTERPRET=1", result.stderr)


NOT_BUILT = "import sys, torch; sys.modules['fastkd._cpu'] = None; import fastkd; z = torch.zeros(1, 8);"


def test_a_missing_compiler_is_seen() -> None:
    """Pip hides what the build says, so that the first call on a CPU says once that it is slower, and the remedy."""
    calls = "fastkd.kd_loss(z, z); fastkd.log_softmax(z)"
    lines = python(NOT_BUILT + calls).stderr.splitlines()
    assert [line for line in lines if "RuntimeWarning" in line] == lines[:1]
    assert "RuntimeWarning: fastkd: backend 'cpu' cannot run here" in lines[0]
    assert "with g++ or clang installed, reinstall fastkd" in lines[0] and "FASTKD_BACKEND" in lines[0]
    # Not where another backend would do no better, or was asked for, or where the user filters it.
    assert python(NOT_BUILT + "fastkd.kd_loss(z.double(), z.double())").stderr == ""
    assert python(NOT_BUILT + calls, FASTKD_BACKEND="torch").stderr == ""
    assert python(NOT_BUILT + calls, PYTHONWARNINGS="ignore::RuntimeWarning:fastkd._dispatch").stderr == ""


def test_triton_not_installed() -> None:
    """The error says what is missing, and everything else works without."""
    code = "import sys; sys.modules['triton'] = None; import fastkd, torch; z = torch.zeros(1, 8)"
    code += "; print(fastkd.kd_loss(z, z).item()); fastkd.kd_loss(z, z, backend='triton')"
    result = python(code, TRITON_INTERPRET="1")
    assert result.stdout == "0.0\n"
    assert "RuntimeError: backend 'triton' cannot run here: triton cannot be imported" in result.stderr


def test_import_is_light() -> None:
    """Neither Triton, nor its kernels, nor a compiler, nor what the demo needs, until they are used."""
    result = python("import sys, torch; before = set(sys.modules); import fastkd; print(*(set(sys.modules) - before))")
    loaded = result.stdout.split()
    assert "fastkd.functional" in loaded
    assert not [name for name in loaded if name.startswith(("triton", "fastkd.kernels", "fastkd.demo"))]
    assert {name.partition(".")[0] for name in loaded} == {"fastkd"}


def test_every_backend_says_why() -> None:
    """A reason is a sentence fragment or None, never an exception."""
    for name in _dispatch.NAMES:
        for device in ("cpu", "meta"):
            why = _dispatch.refusal(torch.zeros(1, 8, device=device), name)
            assert why is None or (isinstance(why, str) and why)


def test_preferences_are_backends() -> None:
    assert {name for names in _dispatch.PREFERENCE.values() for name in names} <= set(_dispatch.NAMES)
    for names in _dispatch.PREFERENCE.values():
        assert names[-1] == "torch"  # which runs anywhere
