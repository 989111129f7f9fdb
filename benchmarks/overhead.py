"""The cost of calling an operator that does nothing, by the two ways of registering one from Python, and of a function.

python benchmarks/overhead.py
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from fastkd.bench.timing import interleaved

SCHEMA = "(Tensor x, Tensor? y, float a, int b, SymInt c, str d) -> Tensor"
CALLS = 1000


def nothing(x: Tensor, y: Tensor | None, a: float, b: int, c: int, d: str) -> Tensor:
    return torch.empty(0)


def main() -> None:
    library = torch.library.Library("fastkd_overhead", "DEF")
    library.define(f"library{SCHEMA}")
    library.impl("library", nothing, "CompositeExplicitAutograd")
    routes = {
        "plain function": nothing,
        "torch.library.Library": torch.ops.fastkd_overhead.library.default,
        "torch.library.custom_op": torch.library.custom_op(
            "fastkd_overhead::custom_op", nothing, mutates_args=(), schema=SCHEMA
        ),
    }
    arguments = (torch.empty(4), torch.empty(4), 1.0, 1, 1, "")

    def repeat(route):
        return lambda: [route(*arguments) for _ in range(CALLS)]

    samples = interleaved({name: repeat(route) for name, route in routes.items()}, "cpu", seconds=5.0)
    for name, sample in samples.items():
        print(f"{name:<25}{statistics.median(sample['seconds']) / CALLS * 1e6:.2f} µs a call")


if __name__ == "__main__":
    main()
