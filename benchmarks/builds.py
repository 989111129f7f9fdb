"""Two builds of the ``cpu`` backend's C++ part, in turns, in one process: ``python -m fastkd.bench.builds OTHER.so``.

OTHER.so is another checkout's ``fastkd/_cpu.*.so``, called as this one's Python calls its own. Both are timed by the
wall clock and by the processor time of all threads, in which the waits for a processor that others use are not.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from fastkd.backends import cpu
from fastkd.bench import check, run, summary
from fastkd.bench.cases import TOP_K, Case, quick
from fastkd.bench.providers.fastkd import loss

CASES = (*quick("cpu"), Case(1024, 32000, "float32", kind=TOP_K, k=64))
ISAS = ("avx512", "avx2")
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
ROUNDS, CALLS = 9, {4: 100}  # calls a sample, by rows


def load(path: Path) -> Any:
    loader = importlib.machinery.ExtensionFileLoader("_cpu", str(path))
    spec = importlib.util.spec_from_loader("_cpu", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def measure(case: Case, isa: str, builds: dict[str, Any], seconds: float) -> dict[str, dict[str, list[float]]]:
    """Seconds of a call, by build and clock."""
    compute, inputs, calls = loss("cpu", case), check.shared_inputs(case, "cpu"), CALLS.get(case.rows, 1)
    assert compute is not None
    samples: dict[str, dict[str, list[float]]] = {name: {clock: [] for clock in CLOCKS} for name in builds}
    end, rounds = time.perf_counter() + seconds, 0
    while rounds <= ROUNDS or time.perf_counter() < end:
        for name, module in builds.items():
            cpu._cpu = module
            module.use_isa(isa)
            before = {clock: now() for clock, now in CLOCKS.items()}
            for _ in range(calls):
                check.call(compute, inputs)
            if rounds:  # the first is a warm-up
                for clock, now in CLOCKS.items():
                    samples[name][clock].append((now() - before[clock]) / calls)
        rounds += 1
    return samples


def table(results: dict[str, Any]) -> list[list[str]]:
    """Medians of this build, and those of the other over them."""
    lines = [["case", "instructions", *(text for clock in CLOCKS for text in (f"{clock} time", "x other"))]]
    for case in results["cases"]:
        medians = {name: {c: statistics.median(t) for c, t in by.items()} for name, by in case["seconds"].items()}
        this, other = medians["this"], medians["other"]
        cells = (text for c in CLOCKS for text in (summary.duration(this[c]), f"{other[c] / this[c]:.2f}"))
        lines.append([case["name"], case["isa"], *cells])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastkd.bench.builds", description=__doc__.partition(":")[0])
    parser.add_argument("other", type=Path, help="the other build's _cpu.*.so")
    parser.add_argument("--commit", help="what the other was built from, for the record")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="for each case and instruction set")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    builds = {"this": cpu._cpu, "other": load(arguments.other)}
    isas = [isa for isa in ISAS if all(module.use_isa(isa) is None for module in builds.values())]
    results: dict[str, Any] = {"machine": run.machine("cpu"), "other": arguments.commit, "cases": []}
    for case in CASES:
        for isa in isas:
            seconds = measure(case, isa, builds, arguments.seconds)
            results["cases"].append({"name": case.name, "isa": isa, "seconds": seconds})
            print("  ".join(table({"cases": results["cases"][-1:]})[1]), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
