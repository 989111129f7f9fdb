"""One call of a backend on each shape that the cost model speaks of, for a profiler: ``ncu … one_call.py cuda``."""

from __future__ import annotations

import sys

import torch

from fastkd.bench import check
from fastkd.bench.cases import Case
from fastkd.bench.providers.fastkd import loss

CASES = (
    Case(4096, 128256),
    Case(4096, 128256, divergence="reverse_kl"),
    Case(4096, 128256, divergence="jsd"),
    Case(4096, 32000),
    Case(4096, 50257),
    Case(4096, 256000),
    Case(4096, 128256, "float32"),
)


def main(backend: str) -> None:
    for case in CASES:
        check.call(loss(backend, case), case.inputs("cuda"))
        torch.cuda.synchronize()
        print(case.name, file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1])
