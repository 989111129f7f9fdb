"""A step of KDTrainer on as many processes as torchrun starts: ``ranks.py FOLDER JSON``, of the arguments given."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from fastkd.integrations.transformers import KDConfig, KDTrainer
from tests.integrations.models import arguments, leave, llama, rows, step

folder, given = Path(sys.argv[1]), json.loads(sys.argv[2])
config = KDConfig(hard_weight=0.3, soft_weight=0.7, temperature=2.0)
trainer = KDTrainer(
    llama(16, seed=1), arguments(folder, **given), teacher=llama(32, seed=2), kd_config=config, train_dataset=rows(),
    eval_dataset=rows(),
)  # fmt: skip
found = step(trainer)
evaluated = trainer.evaluate()
if trainer.is_world_process_zero():
    torch.save((found, {name: evaluated[name] for name in ("eval_hard_loss", "eval_soft_loss")}), folder / "found.pt")
leave()
