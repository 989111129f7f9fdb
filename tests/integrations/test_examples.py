"""The examples that need a framework run."""

from __future__ import annotations

import pytest

from tests.test_examples import example

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("name", ["hf_trainer", "trl_gkd", "lightning_module"])
def test_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What they return they print."""
    found = example(name).main(["--steps", "2"])
    printed = capsys.readouterr().out
    assert len(found) == 3
    assert all(f"{who}: " in printed for who in found)
