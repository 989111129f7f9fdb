"""Run cases over contenders: a dictionary that is the JSON of the results."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastkd._version import __version__
from fastkd.bench import check, timing
from fastkd.bench.cases import Case
from fastkd.bench.provider import Provider
from fastkd.bench.providers import PROVIDERS

PACKAGES = ("torch", "triton", "liger-kernel", "quack-kernels", "fla-core")
Step = Callable[[str], None]


def run(cases: Iterable[Case], device: str, seconds: float, step: Step) -> Iterator[dict[str, Any]]:
    """Time ``cases``, each for about ``seconds`` but at least :data:`timing.ROUNDS` rounds; the results after each."""
    results = {"machine": machine(device), "command": " ".join(["python -m fastkd", *sys.argv[1:]]), "cases": []}
    with fresh_caches():
        for case in cases:
            results["cases"].append({**case.as_dict(), "contenders": run_case(case, device, seconds, step)})
            yield results


@contextmanager
def fresh_caches() -> Iterator[None]:
    """Compiled code is cached on disk; here a first use compiles, as it would on a new machine."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update({name: f"{folder}/{name}" for name in names})
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def run_case(case: Case, device: str, seconds: float, step: Step) -> dict[str, Any]:
    contenders: dict[str, Any] = {}
    calls = {}
    for provider in PROVIDERS:
        step(f"{case.name}: checking {provider.name}")
        found = prepare(provider, case, device)
        if found is not None:
            contenders[provider.name], call = found
            if call is not None:
                calls[provider.name] = call
    check.reference.cache_clear()  # its memory is for the contenders now
    step(f"{case.name}: timing")
    for name, samples in timing.interleaved(calls, device, seconds).items():
        contenders[name] |= samples
    for name, call in calls.items():
        step(f"{case.name}: memory of {name}")
        contenders[name] |= {"peak_bytes": timing.peak_bytes(call, device), "launches": timing.launches(call, device)}
    return contenders


def prepare(provider: Provider, case: Case, device: str) -> tuple[dict[str, Any], timing.Call | None] | None:
    """(what is known before the timing, the call to time unless there is none); None if the case is not for it."""
    why = provider.unavailable(device)
    if why is not None:
        return {"status": why}, None
    try:
        loss = provider.loss(case)
        if loss is None:
            return None
        make_inputs = case.inputs if case.inplace or provider.overwrites else partial(check.shared_inputs, case)
        inputs = make_inputs(device)
        result: dict[str, Any] = {"first_use": timing.first_use(lambda: check.call(loss, inputs), device)}
        if provider.is_floor:
            return {**result, "status": "ok"}, lambda: loss(inputs)
        found = check.errors(case, loss, make_inputs(device), device)
    except Exception as error:  # a contender that fails is shown with its reason
        return {"status": f"failed: {' '.join(str(error).split())[:200]}"}, None
    status = "wrong" if check.is_wrong(case, found) else "ok"
    return {**result, "status": status, "error": found}, lambda: check.call(loss, inputs)


def machine(device: str) -> dict[str, Any]:
    versions: dict[str, str | None] = {"fastkd": __version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "kind": device,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if device == "cuda" else None,
        "versions": versions,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def commit() -> str | None:
    """Of the sources; None without git, or in an installed package."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        run = subprocess.run(command, cwd=Path(__file__).resolve().parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return run.stdout.strip() or None


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())
