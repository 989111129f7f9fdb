"""The code of docs/integrations.md: blocks of ``py``, which need frameworks, and the names here, to run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import modelopt.torch.distill as mtd
import pytest
import torch
from datasets import Dataset
from lightning.pytorch import Trainer
from torch import nn
from trl import DistillationConfig
from trl.experimental.gkd import GKDConfig

from tests.integrations.models import arguments, llama, rows
from tests.integrations.test_lightning import loader, model
from tests.integrations.test_trl import conversation, tokenizer

pytestmark = pytest.mark.integration
PAGE = Path(__file__).parents[2] / "docs" / "integrations.md"
PARTS = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
BLOCK = re.compile(r"^```py\n(.*?)^```", re.MULTILINE | re.DOTALL)
SECTIONS = {name: found[1] for name, text in zip(PARTS[::2], PARTS[1::2], strict=True) if (found := BLOCK.search(text))}


def names(section: str, folder: Path) -> dict[str, Any]:
    """What a block takes for granted."""
    language: Any = {"student": llama(16, seed=1), "teacher": llama(32, seed=2), "tokenizer": tokenizer()}
    if section == "Transformers":
        return {**language, "args": arguments(folder), "rows": rows()}
    if section == "TRL GKD":
        data = Dataset.from_list([{"messages": conversation(index)} for index in range(8)])
        return {**language, "args": arguments(folder, GKDConfig, lmbda=0.0, max_length=32), "rows": data}
    if section == "TRL distillation":
        data = Dataset.from_list([{"prompt": conversation(index)[:1]} for index in range(8)])
        return {**language, "args": arguments(folder, DistillationConfig, max_completion_length=4), "rows": data}
    if section == "Lightning":
        return {
            "student": model(8, 1),
            "teacher": model(16, 2),
            "loader": loader(2),
            "torch": torch,
            "Trainer": Trainer,
        }
    if section == "ModelOpt":
        return {"student": nn.Linear(4, 9), "teacher": nn.Linear(4, 9), "mtd": mtd}
    return {"student_logits": torch.randn(3, 9), "teacher_logits": torch.randn(3, 9)}


def test_there_are_blocks() -> None:
    assert list(SECTIONS) == ["Transformers", "TRL GKD", "TRL distillation", "Lightning", "ModelOpt", "PyTorch"]


@pytest.mark.parametrize("section", SECTIONS)
def test_code_of_the_page(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # Lightning writes
    exec(compile(SECTIONS[section], section, "exec"), names(section, tmp_path))
