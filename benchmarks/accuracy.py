"""The digits of loss and gradient in every regime: ``python -m fastkd.bench.accuracy --out FILE [--backend NAME ...]``.

For each backend, divergence and regime the worst of all temperatures and vocabularies, in float32 against the
definitions in float64: the relative errors of the soft losses and of their gradient, in norm. Beside them those of the
definitions in float32, as people write them in PyTorch. And what a bfloat16 gradient loses that backward scales, with
what it would cost to compute it there. ``fastkd.bench.docs`` makes the tables of it.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd import Divergence
from fastkd.bench import run, timing

PLAIN = "PyTorch"  # the definitions in float32
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
VOCABULARIES = {100: 32, 1000: 32, 32000: 4, 151936: 2}  # columns: rows
DIVERGENCES: dict[str, str | Divergence] = {
    "forward_kl": "forward_kl",
    "reverse_kl": "reverse_kl",
    "cross_entropy": "cross_entropy",
    "tvd": "tvd",
    "JSD(0.1)": fastkd.JSD(0.1),
    "JSD(0.5)": fastkd.JSD(0.5),
    "JSD(0.9)": fastkd.JSD(0.9),
    "SkewKL(0.1)": fastkd.SkewKL(0.1),
    "SkewReverseKL(0.1)": fastkd.SkewReverseKL(0.1),
    "SymmetricKL(0.5)": fastkd.SymmetricKL(0.5),
}


def independent(spread: float) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    return lambda rows, columns: (spread * torch.randn(rows, columns), spread * torch.randn(rows, columns))


def beside(noise: float, offset: float = 0.0, spread: float = 3.0) -> Callable[[int, int], tuple[Tensor, Tensor]]:
    """Student logits, and a teacher's that are theirs with noise, moved by an offset."""

    def pair(rows: int, columns: int) -> tuple[Tensor, Tensor]:
        student = spread * torch.randn(rows, columns)
        return student, student + noise * torch.randn(rows, columns) + offset

    return pair


