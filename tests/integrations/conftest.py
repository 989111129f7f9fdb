"""The group ``integration`` needs an environment of its own, ``make test-integrations``; elsewhere it is not read."""

from __future__ import annotations

from pathlib import Path

import pytest

ANYWHERE = ("test_bert.py", "test_torch.py")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_test = collection_path.name.startswith("test_") and collection_path.name not in ANYWHERE
    return True if is_test and config.getoption("markexpr") != "integration" else None
