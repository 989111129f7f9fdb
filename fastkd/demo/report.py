"""What the demo shows and saves: progress bars, a table, a picture of the curves, a JSON of the figures."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator
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
from fastkd.demo.losses import CACHED_K, CHUNK_ROWS
from fastkd.demo.picture import STYLES, draw
from fastkd.demo.training import Comparison, Run, Task, Track

NAMES = {"teacher": "(the teacher)"} | {name: style["label"] for name, style in STYLES.items()}
# Bytes of logits below which the resident memory of a process, in pages, tells nothing about the loss.
SMALLEST_MEASURED = 2**20
QUARTILES = ("low", "median", "high")


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
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=console, disable=not live) as bars:

        def track(name: str, steps: int) -> Callable[[Run], None]:
            description = f"{NAMES[name]:<{max(map(len, NAMES.values()))}}"
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
    table = Table(box=box.SIMPLE, collapse_padding=True, pad_edge=False)  # of 80 columns, none cut off
    table.add_column("Students", no_wrap=True)
    headings = [f"Held-out\nnats/{task.row}", "Whole step\nms", "Loss alone\nms"]
    if any(peaks.values()):
        headings.append("Memory\nMiB")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, run in {"teacher": comparison.teacher, **comparison.students}.items():
        peak = peaks.get(name)
        table.add_row(
            NAMES[name],
            f"{run.final:.3f}",
            _milliseconds(run.step_seconds),
            _milliseconds(run.loss_seconds) + ("*" if name == "hidden" else ""),
            *([f"{peak / 2**20:.0f}"] if peak else []),
        )
    return table


def _quartiles(samples: Iterable[float]) -> list[float]:
    return statistics.quantiles(samples, n=4, method="inclusive")


def _milliseconds(seconds: list[float]) -> str:
    """The median, and half the width of the middle half."""
    low, middle, high = _quartiles(seconds)
    return f"{middle * 1e3:.{0 if middle > 0.02 else 2}f} ± {(high - low) / 2 / middle:.0%}"


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
    line = f"Loss and gradient: fastkd has {_speed(usual.loss_seconds, fast.loss_seconds)} the usual loss's speed"
    if peaks["usual"] and peaks["fastkd"]:
        line += f" and takes {peaks['fastkd'] / peaks['usual']:.0%} of its memory"
    yield f"{line}. The whole step: {_speed(usual.step_seconds, fast.step_seconds)}."
    if comparison.cached_bytes:
        cached = comparison.students["cache"]
        more = cached.final - fast.final
        yield (
            f"From the teacher's {CACHED_K} most probable tokens, {comparison.cached_bytes:.0f} bytes a token on disk, "
            f"written once: {abs(more):.3f} nats {'higher' if more > 0 else 'lower'} than from the whole teacher. The "
            f"whole step, without a teacher: {_speed(fast.step_seconds, cached.step_seconds)} the speed."
        )
    if task.classes < 1000:
        yield f"With {task.classes} classes a loss costs next to nothing either way; fastkd is for large vocabularies."
    note = (
        f"Times: medians of {task.student.steps} steps, the students in turns on the same batches, ± half the width of "
        "their middle half; in brackets the middle half of the ratios, step by step. Logits of "
        f"{task.rows:,} × {task.classes:,} in float32."
    )
    if any(peaks.values()):
        note += f" Memory: the peak beyond the two sets of logits, by {memory.how(device)}."
    if "hidden" in comparison.students:
        note += (
            f" From hidden states: {CHUNK_ROWS} rows at a time; the memory has the logits in it, and "
            "the loss alone (*) has the products with the output matrices in it."
        )
    yield f"[dim]{note}[/dim]"


def _ratios(usual: list[float], fast: list[float]) -> list[float]:
    """Quartiles of how many times as fast, step by step: both ran on the same batch, one after the other."""
    return _quartiles(u / f for u, f in zip(usual, fast, strict=True))


def _speed(usual: list[float], fast: list[float]) -> str:
    low, middle, high = _ratios(usual, fast)
    return f"{middle:.1f} × ({low:.1f} to {high:.1f})"


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
        "loss_time_ratio": dict(zip(QUARTILES, _ratios(usual.loss_seconds, fast.loss_seconds), strict=True)),
        "step_time_ratio": dict(zip(QUARTILES, _ratios(usual.step_seconds, fast.step_seconds), strict=True)),
        "loss_peak_bytes": peaks,
        "cached_bytes_per_token": comparison.cached_bytes,
        "teacher": asdict(comparison.teacher),
        "students": {name: asdict(run) for name, run in comparison.students.items()},
    }


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"
