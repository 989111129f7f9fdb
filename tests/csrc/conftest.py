"""Where what is compiled for the tests lies."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.csrc.simt import Simt


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of what is compiled, which all workers of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "simt"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def simt(folder: Path) -> Simt:
    return Simt(folder)
