"""Peak memory of a loss, forward and backward, beyond the two sets of logits, or of hidden states, that it is given.

On a GPU it is what PyTorch's allocator counts. On a CPU it is the resident memory that the operating system counts, in
a process of its own (this module run as a program), so that nothing but the loss shows.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from fastkd import LinearLogits, TopK
from fastkd.demo.losses import CACHED_K, FROM_CACHE, FROM_HIDDEN_STATES, LOSSES

STATUS = Path("/proc/self/status")
WIDTH = 128  # of the hidden states


def peak_bytes(loss: str, rows: int, classes: int, device: torch.device) -> int | None:
    """None where there is no measuring it: on a CPU outside Linux."""
    if device.type == "cuda":
        return _measure(loss, rows, classes, device)
    if not STATUS.exists():
        return None
    command = [sys.executable, "-m", "fastkd.demo.memory", loss, str(rows), str(classes)]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def how(device: torch.device) -> str:
    return "PyTorch's CUDA allocator" if device.type == "cuda" else "resident memory of a process of its own"


def _measure(loss: str, rows: int, classes: int, device: torch.device) -> int:
    for size in (2, rows):  # the first call loads what the loss needs besides
        columns = WIDTH if loss in FROM_HIDDEN_STATES else classes
        student = torch.randn(size, columns, device=device).requires_grad_()
        teacher = torch.randn(size, columns, device=device)
        labels = torch.zeros(size, dtype=torch.long, device=device)
        if loss in FROM_HIDDEN_STATES:
            head, teacher_head = (torch.randn(classes, WIDTH, device=device) for _ in range(2))
            of_student, of_teacher = LinearLogits(student, head.requires_grad_()), LinearLogits(teacher, teacher_head)
            before = _now(device)
            FROM_HIDDEN_STATES[loss](of_student, of_teacher, labels, 2.0, 0.1).backward()  # type: ignore[no-untyped-call]
            continue
        if loss in FROM_CACHE:
            ids = torch.arange(CACHED_K, device=device).repeat(size, 1)
            topk = TopK(ids, torch.full(ids.shape, 1 / classes, device=device).log(), 2.0)
            before = _now(device)
            FROM_CACHE[loss](student, topk, labels, 2.0, 0.1).backward()  # type: ignore[no-untyped-call]
            continue
        before = _now(device)
        LOSSES[loss](student, teacher, labels, 2.0, 0.1).backward()  # type: ignore[no-untyped-call]
    return _peak(device) - before


def _now(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return resident_bytes("VmRSS")


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes("VmHWM")


def resident_bytes(field: str) -> int:
    """Of this process: now, ``VmRSS``, or the most so far, ``VmHWM``; the file says ``VmRSS:   123456 kB``."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(_measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), torch.device("cpu")))
