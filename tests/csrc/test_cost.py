"""What the compiled CUDA kernels issue for a row: as recorded for the cost model, and within their budgets."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import triton

from fastkd.backends import cuda
from fastkd.bench import cost
from tests.csrc.test_cuda_build import pytestmark as needs_the_module
from tests.csrc.test_cuda_build import sm_90

pytestmark = needs_the_module

# Instructions a column of bfloat16 at T = 2, the cross-entropy of the labels with it: of a row of 128256 columns,
# and a tenth more of one of 32000, where what is outside the loops weighs more.
BUDGETS = {"forward_kl": 32, "reverse_kl": 36, "cross_entropy": 32, "jsd": 62, "tvd": 50, "symmetric_kl": 40}


@functools.cache
def counted() -> dict[str, Any]:
    sm_90()  # skips where the module is not built for it
    return cost.record(cuda._cuda, triton.knobs.nvidia.cuobjdump.path)


def test_the_record_is_of_this_source() -> None:
    """But for what another version of the compiler changes."""
    found, recorded = (
        {
            (divergence, dtype, vocab): cost.per_column(kernel, grid, vocab)
            for divergence, dtype, vocab, kernel, grid in cost.cases(entries)
        }
        for entries in (counted(), cost.recorded())
    )
    assert found == pytest.approx(recorded, rel=0.03), "run: python -m fastkd.bench.cost && python -m fastkd.bench.docs"


@pytest.mark.parametrize("divergence", BUDGETS)
def test_budgets(divergence: str) -> None:
    found = {
        vocab: cost.per_column(kernel, grid, vocab)
        for name, dtype, vocab, kernel, grid in cost.cases(counted())
        if (name, dtype) == (divergence, "bfloat16")
    }
    assert found[128256] <= BUDGETS[divergence] and found[32000] <= 1.1 * BUDGETS[divergence], found


def test_rows_of_other_alignments_and_dtypes() -> None:
    """Take at most 1.5 times the instructions."""
    header, *lines = cost.fills_table(counted())
    assert len(lines) == len(BUDGETS) * len(cost.DTYPES) and len(header) == 3 + len(cost.FILLS)
    for line in lines:
        ratios = [float(text) for text in line[3:] if text]
        assert 1.0 < max(ratios) <= 1.5, line
