"""Tiny models of Transformers' from a configuration, rows for them to read, and a Trainer that takes one plain step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

VOCAB = 211


def llama(width: int, seed: int, vocab: int = VOCAB, **config: Any) -> Any:
    """Weights large enough that distributions differ."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab, hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=2 * width, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, **config,
        )
    )  # fmt: skip


def rows(count: int = 8, length: int = 12) -> list[dict[str, Tensor]]:
    """Of unequal numbers of labels, one row with none; padded on the right."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        mask = torch.arange(length) < length - index % 4
        labels = ids.masked_fill(~mask, -100)
        labels[: 1 + index] = -100
        made.append({"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long(), "labels": labels})
    made[1]["labels"] = torch.full((length,), -100)
    return made


def arguments(folder: Path, cls: type[TrainingArguments] = TrainingArguments, **given: Any) -> Any:
    """One step of plain gradient descent on 8 rows, so that weights before and after say what the gradient was."""
    settings = {
        "per_device_train_batch_size": 8, "max_steps": 1, "optim": "sgd", "learning_rate": 1.0,
        "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "bf16": False,
    }  # fmt: skip
    return cls(str(folder), **{**settings, **given})


def step(trainer: Any) -> tuple[float, dict[str, Tensor]]:
    """The loss that was logged, and what the step took off each parameter."""
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    (loss,) = (entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    return loss, {name: before[name] - parameter.detach() for name, parameter in trainer.model.named_parameters()}


def check_steps(one: tuple[float, dict[str, Tensor]], other: tuple[float, dict[str, Tensor]]) -> None:
    """The same loss, and the same gradient of every parameter, all of it to 1e-5."""
    assert abs(one[0] - other[0]) <= 1e-5 * abs(other[0]) + 1e-7, (one[0], other[0])
    assert set(one[1]) == set(other[1])
    for name, gradient in other[1].items():
        error, size = (one[1][name] - gradient).norm().item(), gradient.norm().item()
        assert error <= 1e-5 * size + 1e-6, f"{name}: {error:.1e} of {size:.1e}"
    assert max(gradient.norm().item() for gradient in other[1].values()) > 1e-3


def check(ours: Tensor, theirs: Tensor, *leaves: Tensor) -> None:
    """Loss and gradients to 1e-5."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    grads = [torch.autograd.grad(loss, leaves) for loss in (ours, theirs)]
    for grad, expected in zip(*grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def leave() -> NoReturn:
    """End a process of torchrun's without Python's own ending, in which a thread of gloo's may abort it.

    It does where it has yet to let go of the tensors of its last collective. ``destroy_process_group`` waits for it
    only if nothing else has the group, and a DDP module or a mesh does (PyTorch 2.13).
    """
    os._exit(0)
