"""``python -m fastkd bench``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from fastkd import _extras
from fastkd.bench import run, summary
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
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help="what changed; nothing is timed"
    )


def main(options: argparse.Namespace) -> int:
    if options.compare:
        try:
            compare(*(json.loads(path.read_text()) for path in options.compare))
        except (OSError, ValueError, KeyError, TypeError) as error:
            return refuse(f"--compare: a file is missing, or none of this command's: {error}")
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        return refuse("--device cuda: PyTorch finds no CUDA device here")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    cases = [case for case in select(device, options.full) if options.only in case.name]
    if not cases:
        return refuse(f"--only: no case contains {options.only!r}")
    out = options.out or Path("fastkd-bench", f"{device}.json")
    if out.is_dir():
        return refuse(f"--out: {out} is a folder, must be a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"cases": []}
    try:
        for results in run.run(cases, device, options.seconds, progress):
            if len(results["cases"]) == 1:
                print(f"fastkd bench on {summary.machine_line(results['machine'])}")
            show(results["cases"])
            out.write_text(json.dumps(results, indent=1) + "\n")  # a run that is cut short leaves what it has
        interrupted = False
    except KeyboardInterrupt:
        print(f"\ninterrupted after {len(results['cases'])} of {len(cases)} cases")
        interrupted = True
    if results["cases"]:
        print(f"\n{' '.join(summary.LEGEND.split())}\n\nSamples: {out}")
        draw(results, out.with_suffix(""))
    return int(interrupted)


def refuse(reason: str) -> int:
    print(f"python -m fastkd bench: {reason}", file=sys.stderr)
    return 2


def progress(text: str) -> None:
    """What is under way, on a terminal's last line."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\r", file=sys.stderr, flush=True)


def show(cases: list[dict[str, Any]]) -> None:
    """The last of the cases."""
    progress("")
    lines, absent = summary.table(cases[-1])
    print(f"\n{cases[-1]['name']}\n{columns(lines)}")
    if len(cases) == 1 or absent != summary.table(cases[-2])[1]:  # mostly the same for all cases
        print(f"not run: {absent}")
    sys.stdout.flush()


def columns(lines: list[list[str]]) -> str:
    """Aligned: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    cells = ([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines)
    return "\n".join("  ".join(line) for line in cells)


def draw(results: dict[str, Any], base: Path) -> None:
    if missing := _extras.missing("matplotlib"):
        print(f"No plots: {missing}")
        return
    from fastkd.bench import plots

    for path in plots.draw(results, base):
        print(f"Plot: {path}")


def compare(before: dict[str, Any], after: dict[str, Any]) -> None:
    print(f"A: {summary.machine_line(before['machine'])}\nB: {summary.machine_line(after['machine'])}\n")
    lines = [["case", "contender", "speed", ""]]
    for case, name, ratio, beyond_noise in summary.changes(before, after):
        lines.append([case, name, f"{ratio:.2f} x", ("faster" if ratio > 1 else "slower") if beyond_noise else "noise"])
    print(columns(lines))
