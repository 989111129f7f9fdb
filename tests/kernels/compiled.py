"""Launch the row kernels on a GPU that is not there, and print how many variants each call compiled, as JSON.

A program of its own because Triton decides at import whether it interprets, as the rest of the suite does.
"""

from __future__ import annotations

import json
import os
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastkd._request import Rows, RowSpec
from fastkd.kernels import hidden, kd_rows, log_softmax, rest, scale

# Rows, columns, offset of the labels, and the divergence's numbers.
CALLS: dict[str, tuple[int, int, int, tuple[int, float, float, float]]] = {
    "first": (4096, 500, 0, (0, 0.5, 0.5, 0.5)),
    "another number of rows": (7, 500, 0, (0, 0.5, 0.5, 0.5)),
    "one row": (1, 500, 0, (0, 0.5, 0.5, 0.5)),
    "another vocabulary": (7, 501, 0, (0, 0.5, 0.5, 0.5)),
    "another beta": (7, 500, 0, (0, 0.3, 0.7, 0.3)),
    "labels off a boundary": (7, 500, 1, (0, 0.5, 0.5, 0.5)),
    "few long rows": (3, 50000, 0, (0, 0.5, 0.5, 0.5)),
    "one long row": (1, 50000, 0, (0, 0.3, 0.7, 0.3)),
    "another structure": (7, 500, 0, (0, 1.0, 0.0, 0.0)),
}


class Driver:
    """Of a GPU that takes no launches."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def call(rows: int, columns: int, offset: int, divergence: tuple[int, float, float, float]) -> None:
    z, u, dz = (torch.empty(1, rows, columns, dtype=torch.bfloat16) for _ in range(3))
    labels = torch.zeros(rows + offset, dtype=torch.int64)[offset:]
    hard, soft, lse, stats = (torch.ones(rows, width).squeeze(1) for width in (1, 1, 2, 8))
    spec = RowSpec(2.0, *divergence, 0.0, columns)
    kd_rows.kd_rows(Rows(z, u, labels, hard, soft), spec, hard, soft, stats, dz)
    kd_rows.kd_rows(Rows(z, u, labels, hard, soft), spec, None, None, stats, dz)
    scale.scale_(dz, torch.tensor(0.5))
    log_softmax.log_softmax(z, dz, lse, 2.0)
    log_softmax.log_softmax_backward(z, u, lse, dz, 2.0)
    hidden.hidden_rows(z, u, hard, 0, soft, dz)
    listed, outcomes = torch.zeros(rows, 17 + offset, dtype=torch.int32), torch.zeros(rows, 18 + offset)
    of_rest = Rows(z, None, labels, hard, soft)
    rest.rest_rows(of_rest, spec, listed, hard, soft, stats)
    rest.rest_grad(of_rest, spec, listed, outcomes, stats, dz)


def main() -> None:
    compiled: list[str] = []
    run = JITFunction.run

    def warm(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        return run(self, *arguments, grid=grid, warmup=True, **options)

    JITFunction.run = warm
    triton.knobs.runtime.jit_post_compile_hook = lambda **details: compiled.append(details["fn"].name)
    triton.runtime.driver.set_active(Driver())
    counts = {}
    for name, arguments in CALLS.items():
        call(*arguments)
        counts[name] = len(compiled)
        compiled.clear()
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
