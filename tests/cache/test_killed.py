"""A writer that is killed leaves what it had finished, and another goes on from there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(("mode", "kills"), [("operations", 28), ("moments", 30)])
def test_a_killed_writer(tmp_path: Path, mode: str, kills: int) -> None:
    """At every operation on files, and at random moments; see :mod:`tests.cache.killed`."""
    command = [sys.executable, "-m", "tests.cache.killed", mode, str(tmp_path)]
    environment = os.environ | {"PYTHONSAFEPATH": ""}  # which would leave ROOT out
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= kills
