"""The CUDA kernels of a row's rest, run under the SIMT shim: the tests of every backend that has the operation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastkd._request import Rows, RowSpec
from tests.backends import test_rest
from tests.csrc.simt import Grid, Simt


class Backend:
    """In two orders, which must give the same to the bit."""

    def __init__(self, simt: Simt, grid: Grid) -> None:
        self.simt, self.grid = simt, grid

    def unsupported(self, logits: Tensor, teacher: None) -> str | None:
        return "float64" if logits.dtype == torch.float64 else None

    def rest_rows(self, rows: Rows, spec: RowSpec, listed: Tensor, hard: Tensor, rest: Tensor, stats: Tensor) -> None:
        outputs = {"hard": hard, "soft": rest, "stats": stats, "dz": None}
        self.simt.rest(rows, spec, listed, None, outputs, self.grid)
        first = {name: outputs[name].clone() for name in ("hard", "soft")}
        self.simt.rest(rows, spec, listed, None, outputs, self.grid, seed=1)
        assert all(torch.equal(outputs[name], first[name]) for name in first)

    def rest_grad(
        self, rows: Rows, spec: RowSpec, listed: Tensor, outcome_grad: Tensor, stats: Tensor, grad: Tensor
    ) -> None:
        before = rows.student.clone()
        outputs = {"hard": None, "soft": None, "stats": stats, "dz": grad}
        self.simt.rest(rows, spec, listed, outcome_grad, outputs, self.grid)
        first = grad.clone()
        rows.student.copy_(before)  # grad may be over them
        self.simt.rest(rows, spec, listed, outcome_grad, outputs, self.grid, seed=1)
        assert torch.equal(grad, first)


@pytest.fixture(params=[Grid(1, False, 256), Grid(3, False)], ids=str)
def chosen(request: pytest.FixtureRequest, simt: Simt) -> Backend:
    return Backend(simt, request.param)


globals().update({name: test for name, test in vars(test_rest).items() if name.startswith("test_")})
