"""The layers task: a teacher of 12 layers and students of 6, which learn from ever more of it.

All have one width, so that layers can be copied. What the students of a seed begin with (but for the copies), their
batches, their number of steps, their learning rate and its schedule are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastkd
from fastkd.demo import text
from fastkd.demo.models import LanguageModel
from fastkd.demo.training import Batch, Recipe, evaluate

VOCABULARY, WIDTH, HEADS = 2048, 96, 4  # of few tokens, lest their matrices cost more than the layers
TEACHER_LAYERS, STUDENT_LAYERS, SEEDS = 12, 6, 3
TEMPERATURE, HARD_WEIGHT = 2.0, 0.1
# DistilBERT's. The states of these models grow from layer to layer, to a mean square of about 70: at that weight a mean
# squared difference drowns the other terms, and the students do worse than without it.
HIDDEN_KIND, HIDDEN_WEIGHT = "cosine", 1.0
PAIRS = fastkd.layer_map(STUDENT_LAYERS, TEACHER_LAYERS)


@dataclass(frozen=True)
class Method:
    """What a student learns from, besides its batches."""

    name: str
    logits: bool = False
    hidden: bool = False
    copied: bool = False


METHODS = (
    Method("labels only"),
    Method("KD", logits=True),
    Method("KD + hidden layers", logits=True, hidden=True),
    Method("KD + hidden + copied layers", logits=True, hidden=True, copied=True),
)


@dataclass(frozen=True)
class Task:
    summary: str
    held_out: Sequence[Batch]
    teacher: Recipe
    student: Recipe


@dataclass
class Run:
    held_out: dict[int, float]  # cross-entropy per token after so many steps
    seconds: float = 0.0  # of all of it, the teacher's forward passes and the evaluations included

    @property
    def final(self) -> float:
        return self.held_out[max(self.held_out)]


@dataclass
class Comparison:
    teacher: Run
    students: dict[str, list[Run]]  # of each method, one a seed


def make_task(seed: int, device: torch.device) -> Task:
    data = text.load(seed, device, VOCABULARY)
    batches = partial(text.random_batches, data.train)

    def model(layers: int) -> nn.Module:
        return LanguageModel(data.log_frequencies, text.CONTEXT, WIDTH, layers, HEADS).to(device)

    return Task(
        summary=f"{data.summary} Width {WIDTH}; a teacher of {TEACHER_LAYERS} layers, students of {STUDENT_LAYERS}.",
        held_out=list(text.even_batches(data.held_out)),
        teacher=Recipe(partial(model, TEACHER_LAYERS), batches, steps=500, learning_rate=4e-3),
        student=Recipe(partial(model, STUDENT_LAYERS), batches, steps=120, learning_rate=4e-3),
    )


def compare(task: Task, seed: int, seeds: int, done: Callable[[str, Run], None]) -> Comparison:
    """One teacher, then a student by each method for each seed; ``done`` hears of every run that ends."""
    teacher, run = train(task, task.teacher, seed * (seeds + 1), METHODS[0], None)
    done("teacher", run)
    comparison = Comparison(run, {method.name: [] for method in METHODS})
    for number in range(1, seeds + 1):
        for method in METHODS:
            _, run = train(task, task.student, seed * (seeds + 1) + number, method, teacher)
            comparison.students[method.name].append(run)
            done(f"{method.name}, seed {number}", run)
    return comparison


def train(task: Task, recipe: Recipe, seed: int, method: Method, teacher: nn.Module | None) -> tuple[nn.Module, Run]:
    started = time.perf_counter()
    torch.manual_seed(seed)
    model = recipe.model()
    if method.copied:
        assert teacher is not None
        fastkd.copy_layers(teacher, model, PAIRS, teacher_layers="blocks")
    optimizer, schedule = recipe.optimizer(model)
    run = Run({0: evaluate(model, task.held_out)})
    with ExitStack() as stack:
        loss = partial(step_loss, model, teacher, method, Hidden(model, teacher, stack) if method.hidden else None)
        for step, (inputs, labels) in enumerate(recipe.batches(recipe.steps, seed), 1):
            optimizer.zero_grad()
            loss(inputs, labels.flatten()).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if recipe.is_measured(step):
                run.held_out[step] = evaluate(model, task.held_out)
    run.seconds = time.perf_counter() - started
    return model, run


class Hidden:
    """The loss between the hidden states of two models that do not return them."""

    def __init__(self, student: nn.Module, teacher: nn.Module | None, stack: ExitStack) -> None:
        assert teacher is not None
        self.loss = fastkd.HiddenLoss(PAIRS, WIDTH, WIDTH, kind=HIDDEN_KIND)
        self.student, self.teacher = (
            stack.enter_context(fastkd.capture(model, ["tokens", *(f"blocks.{index}" for index in range(layers))]))
            for model, layers in ((student, STUDENT_LAYERS), (teacher, TEACHER_LAYERS))
        )

    def __call__(self) -> Tensor:
        """Of the forward passes just made."""
        return self.loss(self.student.take(), self.teacher.take())


def step_loss(
    model: nn.Module, teacher: nn.Module | None, method: Method, hidden: Hidden | None, inputs: Tensor, labels: Tensor
) -> Tensor:
    logits = model(inputs).flatten(0, -2)
    if not method.logits or teacher is None:
        return F.cross_entropy(logits, labels)
    with torch.no_grad():
        teacher_logits = teacher(inputs).flatten(0, -2)
    loss = fastkd.kd_loss(
        logits, teacher_logits, labels, temperature=TEMPERATURE, hard_weight=HARD_WEIGHT, soft_weight=1.0 - HARD_WEIGHT
    )
    return loss if hidden is None else loss + HIDDEN_WEIGHT * hidden()
