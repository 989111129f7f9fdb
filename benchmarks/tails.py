"""What students lose who see K of a teacher's tokens: ``python -m fastkd.bench.tails --out FILE``.

On the demo's text task, a student for each tail of a ``TopK``, and one from samples, beside one that sees the whole
teacher and one that sees labels only: alike but for the loss, on the same batches, from several seeds. The held-out
cross-entropy of each, in nats a token. Nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastkd
from fastkd.bench import run
from fastkd.demo import training
from fastkd.demo.losses import CACHED_K, Loss, fastkd_kd, labels_only

TAILS = ("bucket", "renormalize", "support", "truncate")
WHOLE, LABELS, SAMPLES = "the whole teacher", "labels only", f"{CACHED_K} samples, renormalize"


def of_tokens(make: Callable[[Tensor, float], fastkd.TopK]) -> Loss:
    def loss(student: Tensor, teacher: Tensor | None, labels: Tensor, temperature: float, hard_weight: float) -> Tensor:
        assert teacher is not None
        return fastkd_kd(student, make(teacher, temperature), labels, temperature, hard_weight)

    return loss


def losses(seed: int) -> dict[str, Loss]:
    def top_k(tail: str) -> Loss:
        return of_tokens(lambda z, temperature: fastkd.top_k(z, CACHED_K, temperature=temperature, tail=tail))

    draws = torch.Generator().manual_seed(seed)
    samples = of_tokens(lambda z, t: fastkd.sample_tokens(z, CACHED_K, temperature=t, generator=draws))
    tops = {f"top {CACHED_K}, {tail}": top_k(tail) for tail in TAILS}
    return {WHOLE: fastkd_kd, **tops, SAMPLES: samples, LABELS: labels_only}


def held_out(seed: int) -> dict[str, float]:
    """By student, after as many steps as the demo takes."""
    from fastkd.demo import text  # needs tokenizers, which whoever writes the documentation may lack

    task = text.make_task(seed, torch.device("cpu"))

    def track(name: str, steps: int) -> Callable[[training.Run], None]:
        return lambda found: None

    teacher = training.train(task, task.teacher, None, {"teacher": labels_only}, 2 * seed, track)["teacher"]
    students = training.train(task, task.student, teacher.model, losses(seed), 2 * seed + 1, track)
    return {"teacher": teacher.run.final, **{name: student.run.final for name, student in students.items()}}


def table(results: dict[str, Any]) -> list[list[str]]:
    """Means over the seeds, and how far each student is from the one that sees the whole teacher, least to most."""
    runs = results["runs"]
    lines = [["student sees", "held-out nats a token", "more than with the whole teacher"]]
    for name in runs[0]:
        more = [found[name] - found[WHOLE] for found in runs]
        span = "" if name in ("teacher", WHOLE) else f"{min(more):.3f} to {max(more):.3f}"
        label = "(the teacher)" if name == "teacher" else name
        lines.append([label, f"{statistics.mean(found[name] for found in runs):.3f}", span])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastkd.bench.tails", description=__doc__.partition(":")[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": run.machine("cpu"), "runs": []}
    for seed in range(arguments.seeds):
        results["runs"].append(held_out(seed))
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    for line in table(results):
        print(f"{line[0]:28}{line[1]:>24}  {line[2]}")


if __name__ == "__main__":
    main()
