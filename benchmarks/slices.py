"""A vocabulary in slices: what a row costs on the wire, and what the sliced loss costs where there is one slice.

python -m fastkd.bench.slices [--out FILE]

Bytes are those of the messages that a rank sends, counted as they go; times are of loss and gradient, with one slice
against the same call without any. A group of one has no slices: here it is told to have one.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

import fastkd
from fastkd import _slices
from fastkd._request import Place
from fastkd.bench import run
from fastkd.bench.timing import interleaved

ROWS, COLUMNS, LISTED = 1024, 32000, 64
DIVERGENCES = {"forward_kl": "forward_kl", "reverse_kl": "reverse_kl", "jsd(0.5)": fastkd.JSD(0.5), "tvd": "tvd"}
BACKENDS = ("cpu", "torch")


@contextmanager
def one_slice() -> Iterator[None]:
    """A group of one does what a larger one does."""
    place_of = _slices.place_of
    _slices.place_of = lambda group, width: Place("", group.group_name, width)
    try:
        yield
    finally:
        _slices.place_of = place_of


@contextmanager
def counted(sent: list[int]) -> Iterator[None]:
    """The bytes of every message go to ``sent``."""
    gather, add = _slices._all_gather, _slices.summed

    def count_gather(tensor: Tensor, group: str) -> Tensor:
        sent.append(tensor.nbytes)
        return gather(tensor, group)

    def count_sum(tensor: Tensor, group: str) -> Tensor:
        sent.append(tensor.nbytes)
        return add(tensor, group)

    _slices._all_gather, _slices.summed = count_gather, count_sum
    try:
        yield
    finally:
        _slices._all_gather, _slices.summed = gather, add


def call(student: Tensor, teacher: Any, labels: Tensor, **keywords: Any) -> None:
    loss = fastkd.kd_loss(student, teacher, labels, hard_weight=0.5, soft_weight=0.5, **keywords)
    torch.autograd.grad(loss, student)


def bytes_of_a_row(group: distributed.ProcessGroup, rows: int) -> dict[str, list[float]]:
    """Of each divergence and of a sparse teacher: the messages of a call, over its rows."""
    student, teacher = torch.randn(rows, 128, requires_grad=True), torch.randn(rows, 128)
    labels = torch.randint(0, 128, (rows,))
    listed = fastkd.top_k(teacher, LISTED)
    calls = {
        name: functools.partial(call, student, teacher, labels, divergence=of, label_smoothing=0.1)
        for name, of in DIVERGENCES.items()
    }
    calls[f"forward_kl, {LISTED} tokens listed"] = functools.partial(call, student, listed, labels, label_smoothing=0.1)
    found = {}
    for name, of in calls.items():
        sent: list[int] = []
        with one_slice(), counted(sent):
            of(vocab_group=group, backend="torch")
        found[name] = [size / rows for size in sent]
    return found


def times(
    group: distributed.ProcessGroup, seconds: float, rows: int, columns: int
) -> dict[str, dict[str, list[float]]]:
    student, teacher = (3.0 * torch.randn(rows, columns) for _ in range(2))
    labels = torch.randint(0, columns, (rows,))
    leaf = student.requires_grad_()
    found = {}
    for backend in BACKENDS:
        for name, divergence in DIVERGENCES.items():
            of = functools.partial(call, leaf, teacher, labels, divergence=divergence, backend=backend, temperature=2.0)
            both = {"whole": of, "one slice": functools.partial(of, vocab_group=group)}
            with one_slice():
                for contender in both.values():
                    contender()
                samples = interleaved(both, "cpu", seconds)
            found[f"{backend}, {name}"] = {key: sample["seconds"] for key, sample in samples.items()}
    return found


def tables(results: dict[str, Any]) -> list[list[list[str]]]:
    """What is sent of a row, and the times."""
    sent = [["", "bytes a row and rank, message by message"]]
    for name, sizes in results["bytes"].items():
        sent.append([name, " + ".join(f"{size:.0f}" for size in sizes)])
    lines = [["backend, divergence", "whole", "one slice", "x"]]
    for name, samples in results["times"].items():
        whole, sliced = (statistics.median(samples[key]) for key in ("whole", "one slice"))
        lines.append([name, f"{whole * 1e3:.1f} ms", f"{sliced * 1e3:.1f} ms", f"{sliced / whole:.2f}"])
    return [sent, lines]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(prog="python -m fastkd.bench.slices", description=__doc__.partition(":")[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each pair of calls, at least")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--columns", type=int, default=COLUMNS)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        group = distributed.group.WORLD
        results = {
            "machine": run.machine("cpu"),
            "rows": options.rows,
            "columns": options.columns,
            "bytes": bytes_of_a_row(group, 16 * ROWS),
            "times": times(group, options.seconds, options.rows, options.columns),
        }
    finally:
        distributed.destroy_process_group()
    for lines in tables(results):
        for cells in lines:
            print(f"{cells[0]:32}" + "".join(f"{cell:>24}" for cell in cells[1:]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    return results


if __name__ == "__main__":
    main()
