"""The rows of the table of docs/distributed.md: each trains one step on several ranks, as the table says.

Every program gets the whole batch, takes its rank's part of it, and returns the gradients of all parameters. ``DATA``
has micro-batches and rows of unequal numbers of tokens that count, none among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fastkd

TOKENS, WIDTH = 24, 8
Gradients = dict[str, Tensor]
Batch = tuple[Tensor, Tensor, Tensor]
KEYWORDS = {"temperature": 2.0, "hard_weight": 0.5}


def make_batch() -> Batch:
    """(inputs [8, 4, H], the teacher's logits [8, 4, V], labels [8, 4]), two micro-batches of four rows."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 4, WIDTH, generator=generator)
    teacher = 3.0 * torch.randn(8, 4, TOKENS, generator=generator)
    labels = torch.randint(0, TOKENS, (8, 4), generator=generator)
    labels[1] = labels[4:6] = -100
    labels[2, 1:] = labels[7, :2] = -100
    return x, teacher, labels


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, TOKENS))


def loss_of(model: nn.Module, batch: Batch, num_items: Tensor | None = None) -> Tensor:
    x, teacher, labels = batch
    return fastkd.kd_loss(model(x), teacher, labels, num_items=num_items, backend="torch", **KEYWORDS)  # type: ignore[arg-type]


def part(batch: Batch, rank: int, size: int, dim: int = 0) -> Batch:
    return tuple(tensor.chunk(size, dim)[rank] for tensor in batch)  # type: ignore[return-value]


def gradients(model: nn.Module) -> Gradients:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        grad = parameter.grad
        found[name.removeprefix("module.")] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found


def alone() -> Gradients:
    model = make_model()
    loss_of(model, make_batch()).backward()
    return gradients(model)


def ddp(group: ProcessGroup) -> Gradients:
    model = DistributedDataParallel(make_model(), process_group=group)
    batch = part(make_batch(), group.rank(), group.size())
    num_items = fastkd.global_items(batch[2], group=group)
    (loss_of(model, batch, num_items) * group.size()).backward()
    return gradients(model)


def fsdp(group: ProcessGroup) -> Gradients:
    model = fully_shard(make_model(), mesh=DeviceMesh.from_group(group, "cpu"))
    batch = part(make_batch(), group.rank(), group.size())
    num_items = fastkd.global_items(batch[2], group=group)
    (loss_of(model, batch, num_items) * group.size()).backward()
    return gradients(model)


def fsdp_that_sums(group: ProcessGroup) -> Gradients:
    model = fully_shard(make_model(), mesh=DeviceMesh.from_group(group, "cpu"))
    model.set_gradient_divide_factor(1.0)
    model.set_force_sum_reduction_for_comms(True)  # gloo has no sum with a factor
    batch = part(make_batch(), group.rank(), group.size())
    loss_of(model, batch, fastkd.global_items(batch[2], group=group)).backward()
    return gradients(model)


def hsdp(group: ProcessGroup) -> Gradients:
    mesh = init_device_mesh("cpu", (2, group.size() // 2), mesh_dim_names=("replicate", "shard"))
    model = fully_shard(make_model(), mesh=mesh)
    batch = part(make_batch(), group.rank(), group.size())
    num_items = fastkd.global_items(batch[2], group=group)
    (loss_of(model, batch, num_items) * group.size()).backward()
    return gradients(model)


def context(group: ProcessGroup) -> Gradients:
    """Half of the ranks share a sequence: each has some of its tokens."""
    mesh = init_device_mesh("cpu", (group.size() // 2, 2), mesh_dim_names=("dp", "cp"))
    model = fully_shard(make_model(), mesh=mesh._flatten())
    rows = part(make_batch(), mesh.get_local_rank("dp"), mesh.size(0))
    batch = part(rows, mesh.get_local_rank("cp"), 2, dim=1)
    num_items = fastkd.global_items(batch[2], group=group)
    (loss_of(model, batch, num_items) * group.size()).backward()
    return gradients(model)


def tensor_parallel(group: ProcessGroup) -> Gradients:
    mesh = DeviceMesh.from_group(group, "cpu")
    model = with_split_head(make_model(), mesh)
    sliced_loss(model, make_batch(), mesh).backward()
    return gradients(model)


def tensor_and_data_parallel(group: ProcessGroup) -> Gradients:
    mesh = init_device_mesh("cpu", (group.size() // 2, 2), mesh_dim_names=("dp", "tp"))
    model = fully_shard(with_split_head(make_model(), mesh["tp"]), mesh=mesh["dp"])
    batch = part(make_batch(), mesh.get_local_rank("dp"), mesh.size(0))
    num_items = fastkd.global_items(batch[2], group=mesh.get_group("dp"))
    (sliced_loss(model, batch, mesh["tp"], num_items) * mesh.size(0)).backward()
    return gradients(model)


def with_split_head(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    head = ColwiseParallel(output_layouts=Shard(-1))
    return parallelize_module(model, mesh, {"2": head})


def sliced_loss(model: nn.Module, batch: Batch, mesh: DeviceMesh, num_items: Tensor | None = None) -> Tensor:
    x, teacher, labels = batch
    teacher = teacher.chunk(mesh.size(), -1)[mesh.get_local_rank()]
    return fastkd.kd_loss(
        model(x), teacher, labels, num_items=num_items, vocab_group=mesh.get_group(), backend="torch", **KEYWORDS
    )  # type: ignore[arg-type]


def accumulated(group: ProcessGroup) -> Gradients:
    """Two micro-batches, one of which has no token that counts on some ranks."""
    model = DistributedDataParallel(make_model(), process_group=group)
    micro_batches = [part(half, group.rank(), group.size()) for half in halves(make_batch())]
    num_items = sum(fastkd.global_items(labels, group=group) for _, _, labels in micro_batches)
    for number, batch in enumerate(micro_batches):
        model.require_backward_grad_sync = number == len(micro_batches) - 1
        (loss_of(model, batch, num_items) * group.size()).backward()
    return gradients(model)


def halves(batch: Batch) -> Iterator[Batch]:
    return (part(batch, half, 2) for half in range(2))


# The first column of the table, and the numbers of ranks.
ROWS: dict[str, tuple[Callable[[ProcessGroup], Gradients], tuple[int, ...]]] = {
    "`DistributedDataParallel`": (ddp, (2, 4)),
    "FSDP2, `fully_shard`": (fsdp, (2, 4)),
    "FSDP2 with `set_gradient_divide_factor(1.0)`": (fsdp_that_sums, (2, 4)),
    "HSDP, `fully_shard` on a mesh of two dimensions": (hsdp, (4,)),
    "sequence or context parallel": (context, (4,)),
    "tensor parallel": (tensor_parallel, (2, 4)),
    "tensor parallel within data parallel": (tensor_and_data_parallel, (4,)),
    "gradient accumulation": (accumulated, (2, 4)),
}
