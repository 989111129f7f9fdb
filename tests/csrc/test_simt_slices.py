"""The CUDA kernels on slices of the vocabulary, run under the SIMT shim: the tests of every backend."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastkd._request import NUM_STATS, Rows, RowSpec
from tests.backends import test_slices
from tests.csrc import test_simt_rest
from tests.csrc.simt import Grid, Simt


class Backend(test_simt_rest.Backend):
    """Its sums in two orders, which must give the same to the bit; the state of a slice by two blocks that keep it."""

    def unsupported(self, logits: Tensor, teacher: Tensor | None) -> str | None:
        return "float64" if logits.dtype == torch.float64 else None

    def kd_rows(
        self, rows: Rows, spec: RowSpec, hard: Tensor, soft: Tensor, stats: Tensor, grad: Tensor | None
    ) -> None:
        outputs = {"hard": hard, "soft": soft, "stats": stats, "dz": grad}
        self.simt.kd_rows(rows, spec, outputs, Grid(2, True))

    def kd_grad(self, rows: Rows, spec: RowSpec, stats: Tensor, grad: Tensor) -> None:
        outputs = {"hard": None, "soft": None, "stats": stats, "dz": grad}
        self.simt.kd_rows(rows, spec, outputs, self.grid)

    def slice_sums(self, rows: Rows, spec: RowSpec, stats: Tensor, sums: Tensor) -> None:
        self.simt.slice_sums(rows, spec, stats, sums, self.grid)
        first = sums.clone()
        self.simt.slice_sums(rows, spec, stats, sums, self.grid, seed=1)
        assert torch.equal(first, sums)


@pytest.fixture(params=[Grid(1, False), Grid(3, False)], ids=str)
def chosen(request: pytest.FixtureRequest, simt: Simt) -> Backend:
    return Backend(simt, request.param)


summing = chosen
globals().update({name: test for name, test in vars(test_slices).items() if name.startswith("test_")})


def test_a_label_that_is_none(simt: Simt) -> None:
    """Makes its row NaN, as ever: only the one label is in another slice."""
    rows = test_slices.make("cpu")
    rows.labels[:3] = torch.tensor([-1, test_slices.COLUMNS, test_slices.ELSEWHERE + 1])
    rows.labels[3] = test_slices.ELSEWHERE
    hard, soft, stats = test_slices.outputs(rows)
    Backend(simt, Grid(1, False)).kd_rows(rows, test_slices.spec_of("forward_kl"), hard, soft, stats, None)
    assert hard.isnan().tolist() == [True, True, True, False, False] and stats.shape[1] == NUM_STATS
