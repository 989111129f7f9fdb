"""The text task: a small language model on the Python standard library's own sources, docstrings and all."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from fastkd.demo.models import LanguageModel
from fastkd.demo.training import Batch, Recipe, Task

VOCABULARY = 8192
CONTEXT, BATCH = 64, 16
HELD_OUT_BATCHES, HELD_OUT_BATCH = 16, 4
# Far more than the runs read, and few enough that the tokenizer trains in seconds.
CHARACTERS = 6_000_000
# Installed packages and tests are not the library; pydoc_data is one file of generated text.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}
END = "<|end|>"


class Text(NamedTuple):
    """The library's sources as token ids."""

    train: Tensor
    held_out: Tensor
    log_frequencies: Tensor  # of each token, in the text to train on
    summary: str


def load(seed: int, device: torch.device, vocabulary: int) -> Text:
    root = Path(sysconfig.get_paths()["stdlib"])
    train_files, held_out_files = split(source_files(root), seed)
    train_texts, held_out_texts = read(train_files, CHARACTERS), read(held_out_files, CHARACTERS // 10)
    if len(held_out_texts) < 5:
        raise FileNotFoundError(f"{root} holds too few Python sources to train on; --task digits needs none")
    tokenizer = train_tokenizer(train_texts, vocabulary)
    train_ids, held_out_ids = encode(tokenizer, train_texts).to(device), encode(tokenizer, held_out_texts).to(device)
    counts = torch.bincount(train_ids, minlength=vocabulary)
    return Text(
        train_ids,
        held_out_ids,
        ((counts + 1.0) / (counts + 1.0).sum()).log(),
        f"Python's own standard library as text: {len(train_texts)} files ({len(train_ids):,} tokens) to train on, "
        f"{len(held_out_texts)} others held out; a vocabulary of {vocabulary:,} BPE tokens.",
    )


def make_task(seed: int, device: torch.device) -> Task:
    data = load(seed, device, VOCABULARY)
    model, batches = partial(LanguageModel, data.log_frequencies, CONTEXT), partial(random_batches, data.train)
    return Task(
        name="text",
        summary=data.summary,
        row="token",
        rows=BATCH * CONTEXT,
        classes=VOCABULARY,
        held_out=list(even_batches(data.held_out)),
        teacher=Recipe(lambda: model(width=192, layers=2, heads=4).to(device), batches, steps=160, learning_rate=4e-3),
        student=Recipe(lambda: model(width=128, layers=1, heads=4).to(device), batches, steps=80, learning_rate=5e-3),
        temperature=2.0,
        hard_weight=0.1,
        has_hidden_states=True,
        has_cache=True,
    )


def source_files(root: Path) -> list[Path]:
    return [path for path in sorted(root.rglob("*.py")) if not LEFT_OUT & set(path.relative_to(root).parts)]


def split(files: list[Path], seed: int) -> tuple[list[Path], list[Path]]:
    """(to train on, held out): every tenth file of a shuffled list, so that no file is in both."""
    shuffled = random.Random(seed).sample(files, len(files))
    held_out = shuffled[::10]
    return [path for path in shuffled if path not in set(held_out)], held_out


def read(files: list[Path], limit: int) -> list[str]:
    """The texts of the first files, up to about ``limit`` characters together."""
    texts: list[str] = []
    for path in files:
        if limit <= 0:
            break
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        limit -= len(texts[-1])
    return texts


def train_tokenizer(texts: list[str], vocabulary: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> Tensor:
    """All texts in one row of ids, each followed by the end token."""
    end = tokenizer.token_to_id(END)
    return torch.tensor([token for text in tokenizer.encode_batch(texts) for token in (*text.ids, end)])


def random_batches(ids: Tensor, steps: int, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield _windows(ids, torch.randint(len(ids) - CONTEXT, (BATCH,), generator=generator))


def even_batches(ids: Tensor) -> Iterator[Batch]:
    """Windows spread evenly over the text."""
    starts = torch.linspace(0, len(ids) - CONTEXT - 1, HELD_OUT_BATCHES * HELD_OUT_BATCH).long()
    for batch in starts.view(HELD_OUT_BATCHES, HELD_OUT_BATCH):
        yield _windows(ids, batch)


def _windows(ids: Tensor, starts: Tensor) -> Batch:
    windows = ids[(starts.unsqueeze(1) + torch.arange(CONTEXT + 1)).to(ids.device)]
    return windows[:, :-1], windows[:, 1:]
