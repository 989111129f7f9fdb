"""Time, memory and launches of calls."""

from __future__ import annotations

import ctypes
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from fastkd.demo.memory import resident_bytes

# At least so many rounds of all contenders, and then as many as fit in the time.
ROUNDS, MOST_ROUNDS = 9, 200
# What a call is queued behind: at least so many seconds, at a clock that no GPU exceeds by much, and how many are
# tried, each four times as long. A call that synchronises is never queued whole; its time has its launches in it.
LEAST_DELAY, CLOCK, DELAYS = 100e-6, 2e9, 3
# More than the L2 cache of any GPU: written between calls, so that each finds its inputs in memory.
FLUSH_BYTES = 256 * 2**20
CLEAR = Path("/proc/self/clear_refs")

Call = Callable[[], object]


def first_use(call: Call, device: str) -> float:
    """Seconds of a first call: compilation, and whatever else is done once."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def interleaved(calls: dict[str, Call], device: str, seconds: float) -> dict[str, dict[str, list[float]]]:
    """Samples of each call, warmed up before, in turns (A B C A B C), so that drift of the machine hits all alike.

    ``seconds`` is what a call takes; on a GPU what its kernels take when all of them are queued before the first
    begins, so that no time of launching is in it. There ``with_launches`` is what the host waits for the call, from an
    idle device to an idle device.
    """
    sample = Device().sample if device == "cuda" else host_sample
    samples: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in calls}
    end = time.perf_counter() + seconds
    for done in range(MOST_ROUNDS):
        if done >= ROUNDS and time.perf_counter() > end:
            break
        for name, call in calls.items():
            for figure, value in sample(call).items():
                samples[name][figure].append(value)
    return samples


def host_sample(call: Call) -> dict[str, float]:
    start = time.perf_counter()
    call()
    return {"seconds": time.perf_counter() - start}


class Device:
    """Samples on the current GPU."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def sample(self, call: Call) -> dict[str, float]:
        self.flush.zero_()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        delay = max(LEAST_DELAY, 2 * (time.perf_counter() - start))
        torch.cuda.synchronize()
        waited = time.perf_counter() - start
        for _ in range(DELAYS):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.flush.zero_()
            torch.cuda._sleep(int(delay * CLOCK))
            before.record()
            call()
            after.record()
            queued = not before.query()
            torch.cuda.synchronize()
            if queued:
                break
            delay *= 4  # it was over before everything was queued
        return {"seconds": before.elapsed_time(after) * 1e-3, "with_launches": waited}


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
    before = resident_bytes("VmRSS")
    call()
    return max(0, resident_bytes("VmHWM") - before)


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
