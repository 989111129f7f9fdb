"""Generalised knowledge distillation with TRL: a student hears what the teacher thinks of what it says.

    pip install -e ".[trl]"
    python examples/trl_gkd.py

The task is to say a few words backwards. Models and tokenizer are made here: nothing is downloaded. The line that a
user of TRL changes is marked. It prints how much of what the student says is right, before and after, and what the
loss takes of a step; under a minute on a CPU.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig

from fastkd.integrations.trl import GKDTrainer  # changed: it was TRL's

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SAID = 3


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word an id."""
    words = {word: index for index, word in enumerate(["<pad>", "<bos>", "<eos>", "backwards:", *WORDS])}
    splitter = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=splitter, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    return tokenizer


def make_rows(count: int) -> Dataset:
    chance = random.Random(0)
    rows = []
    for _ in range(count):
        said = chance.choices(WORDS, k=SAID)
        question = {"role": "user", "content": " ".join([*said, "backwards:"])}
        answer = {"role": "assistant", "content": " ".join([*reversed(said), "<eos>"])}
        rows.append({"messages": [question, answer]})
    return Dataset.from_list(rows)


def make_model(width: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=4 + len(WORDS), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def teach(model: LlamaForCausalLM, tokenizer: Any, rows: Dataset, steps: int) -> None:
    """By the answers, in a plain loop."""
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in texts])
    labels = ids.clone()
    labels[:, : SAID + 1] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        batch = torch.randint(len(ids), (64,), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids[batch], labels=labels[batch]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def share_right(model: LlamaForCausalLM, tokenizer: Any, rows: Dataset) -> float:
    """Of the words that it says when asked, unsampled."""
    model.eval()
    asked = [row["messages"][0]["content"] for row in rows]
    ids = tokenizer(asked, return_tensors="pt")["input_ids"]
    said = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=SAID, min_new_tokens=SAID, do_sample=False
    )
    return (said[:, -SAID:] == ids[:, :SAID].flip(1)).float().mean().item()


def main(given: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=80, help="of the student; the teacher has five times as many")
    steps = parser.parse_args(given).steps
    tokenizer, rows = make_tokenizer(), make_rows(512)
    teacher, student = make_model(64, seed=1), make_model(32, seed=2)
    teach(teacher, tokenizer, rows, 5 * steps)
    teach(student, tokenizer, rows, steps // 2)  # so that what it says makes some sense
    found = {"teacher": share_right(teacher, tokenizer, rows), "student, before": share_right(student, tokenizer, rows)}
    with tempfile.TemporaryDirectory() as folder:
        args = GKDConfig(
            folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=2e-3, lmbda=0.5, beta=0.5,
            temperature=1.0, max_length=32, max_new_tokens=SAID + 1, logging_steps=max(steps // 4, 1),
            save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, bf16=False,
        )  # fmt: skip
        trainer = GKDTrainer(student, teacher, args, train_dataset=rows, processing_class=tokenizer)
        start = time.perf_counter()
        trainer.train()
        seconds = (time.perf_counter() - start) / steps
    found["student, after"] = share_right(student, tokenizer, rows)
    print(f"{1e3 * seconds:.0f} ms a step, what the student says in half of them included")
    for name, share in found.items():
        print(f"{name}: {share:.1%} of the words are right")
    return found


if __name__ == "__main__":
    main()
