"""The picture: held-out loss of each student, the two KD loss curves, and their difference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fastkd.demo.losses import CACHED_K
from fastkd.demo.training import Comparison, Task

# Told apart by colour-blind readers too.
GREY, ORANGE, BLUE, GREEN, PURPLE = "#777777", "#E69F00", "#0072B2", "#009E73", "#CC79A7"
# The two KD curves coincide: a broad one, and a thin dashed one over it.
STYLES: dict[str, dict[str, Any]] = {
    "labels": {"label": "labels only", "color": GREY},
    "usual": {"label": "KD, usual loss", "color": ORANGE, "linewidth": 5.0, "alpha": 0.6},
    "fastkd": {"label": "KD, fastkd", "color": BLUE, "linestyle": "--"},
    "hidden": {"label": "KD, fastkd from hidden states", "color": GREEN, "linestyle": ":"},
    "cache": {"label": f"KD, fastkd from a top-{CACHED_K} cache", "color": PURPLE, "linestyle": "-."},
}


def draw(path: Path, task: Task, comparison: Comparison) -> None:
    figure = Figure(figsize=(11, 5), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(2, 1))
    held_out, curves = figure.add_subplot(grid[:, 0]), figure.add_subplot(grid[0, 1])
    difference = figure.add_subplot(grid[1, 1], sharex=curves)

    for name, run in comparison.students.items():
        held_out.plot(list(run.held_out), list(run.held_out.values()), **STYLES[name])
    held_out.axhline(comparison.teacher.final, color="black", linestyle=":", label="the trained teacher")
    held_out.set(title="Held-out loss of the students", xlabel="training step")
    held_out.set_ylabel(f"cross-entropy, nats per {task.row}")
    held_out.legend()

    steps = range(1, task.student.steps + 1)
    for name in ("usual", "fastkd"):
        curves.plot(steps, comparison.students[name].losses, **STYLES[name])
    curves.set(title="Training loss with KD: the two curves coincide", ylabel=f"nats per {task.row}")
    curves.tick_params(labelbottom=False)
    curves.legend()
    difference.plot(steps, comparison.differences, color="black", linewidth=1.0)
    difference.set(xlabel="training step", ylabel="|difference|")

    for axes in (held_out, curves, difference):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
