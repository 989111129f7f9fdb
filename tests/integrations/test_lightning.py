"""KDModule under Lightning's Trainer: the step by hand, whatever is accumulated."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import fastkd
from fastkd.integrations.lightning import KDModule
from tests.integrations.models import check_steps, parameters

pytestmark = pytest.mark.integration
V, ROWS = 50, 8


def model(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(V, width), nn.Linear(width, width), nn.Dropout(0.0), nn.Linear(width, V))


def rows() -> list[tuple[Tensor, Tensor]]:
    """Inputs and labels of 8 sequences of which ever fewer labels count, and of one none."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(ROWS):
        inputs, labels = torch.randint(V, (2, 10), generator=generator)
        labels[: 10 if index == 3 else index] = -100
        made.append((inputs, labels))
    return made


def module(**settings: Any) -> KDModule:
    loss_fn = fastkd.KDLoss(**{"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7, **settings})
    return KDModule(model(8, 1), model(16, 2), loss_fn, partial(torch.optim.SGD, lr=1.0))


def trainer(folder: Path, **given: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return Trainer(accelerator="cpu", default_root_dir=folder, max_epochs=1, **{**quiet, **given})


def loader(batch_size: int) -> Any:
    return DataLoader(rows(), batch_size=batch_size)


def by_hand(data: list[tuple[Tensor, Tensor]]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the mean over all labels that count."""
    student, teacher = model(8, 1), model(16, 2)
    inputs, labels = (torch.stack(part) for part in zip(*data, strict=True))
    keep = labels != -100
    z, u = student(inputs)[keep], teacher(inputs)[keep].detach()
    soft = F.kl_div(F.log_softmax(z / 2, -1), F.log_softmax(u / 2, -1), reduction="batchmean", log_target=True)
    loss = 0.3 * F.cross_entropy(z, labels[keep]) + 0.7 * 4 * soft
    loss.backward()
    return loss.item(), {name: parameter.grad.clone() for name, parameter in student.named_parameters()}


def step(distiller: KDModule, run: Trainer, batches: Any) -> tuple[float, dict[str, Tensor]]:
    before = parameters(distiller.student)
    run.fit(distiller, batches)
    after = parameters(distiller.student)
    return run.callback_metrics["train_loss"].item(), {name: before[name] - after[name] for name in before}


@pytest.mark.parametrize(("batch_size", "accumulated"), [(8, 1), (2, 4), (1, 8), (2, 100)])
def test_accumulation(tmp_path: Path, batch_size: int, accumulated: int) -> None:
    """One step of 8 rows, in parts of unequal numbers of labels; of 100 parts, an epoch has 4."""
    loss, grads = by_hand(rows())
    found = step(module(), trainer(tmp_path, accumulate_grad_batches=accumulated), loader(batch_size))
    check_steps((found[0] if batch_size == 8 else loss, found[1]), (loss, grads))


def test_gradients_are_clipped_as_what_they_are(tmp_path: Path) -> None:
    _, grads = by_hand(rows())
    norm = torch.cat([grad.flatten() for grad in grads.values()]).norm().item()
    given = {"accumulate_grad_batches": 4, "gradient_clip_val": norm / 2}
    _, found = step(module(), trainer(tmp_path, **given), loader(2))
    assert torch.cat([grad.flatten() for grad in found.values()]).norm().item() == pytest.approx(norm / 2, rel=1e-4)


def test_validation(tmp_path: Path) -> None:
    """Means over all labels, of batches with unequal numbers of them."""
    (found,) = trainer(tmp_path).validate(module(), loader(3), verbose=False)
    assert found["val_loss"] == pytest.approx(by_hand(rows())[0], rel=1e-5)
    assert found["val_loss"] == pytest.approx(0.3 * found["val_hard"] + 2.8 * found["val_soft"], rel=1e-5)


def test_the_terms_are_logged(tmp_path: Path) -> None:
    for hard_weight, logged in ((0.3, {"train_loss", "train_hard", "train_soft"}), (0.0, {"train_loss"})):
        run = trainer(tmp_path)
        run.fit(module(hard_weight=hard_weight), loader(8))
        assert set(run.callback_metrics) == logged


def test_bf16(tmp_path: Path) -> None:
    _, grads = by_hand(rows())
    run = trainer(tmp_path, precision="bf16-mixed", accumulate_grad_batches=4)
    _, found = step(module(), run, loader(2))
    for name, grad in grads.items():
        assert (found[name] - grad).norm() < 0.05 * grad.norm() + 1e-3, name


def test_the_teacher_rests(tmp_path: Path) -> None:
    """No gradient, no dropout, no place in a checkpoint; and a checkpoint is loaded without it."""
    distiller = module()
    before = parameters(distiller.teacher)
    run = trainer(tmp_path, enable_checkpointing=True)
    run.fit(distiller, loader(2))
    distiller.train()
    assert distiller.student.training and not distiller.teacher.training
    assert all(torch.equal(value, before[name]) for name, value in parameters(distiller.teacher).items())
    run.save_checkpoint(path := tmp_path / "last.ckpt")
    state = torch.load(path, weights_only=False)["state_dict"]
    assert state and all(name.startswith("student.") for name in state)
    fresh = module()
    trainer(tmp_path).validate(fresh, loader(3), ckpt_path=path, verbose=False)
    assert torch.equal(fresh.student[0].weight, distiller.student[0].weight)


class FromHiddenStates(KDModule):
    def distil(self, batch: Any) -> Any:
        inputs, labels = batch
        sources = []
        for network in (self.student, self.teacher):
            *body, head = network
            sources.append(fastkd.LinearLogits(nn.Sequential(*body)(inputs), head.weight, head.bias))
        return *sources, labels


def test_from_hidden_states(tmp_path: Path) -> None:
    distiller = FromHiddenStates(model(8, 1), model(16, 2), module().loss_fn, partial(torch.optim.SGD, lr=1.0))
    check_steps(step(distiller, trainer(tmp_path), loader(8)), by_hand(rows()))


def test_two_processes(tmp_path: Path) -> None:
    """DDP: each has half of every batch, with another number of labels."""
    run = trainer(tmp_path, devices=2, strategy="ddp_spawn", accumulate_grad_batches=2)
    distiller = module()
    before = parameters(distiller.student)
    run.fit(distiller, DataLoader(rows(), batch_size=2))
    after = parameters(distiller.student)
    loss, grads = by_hand(rows())
    check_steps((loss, {name: before[name] - after[name] for name in before}), (loss, grads))


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="loss_fn: got reduction='sum', must be 'mean'"):
        module(reduction="sum")
    distiller = KDModule(model(8, 1), model(16, 2), module().loss_fn)
    with pytest.raises(ValueError, match="optimizer: got None"):
        trainer(tmp_path).fit(distiller, loader(2))
