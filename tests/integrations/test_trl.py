"""TRL's losses and trainers against these, value by value and step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from trl import DistillationConfig
from trl import DistillationTrainer as TheirDistillationTrainer
from trl.experimental.gkd import GKDConfig
from trl.experimental.gkd import GKDTrainer as TheirGKDTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss as their_chunked_divergence_loss

from fastkd.integrations import trl as ours
from tests.integrations.models import VOCAB, arguments, check, check_steps, llama, step

pytestmark = pytest.mark.integration
B, S, V = 2, 7, 50
BETAS = [0.0, 0.1, 0.5, 1.0]


@pytest.fixture
def labels() -> Tensor:
    labels = torch.randint(V, (B, S))
    labels[0, :5] = -100
    return labels


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("num_items", [None, 9, torch.tensor(9), torch.tensor([9])], ids=str)
@pytest.mark.parametrize("with_labels", [True, False])
def test_generalized_jsd_loss(
    labels: Tensor, beta: float, temperature: float, reduction: str, num_items: Any, with_labels: bool
) -> None:
    """On the views that the trainer gives it."""
    student, teacher = torch.randn(B, S + 1, V, requires_grad=True), torch.randn(B, S + 1, V)
    given = {
        "student_logits": student[:, :-1], "teacher_logits": teacher[:, :-1], "labels": labels if with_labels else None,
        "beta": beta, "temperature": temperature, "reduction": reduction, "num_items_in_batch": num_items,
    }  # fmt: skip
    expected = TheirGKDTrainer.generalized_jsd_loss(**given).squeeze()
    check(ours.GKDTrainer.generalized_jsd_loss(**given), expected, student)


@pytest.mark.parametrize("shape", [(6, V), (2, 3, V)])
def test_generalized_jsd_loss_in_its_place(shape: tuple[int, ...]) -> None:
    """The defaults, by position, and rows of any shape."""
    student, teacher = torch.randn(shape, requires_grad=True), torch.randn(shape)
    check(ours.generalized_jsd_loss(student, teacher), TheirGKDTrainer.generalized_jsd_loss(student, teacher), student)


def test_generalized_jsd_loss_without_labels_that_count() -> None:
    student, ignored = torch.randn(B, S, V, requires_grad=True), torch.full((B, S), -100)
    for reduction in ("batchmean", "mean", "sum"):
        loss = ours.generalized_jsd_loss(student, torch.randn(B, S, V), ignored, reduction=reduction)
        (grad,) = torch.autograd.grad(loss, student)
        assert loss == 0 and not grad.any()


def test_elementwise_values_are_refused() -> None:
    logits = torch.randn(B, S, V)
    with pytest.raises(ValueError, match=r"reduction: got 'none', must be .* elementwise values are never there"):
        ours.generalized_jsd_loss(logits, logits, reduction="none")


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("num_items", [None, 9, torch.tensor(9.0)], ids=str)
@pytest.mark.parametrize("extras", [False, True])
def test_chunked_divergence_loss(labels: Tensor, beta: float, num_items: Any, extras: bool) -> None:
    """Loss, gradients, entropy and count; with bias, scale and soft cap."""
    hidden, weight, bias = (torch.randn(shape, requires_grad=True) for shape in ((B, S, 8), (V, 8), (V,)))
    fixed = {"teacher_hidden_states": torch.randn(B, S, 16), "teacher_lm_head_weight": torch.randn(V, 16) / 4}
    if extras:
        fixed |= {
            "student_lm_head_bias": bias, "teacher_lm_head_bias": torch.randn(V), "student_logit_scale": 0.5,
            "teacher_logit_scale": 2.0, "student_final_logit_softcapping": 4.0, "teacher_final_logit_softcapping": 5.0,
        }  # fmt: skip
    given = {
        "student_hidden_states": hidden, "student_lm_head_weight": weight, "completion_mask": (labels != -100).long(),
        "beta": beta, "num_items_in_batch": num_items, "temperature": 1.3, **fixed,
    }  # fmt: skip
    (loss, entropy, count), expected = ours.chunked_divergence_loss(**given), their_chunked_divergence_loss(**given)
    check(loss, expected[0], *((hidden, weight, bias) if extras else (hidden, weight)))
    assert not entropy.requires_grad
    torch.testing.assert_close(entropy, expected[1], rtol=1e-5, atol=1e-5)
    assert count == expected[2] == (labels != -100).sum()


def tokenizer() -> Any:
    """A word an id."""
    words = {word: index for index, word in enumerate(["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCAB))])}
    splitter = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
    made.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    return made


def conversation(index: int) -> list[dict[str, str]]:
    answer = " ".join(f"w{10 + j}" for j in range(2 + index % 4))
    return [{"role": "user", "content": "w3 w4 w5 "}, {"role": "assistant", "content": answer}]


ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


@pytest.mark.parametrize("given", [{}, ACCUMULATED], ids=str)
def test_a_gkd_step(tmp_path: Path, given: dict[str, Any]) -> None:
    """Off-policy, of answers of unequal length, as one batch or as four; and an evaluation."""
    data = Dataset.from_list([{"messages": conversation(index)} for index in range(8)])
    found = []
    for cls in (TheirGKDTrainer, ours.GKDTrainer):
        args = arguments(tmp_path, GKDConfig, lmbda=0.0, max_length=32, max_new_tokens=4, beta=0.3, **given)
        trainer = cls(
            llama(16, 1), llama(32, 2), args, train_dataset=data, eval_dataset=data, processing_class=tokenizer()
        )
        evaluated = trainer.evaluate()["eval_loss"]
        found.append((evaluated, step(trainer)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    check_steps(found[1][1], found[0][1])


def test_a_gkd_run_on_policy(tmp_path: Path) -> None:
    data = Dataset.from_list([{"messages": conversation(index)} for index in range(8)])
    args = arguments(tmp_path, GKDConfig, lmbda=1.0, max_length=32, max_new_tokens=4, max_steps=2, learning_rate=0.1)
    trainer = ours.GKDTrainer(llama(16, 1), llama(32, 2), args, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    assert all(entry["loss"] > 0 for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("given", [{}, ACCUMULATED], ids=str)
def test_a_distillation_step(tmp_path: Path, given: dict[str, Any], beta: float) -> None:
    """On completions that the student generates, the same in both by their seed; and the entropy that is logged."""
    data = Dataset.from_list([{"prompt": conversation(index)[:1]} for index in range(8)])
    found = []
    for cls in (TheirDistillationTrainer, ours.DistillationTrainer):
        args = arguments(tmp_path, DistillationConfig, max_completion_length=6, beta=beta, temperature=1.2, **given)
        trainer = cls(llama(16, 1), llama(32, 2), args, train_dataset=data, processing_class=tokenizer())
        torch.manual_seed(0)
        found.append((step(trainer), trainer.state.log_history[0]["entropy"]))
    check_steps(found[1][0], found[0][0])
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-5)
