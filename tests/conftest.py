"""Fixtures: the backends, the device they run on, poisoned memory, seeds. Without a GPU, Triton interprets."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Triton reads it when it is imported. Only tests may set it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # for `import tests.…`
pytest.register_assert_rewrite("tests.assertions")

from fastkd import _dispatch, _linear  # noqa: E402
from tests import interpreter  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    # NumPy warns of inf − inf, log 0 and a sum's overflow, which the kernels guard and a GPU computes in silence.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")
    config.addinivalue_line("filterwarnings", "ignore:overflow encountered in reduce:RuntimeWarning:numpy")
    # Of PyTorch 2.6, whenever a mesh of CPUs is made.
    config.addinivalue_line("filterwarnings", "ignore:DTensor random operators:UserWarning")
    # Of a machine without a compiler, on which test_dispatch says what must run.
    config.addinivalue_line("filterwarnings", "ignore:fastkd. backend 'cpu':RuntimeWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def defaults(device: str) -> Iterator[None]:
    """The same random numbers in every test, and tensors on the device under test."""
    torch.manual_seed(0)
    with torch.device(device) if device != "cpu" else contextlib.nullcontext():
        yield


@pytest.fixture(params=[name for name in _dispatch.NAMES if name != "cuda" or torch.cuda.is_available()])
def backend(request: pytest.FixtureRequest, poisoned_memory: None, device: str) -> str:
    """Each backend by name, if it can run here (test_dispatch says which must)."""
    name: str = request.param
    if why := _dispatch.refusal(torch.zeros(1, 1, device=device), name):
        pytest.skip(why)
    if name == "triton":
        interpreter.mend()
    return name


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written holds NaN, so that reading it shows."""

    def poison(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def allocate_poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() and not tensor.requires_grad else tensor

        return allocate_poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def restore_backend() -> Iterator[None]:
    """Undo :func:`fastkd.use_backend`."""
    before = _dispatch._override
    yield
    _dispatch._override = before


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shape of every product of matrices, as it is taken."""
    shapes: list[torch.Size] = []
    multiply = _linear._multiply

    def record(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *factors: float) -> None:
        shapes.append(out.shape)
        multiply(a, b, out, *factors)

    monkeypatch.setattr(_linear, "_multiply", record)
    return shapes
