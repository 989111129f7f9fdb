"""``python -m fastkd info``, ``python -m fastkd bench``, ``python -m fastkd demo`` and ``python -m fastkd cache``."""

from __future__ import annotations

import argparse
import importlib
import platform
import sys
from importlib import util
from pathlib import Path

import torch

from fastkd import _built, _dispatch
from fastkd._version import __version__


def info() -> int:
    """Print the versions, what is compiled, and for each device which backend a call uses and why others cannot run."""
    versions = [f"fastkd {__version__}", f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    versions.append(
        f"triton {importlib.import_module('triton').__version__}" if util.find_spec("triton") else "no triton"
    )
    print(" · ".join(versions))
    compiled = " · ".join(f"{part} for {targets}" for part, targets in _built.targets().items())
    print(f"compiled: {compiled or 'nothing on record'}")
    asked = _dispatch.requested(None)
    for device in [f"cuda:{index}" for index in range(torch.cuda.device_count())] + ["cpu"]:
        logits = torch.empty(1, 1, device=device)
        refusals = {name: _dispatch.refusal(logits, name) for name in _dispatch.NAMES}
        used = next((name for name in _dispatch.candidates(logits, asked) if refusals[name] is None), None)
        print(f"\n{device}  {_device_name(device)}")
        for name, why in refusals.items():
            print(f"  {name:<8}{'used by default' if name == used else why or 'usable'}")
        if asked and used is None:
            print(f"  calls fail: FASTKD_BACKEND={asked} asks for a backend that cannot run here")
    return 0


def _device_name(device: str) -> str:
    if device == "cpu":
        return f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"


def cache_command(action: str, path: Path) -> int:
    try:
        from fastkd.cache import command
    except ImportError as error:  # it needs an extra
        print(f"python -m fastkd cache: {error}", file=sys.stderr)
        return 2
    return command.run(action, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fastkd", description="The knowledge-distillation loss, fast.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, devices, and which backend runs where, with the reason if one cannot")
    demo = commands.add_parser("demo", help="distil a small model and compare the usual loss with fastkd's")
    from fastkd import demo as demo_package

    demo_package.add_arguments(demo)
    bench = commands.add_parser("bench", help="time the loss beside eager PyTorch, torch.compile and other libraries")
    from fastkd.bench import command

    command.add_arguments(bench)
    cache = commands.add_parser("cache", help="say what a cache of a teacher holds, or check every byte of it")
    cache.add_argument("action", choices=("info", "verify"))
    cache.add_argument("path", type=Path, metavar="PATH", help="the cache's folder")
    options = parser.parse_args(arguments)
    try:
        if options.command == "info":
            return info()
        if options.command == "cache":
            return cache_command(options.action, options.path)
        if options.command == "demo":
            return demo_package.run(options)
        return int(command.main(options))
    except KeyboardInterrupt:
        return 130  # as shells have it


if __name__ == "__main__":
    sys.exit(main())
