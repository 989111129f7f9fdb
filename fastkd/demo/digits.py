"""The digits task: scikit-learn's 1797 handwritten digits, 8 × 8 pixels. It runs in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from fastkd.demo.models import mlp
from fastkd.demo.training import Batch, Recipe, Task

CLASSES, PIXELS, BATCH = 10, 64, 128
HELD_OUT, STUDENT_IMAGES = 500, 150


def make_task(seed: int, device: torch.device) -> Task:
    pixels, digits = load_digits(return_X_y=True)
    images = torch.as_tensor(pixels, dtype=torch.float32, device=device) / 16.0
    labels = torch.as_tensor(digits, dtype=torch.long, device=device)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(device)
    held_out, all_train = order[:HELD_OUT], order[HELD_OUT:]
    few_train = all_train[:STUDENT_IMAGES]
    return Task(
        name="digits",
        summary=f"Handwritten digits: the teacher trains on {len(all_train):,} images, the students on "
        f"{len(few_train)} of them; {HELD_OUT} others are held out.",
        row="image",
        rows=BATCH,
        classes=CLASSES,
        held_out=[(images[held_out], labels[held_out])],
        teacher=Recipe(
            lambda: mlp(PIXELS, 512, CLASSES).to(device),
            partial(random_batches, images[all_train], labels[all_train]),
            steps=400,
            learning_rate=5e-3,
        ),
        student=Recipe(
            lambda: mlp(PIXELS, 32, CLASSES).to(device),
            partial(random_batches, images[few_train], labels[few_train]),
            steps=300,
            learning_rate=1e-2,
        ),
        temperature=4.0,
        hard_weight=0.1,
    )


def random_batches(images: Tensor, labels: Tensor, steps: int, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (BATCH,), generator=generator).to(labels.device)
        yield images[chosen], labels[chosen]
