"""Pictures of a run: time, share of the floor's speed and memory, over the vocabulary and over the rows."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastkd.bench import summary
from fastkd.bench.cases import Case

# Told apart by colour-blind readers too.
COLORS = {
    "copy": "#777777", "products": "#777777", "eager": "#E69F00", "torch.compile": "#CC79A7", "Liger": "#D55E00",
    "fastkd cuda": "#0072B2", "fastkd triton": "#56B4E9", "fastkd cpu": "#0072B2", "fastkd torch": "#009E73",
}  # fmt: skip
PANELS = {
    "time per element, ns": lambda case, f: f.seconds and f.seconds * 1e9 / (case["rows"] * case["vocab"]),
    "share of the floor's speed, %": lambda case, f: f.of_floor and 100 * f.of_floor,
    "extra memory, bytes per element": lambda case, f: f.extra and f.extra / (case["rows"] * case["vocab"]),
}


def draw(results: dict[str, Any], base: Path) -> list[Path]:
    """``base-vocab.png`` and so on, as PNG and SVG, for each dimension along which the plain cases vary."""
    plain = [case for case in results["cases"] if is_plain(case)]
    written = []
    for axis, other in (("vocab", "rows"), ("rows", "vocab")):
        series = defaultdict(list)
        for case in plain:
            # On a CPU, shapes of as many elements make a series over the vocabulary.
            free = axis == "vocab" and results["machine"]["kind"] == "cpu"
            series[case["dtype"], None if free else case[other]].append(case)
        series = {key: sorted(cases, key=lambda case: case[axis]) for key, cases in series.items()}
        series = {key: cases for key, cases in series.items() if len({case[axis] for case in cases}) > 1}
        if series:
            figure = panels(series, axis, results["machine"])
            for suffix in ("png", "svg"):
                written.append(base.with_name(f"{base.name}-{axis}.{suffix}"))
                figure.savefig(written[-1], dpi=120)
    return written


def is_plain(case: dict[str, Any]) -> bool:
    plain = Case(case["rows"], case["vocab"], case["dtype"])
    return case["rows"] * case["vocab"] > 1e6 and case["name"] == plain.name


def panels(series: dict[Any, list[dict[str, Any]]], axis: str, machine: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(13, 4 * len(series) + 0.5), layout="constrained")
    grid = figure.subplots(len(series), len(PANELS), squeeze=False)
    for line, ((dtype, other), cases) in zip(grid, series.items(), strict=True):
        for axes, (title, value) in zip(line, PANELS.items(), strict=True):
            lines(axes, cases, axis, value)
            fixed = f", {other} {'rows' if axis == 'vocab' else 'columns'}" if other else ""
            axes.set_title(f"{title}\n{dtype}{fixed}")
            axes.set_xlabel({"vocab": "vocabulary", "rows": "rows"}[axis])
            if axes is line[0]:
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLORS))
    figure.suptitle(f"loss + backward on {machine['device']}, torch {machine['versions']['torch']}")
    return figure


def lines(axes: Axes, cases: list[dict[str, Any]], axis: str, value: Any) -> None:
    points = defaultdict(list)
    for case in cases:
        for name, figures in summary.figures(case).items():
            if (y := value(case, figures)) is not None:
                points[name].append((case[axis], y))
    for name, values in points.items():
        axes.plot(*zip(*values, strict=True), marker="o", label=name, color=COLORS.get(name))
    axes.grid(alpha=0.3)
