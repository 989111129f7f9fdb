"""What the demo shows and saves: progress bars, a table, a picture of the curves, a JSON of the figures."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastkd import __version__
from fastkd.demo import memory
from fastkd.demo.picture import draw
from fastkd.demo.training import Comparison, Run, Task, Track

NAMES = {
    "teacher": "Teacher",
    "labels": "Student, labels only",
    "usual": "Student, KD, usual loss",
    "fastkd": "Student, KD, fastkd",
}
# Bytes of logits below which the resident memory of a process, in pages, tells nothing about the loss.
SMALLEST_MEASURED = 2**20


def console() -> Console:
    return Console(highlight=False)


def introduce(console: Console, task: Task, device: torch.device) -> None:
    console.print(f"[bold]fastkd demo[/bold] on {_machine(device)}")
    console.print(f"{task.summary}\n")


@contextmanager
def progress(console: Console) -> Iterator[Track]:
    """A bar for each run; where the output is no terminal, a line as each run ends."""
    live = console.is_terminal
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=console, disable=not live) as bars:

        def track(name: str, steps: int) -> Callable[[Run], None]:
            description = f"{NAMES[name]:<23}"
            bar = bars.add_task(description, total=steps, state="")

            def on_step(run: Run) -> None:
                state = f"held-out {list(run.held_out.values())[-1]:.3f}"
                bars.update(bar, completed=len(run.losses), state=state)
                if len(run.losses) == steps and not live:
                    console.print(f"{description} {steps} steps, {state}")

            return on_step

        yield track


def report(console: Console, task: Task, comparison: Comparison, device: torch.device, seed: int, out: Path) -> None:
    with console.status("Measuring the losses' memory"):
        peaks = {name: _peak(name, task, device) for name in comparison.students}
    console.print(_table(task, comparison, peaks))
    for line in _findings(task, comparison, peaks, device):
        console.print(line)
    picture, figures = out / f"{task.name}.png", out / f"{task.name}.json"
    draw(picture, task, comparison)
    figures.write_text(json.dumps(_figures(task, comparison, peaks, device, seed), indent=2) + "\n")
    console.print(f"\nCurves: {picture}\nFigures: {figures}", soft_wrap=True)


def _peak(name: str, task: Task, device: torch.device) -> int | None:
    if device.type == "cpu" and task.rows * task.classes * 4 < SMALLEST_MEASURED:
        return None
    return memory.peak_bytes(name, task.rows, task.classes, device)


def _table(task: Task, comparison: Comparison, peaks: dict[str, int | None]) -> Table:
    table = Table(box=box.SIMPLE)
    table.add_column("", no_wrap=True)
    headings = [f"Held-out\nnats/{task.row}", "Whole step\nms", "Loss alone\nms"]
    if any(peaks.values()):
        headings.append("Its memory\nMiB")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, run in {"teacher": comparison.teacher, **comparison.students}.items():
        peak = peaks.get(name)
        table.add_row(
            NAMES[name],
            f"{run.final:.3f}",
            _milliseconds(run.step_seconds),
            _milliseconds(run.loss_seconds),
            *([f"{peak / 2**20:.0f}"] if peak else []),
        )
    return table


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.{0 if seconds > 0.02 else 2}f}"


def _findings(task: Task, comparison: Comparison, peaks: dict[str, int | None], device: torch.device) -> Iterator[str]:
    labels, usual, fast = (comparison.students[name] for name in ("labels", "usual", "fastkd"))
    gain = labels.final - fast.final
    yield (
        f"After as many steps, the held-out loss of the KD student is {abs(gain):.3f} nats "
        f"{'lower' if gain > 0 else 'higher'} than with labels only."
    )
    yield (
        f"The two KD loss curves differ by {max(comparison.differences):.1e} at most, "
        f"{comparison.relative_difference:.1e} of the loss."
    )
    line = f"The loss and its gradient: fastkd is {_ratio(usual.loss_seconds, fast.loss_seconds, 'faster', 'slower')}"
    if peaks["usual"] and peaks["fastkd"]:
        line += f" and takes {_ratio(peaks['usual'], peaks['fastkd'], 'less memory', 'more memory')}"
    yield f"{line} than the usual loss."
    if task.classes < 1000:
        yield f"With {task.classes} classes a loss costs next to nothing either way; fastkd is for large vocabularies."
    note = (
        f"Times: medians over the steps, forward and backward; logits of {task.rows:,} × {task.classes:,} in float32."
    )
    if any(peaks.values()):
        note += f" Memory: the peak beyond the two sets of logits, by {memory.how(device)}."
    yield f"[dim]{note}[/dim]"


def _ratio(usual: float, fast: float, better: str, worse: str) -> str:
    return f"{usual / fast:.1f} × {better}" if usual >= fast else f"{fast / usual:.1f} × {worse}"


def _figures(
    task: Task, comparison: Comparison, peaks: dict[str, int | None], device: torch.device, seed: int
) -> dict[str, object]:
    usual, fast = comparison.students["usual"], comparison.students["fastkd"]
    return {
        "task": task.name,
        "data": task.summary,
        "seed": seed,
        "device": _machine(device),
        "versions": {"fastkd": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "logits": [task.rows, task.classes],
        "temperature": task.temperature,
        "hard_weight": task.hard_weight,
        "largest_difference": max(comparison.differences),
        "largest_relative_difference": comparison.relative_difference,
        "loss_time_ratio": usual.loss_seconds / fast.loss_seconds,
        "loss_peak_bytes": peaks,
        "teacher": asdict(comparison.teacher),
        "students": {name: asdict(run) for name, run in comparison.students.items()},
    }


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"
