"""The documentation: its code runs, its links lead somewhere, and it has everything public. `make docs` builds it."""

from __future__ import annotations

import doctest
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fastkd
from fastkd import cache

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def on_a_cpu() -> Iterator[None]:
    """As printed in the examples."""
    with torch.device("cpu"):
        yield


@pytest.mark.parametrize("name", [
    "functional", "modules", "hidden", "layers", "sources", "teachers", "distributed", "cache.writer", "cache.dataset",
    "integrations.torch",
])  # fmt: skip
def test_docstrings(name: str) -> None:
    results = doctest.testmod(importlib.import_module(f"fastkd.{name}"))
    assert results.attempted and not results.failed


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
    silent = ("KDLossParts", "LinearLogits", "TopK", "HiddenLossParts", "CopyReport")
    for name, value in public.items():
        assert value.__doc__, name
        assert "Raises:" in value.__doc__ or name in silent, name


def test_every_argument_is_documented() -> None:
    """In the docstring and in the table of docs/loss.md."""
    table = (ROOT / "docs" / "loss.md").read_text()
    for argument in inspect.signature(fastkd.kd_loss).parameters:
        assert re.search(rf"^ +{argument}: ", fastkd.kd_loss.__doc__ or "", re.MULTILINE), argument
        assert re.search(rf"^\|[^|]*`{argument}`[^|]*\|", table, re.MULTILINE), argument


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = {"ids": lambda path: path.name}


def code(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if code(page)], **IDS)
def test_code_of_the_pages(page: Path) -> None:
    """Every Python block of it, in order, in one namespace. What is not to run is indented, or has no language."""
    namespace: dict[str, Any] = {"__name__": page.stem}
    for number, block in enumerate(code(page), start=1):
        exec(compile(block, f"{page.name}, Python block {number}", "exec"), namespace)


def anchors(page: Path) -> set[str]:
    """What GitHub and Sphinx call the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, **IDS)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.is_file(), target
        assert not anchor or anchor in anchors(found), target


def test_the_site_has_every_page_once() -> None:
    toctrees = re.findall(r"^```\{toctree\}\n(.*?)^```", (ROOT / "docs" / "index.md").read_text(), re.M | re.S)
    entries = [line for toctree in toctrees for line in toctree.splitlines() if line and not line.startswith(":")]
    assert sorted(entries) == sorted(page.stem for page in (ROOT / "docs").glob("*.md") if page.stem != "index")


@pytest.mark.parametrize("package", [fastkd, cache], ids=lambda package: package.__name__)
def test_the_reference_has_every_public_name(package: ModuleType) -> None:
    sections = re.split(r"^\.\. currentmodule:: ", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
    (section,) = [section for section in sections if section.splitlines()[0] == package.__name__]
    public = {name for name, value in vars(package).items() if callable(value) and not name.startswith("_")}
    assert set(re.findall(r"^\.\. auto\w+:: (\w+)$", section, re.MULTILINE)) == public


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
