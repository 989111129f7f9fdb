"""The loss on a CPU beside the eager loss, and the cost of a call: one JSON, printed and optionally written.

    python benchmarks/cpu.py [--out benchmarks/results/NAME.json]

Contenders alternate, and each figure is a median over the rounds; compare figures of one run only.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd

SHAPES = ((1024, 32000), (4, 1000))
DTYPES = (torch.float32, torch.bfloat16)
TEMPERATURE, WEIGHT = 2.0, 0.5


def eager_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The loss as people write it, in float32."""
    student, teacher = student.float(), teacher.float()
    log_p_s, log_p_t = (F.log_softmax(x / TEMPERATURE, -1) for x in (student, teacher))
    soft = F.kl_div(log_p_s, log_p_t, reduction="batchmean", log_target=True)
    return WEIGHT * F.cross_entropy(student, labels) + (1 - WEIGHT) * TEMPERATURE**2 * soft


def fastkd_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    loss = fastkd.kd_loss(
        student, teacher, labels, temperature=TEMPERATURE, hard_weight=WEIGHT, soft_weight=1 - WEIGHT, backend="torch"
    )
    assert isinstance(loss, Tensor)
    return loss


def loss_and_backward(shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    rows, vocabulary = shape
    student = torch.randn(rows, vocabulary).to(dtype).requires_grad_()
    teacher = torch.randn(rows, vocabulary).to(dtype)
    labels = torch.randint(vocabulary, (rows,))

    def contender(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(student, teacher, labels), student)

    return {"eager": contender(eager_loss), "fastkd torch": contender(fastkd_loss)}


def registration_routes() -> dict[str, Callable[[], object]]:
    """A call of an operator that does nothing, by the two ways of registering one from Python."""
    schema = "(Tensor x, Tensor? y, float a, int b, SymInt c, str d) -> Tensor"

    def nothing(x: Tensor, y: Tensor | None, a: float, b: int, c: int, d: str) -> Tensor:
        return torch.empty(0)

    library = torch.library.Library("fastkd_routes", "DEF")
    library.define(f"library{schema}")
    library.impl("library", nothing, "CompositeExplicitAutograd")
    custom = torch.library.custom_op("fastkd_routes::custom_op", nothing, mutates_args=(), schema=schema)
    arguments = (torch.empty(4), torch.empty(4), 1.0, 1, 1, "")
    operator = torch.ops.fastkd_routes.library.default
    contenders = {"torch.library.Library": operator, "torch.library.custom_op": custom, "plain function": nothing}
    # The default argument keeps each closure's own operator; the library must outlive the calls.
    return {name: lambda call=call, _keep=library: call(*arguments) for name, call in contenders.items()}


def medians(contenders: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of a call, contenders alternating, over at least 7 rounds and about a second each."""
    for call in contenders.values():
        call()
    start = time.perf_counter()
    for call in contenders.values():
        call()
    rounds = max(7, int(len(contenders) / (time.perf_counter() - start)))
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(min(rounds, 5000)):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in samples.items()}


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    report: dict[str, object] = {
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }
    cases = {
        f"loss + backward, {rows} x {vocabulary}, {dtype}": loss_and_backward((rows, vocabulary), dtype)
        for rows, vocabulary in SHAPES
        for dtype in DTYPES
    }
    cases["call of an operator that does nothing"] = registration_routes()
    for name, contenders in cases.items():
        seconds = medians(contenders)
        first = next(iter(seconds.values()))
        report[name] = {who: {"seconds": s, "times the first's speed": first / s} for who, s in seconds.items()}
    text = json.dumps(report, indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
