"""A BERT of 12 tiny layers distilled into one of 6, from configurations and with masks from padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

import fastkd

VOCAB, LAYERS = 101, "bert.encoder.layer"


def bert(layers: int, width: int) -> Any:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2,
            intermediate_size=2 * width, max_position_embeddings=16, attn_implementation="eager",
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Two sequences, of which the second is padded; labels on some tokens, as in masked language modelling."""
    ids = torch.randint(1, VOCAB, (2, 9))
    attention_mask = torch.ones(2, 9, dtype=torch.int64)
    attention_mask[1, 5:], ids[1, 5:] = 0, 0
    labels = torch.where((torch.rand(2, 9) < 0.4) & attention_mask.bool(), ids, -100)
    labels[:, 0] = ids[:, 0]
    return {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}


def run(model: Any, batch: dict[str, Tensor]) -> Any:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model(**inputs, output_hidden_states=True, output_attentions=True)


def distillation_loss(student: Any, teacher: Any, loss_fn: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        its = run(teacher, batch)
    mine = run(student, batch)
    real = batch["attention_mask"].bool()
    kd: Any = fastkd.kd_loss(
        mine.logits, its.logits, batch["labels"], temperature=2.0, hard_weight=0.5, soft_weight=0.5
    )
    hidden = loss_fn(mine.hidden_states, its.hidden_states, mask=real)
    rows = real[:, None].expand(mine.attentions[-1].shape[:-1])
    tiny = torch.finfo(torch.float32).tiny  # log 0 has no derivative
    maps = (model.attentions[-1].clamp_min(tiny).log() for model in (mine, its))
    attention: Any = fastkd.kd_loss(*maps, mask=rows)
    return kd + hidden + 0.1 * attention


def by_hand(student: Any, teacher: Any, loss_fn: Any, batch: dict[str, Tensor], kind: str) -> Tensor:
    with torch.no_grad():
        its = run(teacher, batch)
    mine = run(student, batch)
    labels, real = batch["labels"], batch["attention_mask"].bool()
    counts = labels != -100
    soft = F.kl_div(
        F.log_softmax(mine.logits[counts] / 2.0, -1), F.log_softmax(its.logits[counts] / 2.0, -1),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    loss = 0.5 * F.cross_entropy(mine.logits[counts], labels[counts]) + 0.5 * 4.0 * soft
    for index, (i, j) in enumerate(((1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12))):
        s, t = mine.hidden_states[i], its.hidden_states[j][real]
        s = (loss_fn.projections[index](s) if len(loss_fn.projections) else s)[real]
        loss = loss + (F.mse_loss(s, t) if kind == "mse" else (1.0 - F.cosine_similarity(s, t, dim=-1)).mean()) / 6
    rows = real[:, None].expand(2, 2, 9)
    p_t, p_s = its.attentions[-1][rows], mine.attentions[-1][rows]
    ratio = torch.where(p_t > 0, p_t.clamp_min(1e-30).log() - p_s.clamp_min(1e-30).log(), 0.0)
    return loss + 0.1 * (p_t * ratio).sum(-1).mean()


@pytest.mark.parametrize("kind", ["mse", "cosine"])
@pytest.mark.parametrize("width", [16, 24])
def test_gradients_agree_with_the_loss_by_hand(batch: dict[str, Tensor], kind: str, width: int) -> None:
    """Of every parameter of the student, and of the projections where the teacher is wider."""
    teacher, student = bert(12, width).eval(), bert(6, 16)
    loss_fn = fastkd.HiddenLoss(fastkd.layer_map(6, 12), 16, width, kind=kind)
    parameters = dict(student.named_parameters()) | dict(loss_fn.named_parameters())
    losses = [distillation_loss(student, teacher, loss_fn, batch), by_hand(student, teacher, loss_fn, batch, kind)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(loss, list(parameters.values()), allow_unused=True) for loss in losses]
    compared = 0
    for name, grad, expected in zip(parameters, *grads, strict=True):
        assert (grad is None) == (expected is None), name
        if grad is not None:
            torch.testing.assert_close(
                grad, expected, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
            compared += 1
    assert compared > 6 * 16


def test_distillation_of_a_copy(batch: dict[str, Tensor]) -> None:
    """Copied layers, then some steps: all of the student comes from the teacher, and the loss goes down."""
    torch.manual_seed(1)
    teacher, student = bert(12, 16).eval(), bert(6, 16)
    pairs = fastkd.layer_map(6, 12)
    report = fastkd.copy_layers(teacher, student, pairs, teacher_layers=LAYERS)
    assert {name for name, _ in student.named_parameters()} <= set(report.copied)
    assert not [name for name in report.skipped if not name.startswith(LAYERS)]
    assert torch.equal(
        student.bert.encoder.layer[2].attention.self.query.weight,
        teacher.bert.encoder.layer[5].attention.self.query.weight,
    )
    loss_fn = fastkd.HiddenLoss(pairs, 16, 16)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = distillation_loss(student, teacher, loss_fn, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_captured_layers_are_the_hidden_states(batch: dict[str, Tensor], checkpointing: bool) -> None:
    """By names of modules instead of output_hidden_states, and with gradient checkpointing the same gradients."""
    student = bert(6, 16).train()
    names = ["bert.embeddings", *(f"{LAYERS}.{index}" for index in range(6))]
    states = run(student, batch).hidden_states
    (expected,) = torch.autograd.grad(states[3].square().sum(), student.bert.embeddings.word_embeddings.weight)
    if checkpointing:
        student.activation_checkpointing_enable()
    with fastkd.capture(student, names) as hidden:
        student(batch["input_ids"], attention_mask=batch["attention_mask"])
        taken = hidden.take()
        for one, other in zip(taken, states, strict=True):
            torch.testing.assert_close(one, other)
        (grad,) = torch.autograd.grad(taken[3].square().sum(), student.bert.embeddings.word_embeddings.weight)
    torch.testing.assert_close(grad, expected)
