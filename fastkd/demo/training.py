"""One training loop for every model of the demo, and the comparison made of four runs of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd.demo.losses import LOSSES, Loss, labels_only

Batch = tuple[Tensor, Tensor]  # inputs, labels


@dataclass(frozen=True)
class Recipe:
    """How one model is made and trained."""

    model: Callable[[], nn.Module]
    batches: Callable[[int, int], Iterable[Batch]]  # (steps, seed) -> the batches, the same ones for the same seed
    steps: int
    learning_rate: float


@dataclass(frozen=True)
class Task:
    name: str
    summary: str  # what is distilled, on what
    row: str  # what one row of the logits stands for
    rows: int  # of one batch's logits
    classes: int
    held_out: Sequence[Batch]
    teacher: Recipe
    student: Recipe
    temperature: float
    hard_weight: float


@dataclass
class Run:
    """What one training run left behind. Times are medians over the steps."""

    steps: int
    losses: list[float] = field(default_factory=list)  # the training loss of each step
    held_out: dict[int, float] = field(default_factory=dict)  # cross-entropy per row after so many steps
    loss_seconds: float = 0.0
    step_seconds: float = 0.0

    @property
    def final(self) -> float:
        return self.held_out[self.steps]


@dataclass(frozen=True)
class Comparison:
    teacher: Run
    students: dict[str, Run]  # by the name of the loss

    @property
    def differences(self) -> list[float]:
        """Between the two KD training-loss curves, step by step."""
        return [abs(a - b) for a, b in zip(self.students["usual"].losses, self.students["fastkd"].losses, strict=True)]

    @property
    def relative_difference(self) -> float:
        return max(d / abs(loss) for d, loss in zip(self.differences, self.students["usual"].losses, strict=True))


# (the run's name, its number of steps) -> called after each step with the run so far
Track = Callable[[str, int], Callable[[Run], None]]


def compare(task: Task, seed: int, track: Track) -> Comparison:
    """Train the teacher, then three students that differ in the loss alone."""
    teacher, teacher_run = train(task, task.teacher, None, labels_only, 2 * seed, track("teacher", task.teacher.steps))
    students = {}
    for name, loss in LOSSES.items():
        guide = None if loss is labels_only else teacher
        _, students[name] = train(task, task.student, guide, loss, 2 * seed + 1, track(name, task.student.steps))
    return Comparison(teacher_run, students)


def train(
    task: Task,
    recipe: Recipe,
    teacher: nn.Module | None,
    loss_function: Loss,
    seed: int,
    on_step: Callable[[Run], None],
) -> tuple[nn.Module, Run]:
    torch.manual_seed(seed)
    model = recipe.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
    # Up over the first tenth of the steps, down over the last 40 %.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) * 10 / recipe.steps, 1.0, (recipe.steps - step) / (0.4 * recipe.steps))
    )
    run = Run(recipe.steps, held_out={0: evaluate(model, task.held_out)})
    loss_seconds, step_seconds = [], []
    for step, (inputs, labels) in enumerate(recipe.batches(recipe.steps, seed), 1):
        started = _now(inputs)
        logits = model(inputs).flatten(0, -2)
        with torch.no_grad():
            teacher_logits = None if teacher is None else teacher(inputs).flatten(0, -2)

        # The loss's backward ends at the logits, to be timed apart from the model's.
        leaf = logits.detach().requires_grad_()
        loss_started = _now(inputs)
        loss = loss_function(leaf, teacher_logits, labels.flatten(), task.temperature, task.hard_weight)
        loss.backward()  # type: ignore[no-untyped-call]
        loss_seconds.append(_now(inputs) - loss_started)

        optimizer.zero_grad()
        logits.backward(leaf.grad)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        step_seconds.append(_now(inputs) - started)

        run.losses.append(loss.item())
        if step % max(1, recipe.steps // 10) == 0 or step == recipe.steps:
            run.held_out[step] = evaluate(model, task.held_out)
        on_step(run)
    run.loss_seconds, run.step_seconds = median(loss_seconds), median(step_seconds)
    return model, run


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy on the labels."""
    losses = [F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten()) for inputs, labels in batches]
    return torch.stack(losses).mean().item()


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
