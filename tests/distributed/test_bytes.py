"""What goes over the wire, as benchmarks/slices.py counts it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import fastkd
from fastkd.bench import slices
from tests.assertions import same_bits
from tests.cases import inputs


@pytest.fixture
def group() -> Iterator[torch.distributed.ProcessGroup]:
    """Of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_at_most_40_bytes_a_row_and_exchange(group: torch.distributed.ProcessGroup) -> None:
    """Besides the numbers of the call; and one or two exchanges, by the divergence alone."""
    rows = 10_000
    found = slices.bytes_of_a_row(group, rows)
    for name, sizes in found.items():
        first, *second = sizes[0] + sizes[1], *sizes[2:]
        assert first <= 40 + 200 / rows, name
        assert second == ([] if name in ("forward_kl", "reverse_kl") else [16]), name
    assert len(found) == len(slices.DIVERGENCES) + 1


@pytest.mark.parametrize("kind", ["group", "dtensor"])
def test_a_group_of_one_has_no_slices(group: torch.distributed.ProcessGroup, kind: str) -> None:
    student, teacher, labels = inputs((3,), 20)
    keywords = {"divergence": "tvd", "hard_weight": 0.5, "backend": "torch"}
    expected = fastkd.kd_loss(student, teacher, labels, **keywords)
    sent: list[int] = []
    with slices.counted(sent):
        if kind == "group":
            loss = fastkd.kd_loss(student, teacher, labels, **keywords, vocab_group=group)
        else:
            mesh = init_device_mesh("cpu", (1,))
            z, u = (distribute_tensor(x, mesh, [Shard(1)]) for x in (student, teacher))
            y = distribute_tensor(labels, mesh, [Replicate()])
            loss = fastkd.kd_loss(z, u, y, **keywords).full_tensor()
    assert same_bits(loss, expected) and not sent


def test_benchmark_runs(capsys) -> None:  # type: ignore[no-untyped-def]
    results = slices.main(["--rows", "8", "--columns", "64", "--seconds", "0"])
    assert len(results["times"]) == len(slices.BACKENDS) * len(slices.DIVERGENCES)
    assert "bytes a row" in capsys.readouterr().out
