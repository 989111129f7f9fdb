"""The benchmark of the integrations runs, at a tiny size, and what it compares agrees."""

from __future__ import annotations

import pytest

from fastkd.bench import integrations, timing

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("name", integrations.FRAMEWORKS)
def test_benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrations, "VOCAB", 300)
    monkeypatch.setattr(integrations, "LENGTH", 16)
    monkeypatch.setattr(timing, "ROUNDS", 1)
    found = integrations.measure(name, seconds=0)
    assert found["loss_error"] < 1e-5 and found["gradient_error"] < 1e-5
    assert all(found["seconds"][which] for which in ("own", "fastkd"))
