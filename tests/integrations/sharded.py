"""KDTrainer's loss of models that FSDP2 has sharded over the processes of torchrun: ``sharded.py FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastkd.integrations.transformers import KDConfig, KDTrainer
from tests.integrations.models import arguments, leave, llama, rows

folder = Path(sys.argv[1])
student, teacher = llama(16, seed=1), llama(32, seed=2)
config = KDConfig(hard_weight=0.3, soft_weight=0.7, temperature=2.0)
trainer = KDTrainer(student, arguments(folder), teacher=teacher, kd_config=config)
mesh = init_device_mesh("cpu", (dist.get_world_size(),))
for model in (student, teacher):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
batch = trainer.data_collator(rows()[dist.get_rank() :: dist.get_world_size()])
items = torch.stack([(row["labels"][1:] != -100).sum() for row in rows()]).sum()
loss = trainer.compute_loss(student, batch, num_items_in_batch=items)
loss.backward()
gradients = {name: parameter.grad.full_tensor() for name, parameter in student.named_parameters()}
dist.all_reduce(loss.detach_())
if dist.get_rank() == 0:
    torch.save((loss.item() / dist.get_world_size(), gradients), folder / "found.pt")
leave()
