"""Distil a small transformer whose output matrix, like its teacher's, is split over the ranks.

    python examples/tensor_parallel.py
    torchrun --nproc-per-node 2 examples/tensor_parallel.py

print the same losses: no rank ever has the logits of the whole vocabulary, and nothing in the training loop says so.
"""

from __future__ import annotations

import argparse
import os

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import fastkd

VOCABULARY, LENGTH = 1001, 16  # which no number of ranks need divide


class Transformer(nn.Module):
    """A causal language model."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.trunk = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.tokens(ids) + self.places(torch.arange(length))
        x = self.trunk(x, mask=nn.Transformer.generate_square_subsequent_mask(length), is_causal=True)
        logits: Tensor = self.head(x)
        return logits


def split_head(model: Transformer, mesh: DeviceMesh | None) -> Transformer:
    """Each rank keeps its rows of the output matrix, and gives its columns of the logits, as a DTensor."""
    if mesh is not None:
        plan = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        parallelize_module(model, mesh, {"head": plan})
    return model


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rows", type=int, default=8)
    options = parser.parse_args(arguments)
    mesh = None
    if "WORLD_SIZE" in os.environ:  # of torchrun
        mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("tp",))

    torch.manual_seed(0)
    student = split_head(Transformer(width=32, layers=1), mesh)
    teacher = split_head(Transformer(width=64, layers=2), mesh).eval().requires_grad_(False)
    # What all ranks have whole and what they have in parts are not updated in one list of tensors.
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, foreach=False)
    loss_fn = fastkd.KDLoss(temperature=2.0, hard_weight=0.5, soft_weight=0.5)
    losses = []
    for step in range(1, options.steps + 1):
        ids = torch.randint(0, VOCABULARY, (options.rows, LENGTH + 1))  # the same on every rank
        inputs, labels = ids[:, :-1], ids[:, 1:]
        with torch.no_grad():
            of_teacher = teacher(inputs)
        loss = loss_fn(student(inputs), of_teacher, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((loss.full_tensor() if isinstance(loss, DTensor) else loss).item())
        if mesh is None or mesh.get_rank() == 0:
            print(f"step {step}: loss {losses[-1]:.6f}")
    if mesh is not None:
        torch.distributed.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
