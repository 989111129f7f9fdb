"""The examples of the documentation run."""

from __future__ import annotations

import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastkd
from fastkd import cache

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(autouse=True)
def on_a_cpu() -> Iterator[None]:
    """As printed in the examples."""
    with torch.device("cpu"):
        yield


@pytest.mark.parametrize("name", [
    "functional", "modules", "hidden", "layers", "divergences", "_dispatch", "_labels", "distributed",
    "cache.writer", "cache.dataset",
])  # fmt: skip
def test_docstrings(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"fastkd.{name}"))
    assert results.failed == 0


@pytest.mark.parametrize(
    "public",
    [
        fastkd.kd_loss,
        fastkd.log_softmax,
        fastkd.KDLoss,
        fastkd.LinearLogits,
        fastkd.TopK,
        fastkd.top_k,
        fastkd.sample_tokens,
        fastkd.hidden_loss,
        fastkd.HiddenLoss,
        fastkd.layer_map,
        fastkd.capture,
        fastkd.copy_layers,
        cache.Writer,
        cache.CachedDataset,
    ],
    ids=lambda public: public.__name__,
)
def test_there_is_an_example(public: Any) -> None:
    assert doctest.DocTestParser().get_examples(public.__doc__)


def test_everything_public_is_documented() -> None:
    """Functions and classes say what they do, and what bad arguments raise."""
    public = {name: value for name, value in vars(fastkd).items() if callable(value) and not name.startswith("_")}
    assert {"kd_loss", "log_softmax", "KDLoss", "JSD", "SkewKL", "SkewReverseKL", "Divergence", "use_backend"} <= set(
        public
    )
    silent = ("KDLoss", "KDLossParts", "LinearLogits", "TopK", "HiddenLossParts", "CopyReport")
    for name, value in public.items():
        assert value.__doc__, name
        assert "Raises:" in value.__doc__ or name in silent, name


def test_every_argument_is_documented() -> None:
    """In the docstring and in README's table."""
    import inspect

    table = README.read_text()
    for argument in inspect.signature(fastkd.kd_loss).parameters:
        assert re.search(rf"^ +{argument}: ", fastkd.kd_loss.__doc__ or "", re.MULTILINE), argument
        assert re.search(rf"^\|[^|]*`{argument}`[^|]*\|", table, re.MULTILINE), argument


def test_readme() -> None:
    """Every Python block of it, in order, in one namespace."""
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    namespace: dict[str, Any] = {"__name__": "readme"}
    for number, block in enumerate(blocks, start=1):
        exec(compile(block, f"README.md, Python block {number}", "exec"), namespace)
