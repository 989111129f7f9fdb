"""Distil under FSDP2, on two processes: the loss is computed where the output matrix is whole.

    pip install -e ".[transformers]" && python examples/fsdp2.py --steps 30

``fully_shard`` leaves each rank a slice of every parameter, and gathers a module's own within its forward. So the loss
from hidden states goes into the forward of what is wrapped: ``Distiller`` below. The two ranks' batches have different
numbers of tokens; ``num_items`` makes the averaged gradient that of all tokens, which the first step checks.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

import fastkd

WORLD_SIZE, BATCH = 2, 8


def make_model(layers: int, width: int, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


class Distiller(nn.Module):
    """A student, and its loss against what the teacher's last layer gave."""

    def __init__(self, student: LlamaForCausalLM) -> None:
        super().__init__()
        self.student = student

    def forward(
        self, input_ids: Tensor, labels: Tensor, teacher: fastkd.LinearLogits, num_items: Tensor | float
    ) -> Tensor:
        hidden = self.student.model(input_ids).last_hidden_state
        student = fastkd.LinearLogits(hidden, self.student.lm_head.weight)
        return fastkd.kd_loss(
            student, teacher, labels, temperature=2.0, hard_weight=0.5, soft_weight=0.5, num_items=num_items
        )


def make_batch(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Lines of a text that is on every machine, by bytes: those of rank 1 are cut short. And the token after each."""
    lines = [line for line in Path(argparse.__file__).read_bytes().splitlines() if len(line) > 20]
    begin = (step * WORLD_SIZE + rank) * BATCH % (len(lines) - BATCH)
    rows = [torch.tensor(list(line))[: 20 if rank else 80] for line in lines[begin : begin + BATCH]]
    input_ids, labels = pad_sequence(rows, batch_first=True), pad_sequence(rows, batch_first=True, padding_value=-100)
    return input_ids, F.pad(labels[:, 1:], (0, 1), value=-100)


def all_at_once(step: int, teacher: LlamaForCausalLM, distiller: Distiller) -> tuple[Tensor, Tensor]:
    """What one process makes of both ranks' batches: the loss, and the gradient of the output matrix."""
    batches = [make_batch(step, rank) for rank in range(WORLD_SIZE)]
    tokens = sum(float((labels != -100).sum()) for _, labels in batches)
    loss = sum(distiller(ids, labels, teach(teacher, ids), tokens) for ids, labels in batches)
    loss.backward()
    return loss.detach(), distiller.student.lm_head.weight.grad


@torch.no_grad()
def teach(teacher: LlamaForCausalLM, input_ids: Tensor) -> fastkd.LinearLogits:
    return fastkd.LinearLogits(teacher.model(input_ids).last_hidden_state, teacher.lm_head.weight)


def work(rank: int, rendezvous: str, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD_SIZE)
    teacher = make_model(layers=4, width=64, seed=1).eval()
    expected = all_at_once(0, teacher, Distiller(make_model(layers=2, width=32, seed=2)))

    distiller = Distiller(make_model(layers=2, width=32, seed=2))
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    for layer in distiller.student.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(distiller, mesh=mesh)  # what is left, the output matrix with it
    optimizer = torch.optim.AdamW(distiller.parameters(), lr=3e-3)
    for step in range(steps):
        input_ids, labels = make_batch(step, rank)
        tokens = (labels != -100).sum()
        dist.all_reduce(tokens)
        loss = distiller(input_ids, labels, teach(teacher, input_ids), tokens / WORLD_SIZE)
        loss.backward()
        total = loss.detach() / WORLD_SIZE
        dist.all_reduce(total)
        if step == 0:
            found = total, distiller.student.lm_head.weight.grad.full_tensor()
            off = max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
            print_once(rank, f"loss and gradient differ from one process's by {off:.0e}")
            assert off < 1e-5
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            print_once(rank, f"step {step}: loss {float(total):.4f} of {int(tokens)} tokens")
    dist.destroy_process_group()


def print_once(rank: int, text: str) -> None:
    if rank == 0:
        print(text, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=30)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (f"{folder}/rendezvous", parser.parse_args().steps), WORLD_SIZE)
