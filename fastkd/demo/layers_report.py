"""What the layers task shows and saves: a table, a picture of the held-out losses, a JSON of the figures."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from fastkd import __version__
from fastkd.demo import layers, report
from fastkd.demo.layers import Comparison, Run, Task

COLORS = ("#777777", "#E69F00", "#0072B2", "#009E73")  # told apart by colour-blind readers too


def run(console: Console, seed: int, device: torch.device, out: Path) -> None:
    with console.status("Preparing the data"):
        task = layers.make_task(seed, device)
    console.print(f"[bold]fastkd demo[/bold] on {report._machine(device)}\n{task.summary}\n")
    with console.status("Training"):
        comparison = layers.compare(task, seed, layers.SEEDS, lambda name, run: announce(console, name, run))
    console.print(table(task, comparison))
    for line in findings(task, comparison):
        console.print(line)
    picture, figures = out / "layers.png", out / "layers.json"
    draw(picture, task, comparison)
    figures.write_text(json.dumps(figures_of(task, comparison, seed, device), indent=2) + "\n")
    console.print(f"\nCurves: {picture}\nFigures: {figures}", soft_wrap=True)


def announce(console: Console, name: str, run: Run) -> None:
    console.print(f"{name:<36} held-out {run.final:.3f}  {run.seconds:.0f} s")


def table(task: Task, comparison: Comparison) -> Table:
    steps = (task.student.steps // 2, task.student.steps)
    table = Table(box=box.SIMPLE, title="Held-out loss, nats per token", title_justify="left")
    table.add_column("", no_wrap=True)
    for heading in (*(f"{step} steps" for step in steps), "s a run"):
        table.add_column(heading, justify="right", no_wrap=True)
    teacher = comparison.teacher
    table.add_row(f"(the teacher, {task.teacher.steps} steps)", "", f"{teacher.final:.3f}", f"{teacher.seconds:.0f}")
    for method, runs in comparison.students.items():
        cells = (spread([run.held_out[nearest(run, step)] for run in runs]) for step in steps)
        table.add_row(method, *cells, f"{mean(run.seconds for run in runs):.0f}")
    return table


def nearest(run: Run, step: int) -> int:
    """The step nearest to this one at which the held-out loss was taken."""
    return min(run.held_out, key=lambda taken: abs(taken - step))


def spread(values: list[float]) -> str:
    """The mean, and half of what lies between the extremes."""
    return f"{mean(values):.3f} ± {(max(values) - min(values)) / 2:.3f}"


def findings(task: Task, comparison: Comparison) -> Iterator[str]:
    names = list(comparison.students)
    for name, other in zip(names[1:], names, strict=False):
        gains = [b.final - a.final for a, b in zip(comparison.students[name], comparison.students[other], strict=True)]
        signs = "for every seed" if min(gains) * max(gains) > 0 else "not for every seed"
        yield (
            f"{name}: {abs(mean(gains)):.3f} nats {'below' if mean(gains) > 0 else 'above'} {other}, {signs} "
            f"({min(gains):+.3f} to {max(gains):+.3f})."
        )
    yield (
        f"[dim]One teacher of {task.teacher.steps} steps; students of {task.student.steps}, a seed's with the same "
        "beginning, batches, learning rate and schedule. Means of the seeds, ± half of what lies between the extremes. "
        f"Hidden layers: {layers.HIDDEN_WEIGHT:g} × the {layers.HIDDEN_KIND} loss, with the teacher's layers "
        f"{', '.join(str(j) for _, j in layers.PAIRS)}. Copied: these, embeddings, norm and head. Equal steps are not "
        "equal time: the last column is a run's, the teacher's forward passes included.[/dim]"
    )


def draw(path: Path, task: Task, comparison: Comparison) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for color, (method, runs) in zip(COLORS, comparison.students.items(), strict=True):
        steps = list(runs[0].held_out)
        values = [[run.held_out[step] for run in runs] for step in steps]
        axes.plot(steps, list(map(mean, values)), color=color, label=method)
        axes.fill_between(steps, list(map(min, values)), list(map(max, values)), color=color, alpha=0.2, linewidth=0)
    axes.axhline(comparison.teacher.final, color="black", linestyle=":", label="the trained teacher")
    seeds = len(next(iter(comparison.students.values())))
    axes.set(title=f"Held-out loss of students of {layers.STUDENT_LAYERS} layers: mean and extremes of {seeds} seeds")
    axes.set(xlabel="training step", ylabel="cross-entropy, nats per token")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
    figure.savefig(path, dpi=150)


def figures_of(task: Task, comparison: Comparison, seed: int, device: torch.device) -> dict[str, object]:
    return {
        "task": "layers",
        "data": task.summary,
        "seed": seed,
        "device": report._machine(device),
        "versions": {"fastkd": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "temperature": layers.TEMPERATURE,
        "hard_weight": layers.HARD_WEIGHT,
        "hidden_kind": layers.HIDDEN_KIND,
        "hidden_weight": layers.HIDDEN_WEIGHT,
        "pairs": layers.PAIRS,
        "steps": {"teacher": task.teacher.steps, "student": task.student.steps},
        **asdict(comparison),
    }
