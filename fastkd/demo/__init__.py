"""``python -m fastkd demo``: the same student distilled with the usual loss and with fastkd's, side by side."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from fastkd import _extras

# What every task needs apart from torch, and what each does: the extra `demo`.
ALL_NEED = ("matplotlib", "numpy", "rich", "safetensors")
NEEDS = {
    "text": (*ALL_NEED, "tokenizers"),
    "digits": (*ALL_NEED, "scikit-learn"),
    "layers": (*ALL_NEED, "tokenizers"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task",
        choices=tuple(NEEDS),
        default="text",
        help="text: a language model on Python's own sources, some minutes on 2 CPU cores (default); "
        "digits: the 1797 handwritten digits that come with scikit-learn, some seconds; it needs that package; "
        "layers: students that also learn from a teacher's hidden layers, several minutes",
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of each batch: about a minute on 2 CPU cores")
    parser.add_argument("--out", type=Path, default=Path("fastkd-demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the data split, the models and the batches (default 0)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")


def run(arguments: argparse.Namespace) -> int:
    """Train, compare, report; the exit status."""
    if missing := _extras.missing(*NEEDS[arguments.task]):
        return _refuse(f"the {arguments.task} task {missing}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        return _refuse("--device cuda: PyTorch finds no CUDA device here")
    if arguments.quick and arguments.task == "layers":
        return _refuse("--quick: the layers task has no shorter form")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    from fastkd.demo import digits, report, text, training

    console = report.console()
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        if arguments.task == "layers":
            from fastkd.demo import layers_report

            layers_report.run(console, arguments.seed, device, arguments.out)
            return 0
        with console.status("Preparing the data"):
            task = {"text": text, "digits": digits}[arguments.task].make_task(arguments.seed, device)
        if arguments.quick:
            task = task.quick()
    except (FileNotFoundError, FileExistsError) as error:
        return _refuse(str(error))
    report.introduce(console, task, device)
    with report.progress(console) as track:
        comparison = training.compare(task, arguments.seed, track)
    report.report(console, task, comparison, device, arguments.seed, arguments.out)
    return 0


def _refuse(reason: str) -> int:
    print(f"python -m fastkd demo: {reason}", file=sys.stderr)
    return 2
