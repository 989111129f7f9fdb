"""``python -m fastkd bench``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from fastkd.bench import plots, run, summary
from fastkd.bench.cases import select


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--full", action="store_true", help="every shape, dtype, divergence and kind")
    parser.add_argument("--only", default="", metavar="TEXT", help="the cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=4.0, help="of timing a case, at least 9 rounds (default 4)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.json",
        help="of the samples, plots beside it; default: fastkd-bench/DEVICE.json",
    )
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="say what changed, no more")


def main(options: argparse.Namespace) -> int:
    console = Console(highlight=False)
    if options.compare:
        compare(console, *(json.loads(path.read_text()) for path in options.compare))
        return 0
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cases = [case for case in select(device, options.full) if options.only in case.name]
    if not cases:
        console.print(f"no case contains {options.only!r}")
        return 2
    out = options.out or Path("fastkd-bench", f"{device}.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    with console.status("") as status:
        for results in run.run(cases, device, options.seconds, status.update):
            out.write_text(json.dumps(results, indent=1) + "\n")  # a run that is cut short leaves what it has
    show(console, results)
    console.print(f"\nSamples: {out}", soft_wrap=True)
    for path in plots.draw(results, out.with_suffix("")):
        console.print(f"Plot: {path}", soft_wrap=True)
    return 0


def show(console: Console, results: dict[str, Any]) -> None:
    console.print(f"[bold]fastkd bench[/bold] on {summary.machine_line(results['machine'])}")
    said = ""
    for case in results["cases"]:
        (headers, *lines), absent = summary.table(case)
        table = Table(title=case["name"], title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, header in enumerate(headers):
            table.add_column(header, justify="left" if index == 0 else "right", no_wrap=True)
        for line in lines:
            table.add_row(*line, style="bold" if line[0].startswith("fastkd") else None)
        console.print(table)
        if absent != said:  # mostly the same for all cases
            console.print(f"[dim]not run: {absent}[/dim]\n")
            said = absent
    console.print(" ".join(summary.LEGEND.split()))


def compare(console: Console, before: dict[str, Any], after: dict[str, Any]) -> None:
    table = Table("case", "contender", "speed", "", box=box.SIMPLE_HEAD)
    for case, name, ratio, beyond_noise in summary.changes(before, after):
        table.add_row(case, name, f"{ratio:.2f} x", ("faster" if ratio > 1 else "slower") if beyond_noise else "noise")
    console.print(f"A: {summary.machine_line(before['machine'])}\nB: {summary.machine_line(after['machine'])}")
    console.print(table)