def disjoint(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """At T = 1/2 each gives the other's tokens e⁻¹⁶ of what it gives its own; float64 has no digits much beyond."""
    lift = torch.where(torch.arange(columns) < columns // 2, 4.0, -4.0)
    return torch.randn(rows, columns) + lift, torch.randn(rows, columns) - lift


REGIMES = {
    **{f"randn x {spread:g}": independent(spread) for spread in (0.1, 1.0, 4.0, 8.0)},
    **{f"noise {noise:g}": beside(noise) for noise in (1e-1, 1e-2, 1e-3, 1e-4)},
    "disjoint": disjoint,
    **{f"offset {offset:g}": beside(0.5, offset, 2.0) for offset in (10.0, 100.0, 1e3, 1e4)},
}


def definition(divergence: str | Divergence, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """The divergence of each row, from log-probabilities, in the logits' dtype."""
    log_s, log_t = (torch.log_softmax(x / temperature, -1) for x in (student, teacher))
    p_s, p_t = log_s.exp(), log_t.exp()
    member = fastkd.divergences.resolve(divergence)
    if divergence == "cross_entropy":
        return -(p_t * log_s).sum(-1)
    if divergence == "tvd":
        return 0.5 * (p_t - p_s).abs().sum(-1)
    if member.name == "symmetric_kl":
        forward, reverse = (definition(name, student, teacher, temperature) for name in ("forward_kl", "reverse_kl"))
        return member.c_t * forward + member.c_s * reverse
    shares = [math.log(w) if w else -math.inf for w in (member.w, 1.0 - member.w)]
    log_m = torch.logaddexp(log_t + shares[0], log_s + shares[1])
    terms = member.c_t * p_t * (log_t - log_m) + member.c_s * p_s * (log_s - log_m)
    if student.dtype == torch.float64:  # masses, whose sum is 0: without them it has no digits near convergence either
        m = log_m.exp()
        terms = terms + member.c_t * (m - p_t) + member.c_s * (m - p_s)
    return terms.sum(-1)


def value_and_gradient(loss: Callable[[Tensor], Tensor], student: Tensor) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    rows = loss(leaf)
    return rows.detach().double(), torch.autograd.grad(rows.sum(), leaf)[0].double()


def relative(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Relative errors of losses and gradient, in norm."""
    loss, gradient = (float((got - right).norm() / right.norm()) for got, right in zip(found, exact, strict=True))
    return loss, gradient


def errors(
    backends: list[str], divergence: str | Divergence, regime: str, columns: int, temperature: float
) -> dict[str, tuple[float, float]]:
    """By contender, of one case."""
    torch.manual_seed(columns)
    student, teacher = REGIMES[regime](VOCABULARIES[columns], columns)

    def ours(backend: str) -> Callable[[Tensor], Tensor]:
        return lambda leaf: fastkd.kd_loss(
            leaf, teacher, temperature=temperature, divergence=divergence, scale_soft_by_t2=False, reduction="none",
            backend=backend,
        )  # fmt: skip

    exact = value_and_gradient(
        lambda leaf: definition(divergence, leaf, teacher.double(), temperature), student.double()
    )
    losses = {backend: ours(backend) for backend in backends}
    losses[PLAIN] = lambda leaf: definition(divergence, leaf, teacher, temperature)
    return {name: relative(value_and_gradient(loss, student), exact) for name, loss in losses.items()}


def sweep(backends: list[str], columns: list[int]) -> Iterator[dict[str, Any]]:
    for name, divergence in DIVERGENCES.items():
        for regime in REGIMES:
            cases = [errors(backends, divergence, regime, n, T) for n in columns for T in TEMPERATURES]
            worst = {who: [max(case[who][i] for case in cases) for i in range(2)] for who in cases[0]}
            yield {"divergence": name, "regime": regime, "errors": worst}


def rounding(backend: str, rows: int = 256, columns: int = 32000) -> dict[str, Any]:
    """Errors of bfloat16 gradients, in norm, and interleaved times of forward and backward.

    Scaled by 1, or by 3 in backward, where they are rounded again; or computed in backward, from scales that 3 is in.
    """
    torch.manual_seed(0)
    student, teacher = (torch.randn(rows, columns).bfloat16() for _ in range(2))
    leaf = student.clone().requires_grad_()

    def gradient(factor: float, reduction: str) -> Tensor:
        loss = fastkd.kd_loss(leaf, teacher, temperature=2.0, reduction=reduction, backend=backend)
        return torch.autograd.grad(loss.sum() * factor, leaf)[0]

    ways = {
        "scaled by 1": partial(gradient, 1.0, "sum"),
        "scaled by 3": partial(gradient, 3.0, "sum"),
        "computed in backward": partial(gradient, 3.0, "none"),
    }
    exact_leaf = student.double().requires_grad_()
    exact = definition("forward_kl", exact_leaf, teacher.double(), 2.0).sum() * 4.0
    (exact_grad,) = torch.autograd.grad(exact, exact_leaf)
    found = {name: way().double() / (1.0 if name == "scaled by 1" else 3.0) for name, way in ways.items()}
    seconds = timing.interleaved(ways, "cpu", 10.0)
    return {
        name: {
            "norm": float((found[name] - exact_grad).norm() / exact_grad.norm()),
            "seconds": statistics.median(seconds[name]["seconds"]),
        }
        for name in ways
    }


def tables(results: dict[str, Any]) -> list[list[list[str]]]:
    """A line for each divergence and regime, "loss / gradient" for each contender; and one for each way to round."""
    names = list(results["cases"][0]["errors"])
    lines = [["divergence", "regime", *names]]
    for case in results["cases"]:
        cells = [" / ".join(f"{error:.0e}" for error in case["errors"][name]) for name in names]
        lines.append([case["divergence"], case["regime"], *cells])
    ways = results["rounding"]
    once = ways["scaled by 1"]["seconds"]
    rounded = [["bfloat16 gradient", "error", "time"]]
    rounded += [[name, f"{way['norm']:.1e}", f"{way['seconds'] / once:.2f} x"] for name, way in ways.items()]
    return [lines, rounded]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastkd.bench.accuracy", description=__doc__.partition(":")[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--backend", action="append", help="backends to hold against float64; default: cpu and torch")
    parser.add_argument("--columns", type=int, action="append", choices=VOCABULARIES, help="vocabularies; default: all")
    arguments = parser.parse_args()
    backends = arguments.backend or ["cpu", "torch"]
    results: dict[str, Any] = {"machine": run.machine("cpu"), "rounding": rounding(backends[0]), "cases": []}
    for case in sweep(backends, arguments.columns or list(VOCABULARIES)):
        results["cases"].append(case)
        cells = (f"{name} {loss:.1e} / {gradient:.1e}" for name, (loss, gradient) in case["errors"].items())
        print(f"{case['divergence']:20}{case['regime']:14}", *cells, sep="  ", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
