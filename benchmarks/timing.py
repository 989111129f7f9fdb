"""Time, memory and launches of calls."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import torch

# At least so many rounds of all contenders, and then as many as fit in the time.
ROUNDS, MOST_ROUNDS = 9, 200
# More than the L2 cache of any GPU: written between calls, so that each finds its inputs in memory.
FLUSH_BYTES = 256 * 2**20
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")

Call = Callable[[], object]


def first_use(call: Call, device: str) -> float:
    """Seconds of a first call: compilation, and whatever else is done once."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def interleaved(calls: dict[str, Call], device: str, seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, warmed up before, in turns (A B C A B C), so that drift of the machine hits all alike."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device) if device == "cuda" else None
    samples: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    for done in range(MOST_ROUNDS):
        if done >= ROUNDS and time.perf_counter() > end:
            break
        for name, call in calls.items():
            samples[name].append(_sample(call, device, flush))
    return samples


def _sample(call: Call, device: str, flush: torch.Tensor | None) -> float:
    if flush is None:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    flush.zero_()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    call()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) * 1e-3


def peak_bytes(call: Call, device: str) -> int | None:
    """The most that a call holds beyond what there was: by PyTorch's allocator on a GPU, in resident pages on Linux."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    if not CLEAR.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # freed blocks that are still resident would hide new ones
    CLEAR.write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def launches(call: Call, device: str) -> int | None:
    """Kernels that a call launches."""
    if device != "cuda":
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        call()
        torch.cuda.synchronize()
    kernels = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return len([event for event in kernels if not event.name.startswith(("Memcpy", "Memset"))])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _status(field: str) -> int:
    """Bytes; the file says ``VmRSS:   123456 kB``."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
