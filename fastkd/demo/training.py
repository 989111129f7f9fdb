"""One training loop for every model of the demo, and the comparison made of four runs of it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastkd import LinearLogits
from fastkd.demo import cached
from fastkd.demo.losses import FROM_CACHE, FROM_HIDDEN_STATES, LOSSES, CachedLoss, HiddenLoss, Loss, labels_only

Batch = tuple[Tensor, Tensor]  # inputs, labels


@dataclass(frozen=True)
class Recipe:
    """How one model is made and trained."""

    model: Callable[[], nn.Module]
    batches: Callable[[int, int], Iterable[Batch]]  # (steps, seed) -> the batches, the same ones for the same seed
    steps: int
    learning_rate: float

    def quick(self) -> Recipe:
        def quarters(steps: int, seed: int) -> Iterator[Batch]:
            for inputs, labels in self.batches(steps, seed):
                yield inputs[: len(inputs) // 4], labels[: len(labels) // 4]

        return replace(self, batches=quarters)

    def optimizer(self, model: nn.Module) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """AdamW, whose rate goes up over the first tenth of the steps, and down over the last 40 %."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate, betas=(0.9, 0.95), weight_decay=0.1)
        steps = self.steps
        return optimizer, torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) * 10 / steps, 1.0, (steps - step) / (0.4 * steps))
        )

    def is_measured(self, step: int) -> bool:
        """Whether the held-out loss is taken after so many steps: some ten times, and at the end."""
        return step % max(1, self.steps // 10) == 0 or step == self.steps


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
    has_hidden_states: bool = False  # the models can stop before their logits
    has_cache: bool = False  # the inputs are tokens, of which a cache of the teacher can be kept

    def quick(self) -> Task:
        """A quarter of each batch. (A quarter of the steps would take no longer, and teach much less.)"""
        return replace(self, rows=self.rows // 4, teacher=self.teacher.quick(), student=self.student.quick())


@dataclass
class Run:
    """What one training run left behind."""

    steps: int
    losses: list[float] = field(default_factory=list)  # the training loss of each step
    held_out: dict[int, float] = field(default_factory=dict)  # cross-entropy per row after so many steps
    loss_seconds: list[float] = field(default_factory=list)  # of each step: the loss and its gradient
    step_seconds: list[float] = field(default_factory=list)  # of each step, the teacher's forward within

    @property
    def final(self) -> float:
        return self.held_out[self.steps]


@dataclass(frozen=True)
class Comparison:
    teacher: Run
    students: dict[str, Run]  # by the name of the loss
    cached_bytes: float | None = None  # of a token, in the cache of the teacher

    @property
    def differences(self) -> list[float]:
        """Between the two KD training-loss curves from logits, step by step."""
        return [abs(a - b) for a, b in zip(self.students["usual"].losses, self.students["fastkd"].losses, strict=True)]

    @property
    def relative_difference(self) -> float:
        return max(d / abs(loss) for d, loss in zip(self.differences, self.students["usual"].losses, strict=True))


# (the run's name, its number of steps) -> called after each step with the run so far
Track = Callable[[str, int], Callable[[Run], None]]


def compare(task: Task, seed: int, track: Track) -> Comparison:
    """Train the teacher, then students that differ in the loss alone."""
    teacher = train(task, task.teacher, None, {"teacher": labels_only}, 2 * seed, track)["teacher"]
    losses: dict[str, Any] = {**LOSSES, **(FROM_HIDDEN_STATES if task.has_hidden_states else {})}
    recipe, seed = task.student, 2 * seed + 1
    with tempfile.TemporaryDirectory() as folder:
        on_disk = None
        if task.has_cache:
            losses |= FROM_CACHE
            inputs = (inputs for inputs, _ in recipe.batches(recipe.steps, seed))
            cached.write(Path(folder), teacher.model, inputs, task.temperature, task.classes)
            on_disk = cached.CachedTeacher(Path(folder))
        students = train(task, recipe, teacher.model, losses, seed, track, on_disk)
    runs = {name: student.run for name, student in students.items()}
    return Comparison(teacher.run, runs, on_disk.bytes_a_token if on_disk else None)


def train(
    task: Task,
    recipe: Recipe,
    teacher: nn.Module | None,
    losses: dict[str, Any],
    seed: int,
    track: Track,
    on_disk: cached.CachedTeacher | None = None,
) -> dict[str, Trainee]:
    """One model for each loss, alike but for that: on each batch all take a step.

    In turns, and each round the other way round, so that whatever else the machine does hits the times of all alike.
    """
    teachers = dict.fromkeys(losses, teacher) | dict.fromkeys(FROM_CACHE, on_disk)
    trainees = {
        name: Trainee(recipe, loss, None if loss is labels_only else teachers[name], seed)
        for name, loss in losses.items()
    }
    after_step = {name: track(name, recipe.steps) for name in losses}
    for trainee in trainees.values():
        trainee.run.held_out[0] = evaluate(trainee.model, task.held_out)
    for step, batch in enumerate(recipe.batches(recipe.steps, seed), 1):
        for trainee in list(trainees.values())[:: 1 if step % 2 else -1]:
            trainee.step(task, *batch)
        for name, trainee in trainees.items():
            if recipe.is_measured(step):
                trainee.run.held_out[step] = evaluate(trainee.model, task.held_out)
            after_step[name](trainee.run)
    return trainees


class Trainee:
    """A model, how it is trained, and its run."""

    def __init__(
        self,
        recipe: Recipe,
        loss: Loss | HiddenLoss | CachedLoss,
        teacher: nn.Module | cached.CachedTeacher | None,
        seed: int,
    ) -> None:
        torch.manual_seed(seed)
        self.model, self.loss, self.teacher = recipe.model(), loss, teacher
        self.optimizer, self.schedule = recipe.optimizer(self.model)
        self.run = Run(recipe.steps)

    def step(self, task: Task, inputs: Tensor, labels: Tensor) -> None:
        started = _now(inputs)
        self.optimizer.zero_grad()
        student = self.given(self.model, inputs)
        with torch.no_grad():
            teacher = None if self.teacher is None else self.given(self.teacher, inputs)

        # The loss's backward ends at what it is given, to be timed apart from the model's.
        output = student.hidden if isinstance(student, LinearLogits) else student
        leaf = output.detach().requires_grad_()
        student = student._replace(hidden=leaf) if isinstance(student, LinearLogits) else leaf
        loss_started = _now(inputs)
        loss: Tensor = self.loss(student, teacher, labels.flatten(), task.temperature, task.hard_weight)  # type: ignore[arg-type]
        loss.backward()  # type: ignore[no-untyped-call]
        self.run.loss_seconds.append(_now(inputs) - loss_started)

        output.backward(leaf.grad)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.run.step_seconds.append(_now(inputs) - started)
        self.run.losses.append(loss.item())

    def given(self, model: nn.Module | cached.CachedTeacher, inputs: Tensor) -> Any:
        """What the loss takes, one row a token: logits, what comes before them, or what is on disk of them."""
        if isinstance(model, cached.CachedTeacher):
            return model.read(inputs)
        if self.loss not in FROM_HIDDEN_STATES.values():
            return model(inputs).flatten(0, -2)
        source = model.before_logits(inputs)  # type: ignore[operator]
        return source._replace(hidden=source.hidden.flatten(0, -2))


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Mean cross-entropy on the labels."""
    losses = [F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten()) for inputs, labels in batches]
    return torch.stack(losses).mean().item()


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
