"""Distillation with a Trainer of Hugging Face's: of a Llama, into one of half its width, on Python's own sources.

    pip install -e ".[transformers]"
    python examples/hf_trainer.py

Both models are made from a configuration, and read bytes: nothing is downloaded. The lines that a user of ``Trainer``
changes are marked. It prints what the student has learnt with the teacher and without, in as many steps; under a minute
on a CPU.
"""

from __future__ import annotations

import argparse
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fastkd.integrations.transformers import KDConfig, KDTrainer  # changed

VOCAB, LENGTH = 256, 64


def make_rows() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Windows of the standard library to train on, and others; of the first quarter nothing is to be learnt."""
    library = Path(sysconfig.get_paths()["stdlib"])
    data = b"".join(path.read_bytes() for path in sorted(library.glob("*.py"))[:80])
    windows = (
        torch.frombuffer(bytearray(data), dtype=torch.uint8).long()[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)
    )
    labels = windows.clone()
    labels[:, : LENGTH // 4] = -100
    rows = [{"input_ids": ids, "labels": own} for ids, own in zip(windows, labels, strict=True)]
    held_out = len(rows) // 20
    return rows[:-held_out], rows[-held_out:][::8]


def make_model(width: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=LENGTH, pad_token_id=None, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def arguments(folder: str, steps: int) -> TrainingArguments:
    return TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        logging_steps=max(steps // 4, 1),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )


def main(given: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="of the student; the teacher has three times as many")
    steps = parser.parse_args(given).steps
    train, held_out = make_rows()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        teacher = make_model(width=128, seed=1)
        trainer = Trainer(teacher, arguments(folder, 3 * steps), train_dataset=train, eval_dataset=held_out)
        trainer.train()
        found["teacher"] = trainer.evaluate()["eval_loss"]

        alone = Trainer(make_model(64, seed=2), arguments(folder, steps), train_dataset=train, eval_dataset=held_out)
        alone.train()
        found["student, from the text"] = alone.evaluate()["eval_loss"]

        distilled = KDTrainer(  # changed
            make_model(64, seed=2),
            arguments(folder, steps),
            teacher=teacher,  # changed
            kd_config=KDConfig(hard_weight=0.1, soft_weight=0.9),  # changed
            train_dataset=train,
            eval_dataset=held_out,
        )
        distilled.train()
        found["student, distilled"] = distilled.evaluate()["eval_hard_loss"]
    for name, loss in found.items():
        print(f"{name}: a cross-entropy of {loss:.3f} nats a byte")
    return found


if __name__ == "__main__":
    main()
