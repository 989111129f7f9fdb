"""The cases under pytest-benchmark: ``pytest benchmarks --benchmark-only``."""

from __future__ import annotations

import pytest
import torch

from fastkd.bench import run
from fastkd.bench.cases import Case, select
from fastkd.bench.provider import Provider
from fastkd.bench.providers import PROVIDERS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.filterwarnings("default")  # what contenders warn of is theirs
@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.name)
@pytest.mark.parametrize("case", select(DEVICE, everything=False), ids=lambda case: case.name)
def test_speed(benchmark, case: Case, provider: Provider) -> None:
    why = provider.unavailable(DEVICE)
    if why is not None:
        pytest.skip(why)
    found = run.prepare(provider, case, DEVICE)
    if found is None:
        pytest.skip("does not compute such a case")
    result, call = found
    assert result["status"] == "ok" and call is not None, result

    def wait() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info |= {"bytes": case.bytes, "error": result.get("error")}
    benchmark.pedantic(wait, rounds=5, warmup_rounds=1)
