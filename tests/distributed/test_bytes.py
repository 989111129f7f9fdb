"""What goes over the wire, as benchmarks/slices.py counts it."""

from __future__ import annotations

import torch

from fastkd.bench import slices


def test_at_most_40_bytes_a_row_and_exchange() -> None:
    """Besides the numbers of the call; and one or two exchanges, by the divergence alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        rows = 10_000
        found = slices.bytes_of_a_row(torch.distributed.group.WORLD, rows)
    finally:
        torch.distributed.destroy_process_group()
    for name, sizes in found.items():
        first, *second = sizes[0] + sizes[1], *sizes[2:]
        assert first <= 40 + 200 / rows, name
        if name in ("forward_kl", "reverse_kl"):
            assert not second
        else:
            assert second == [16]
    assert len(found) == len(slices.DIVERGENCES) + 1


def test_benchmark_runs(capsys) -> None:  # type: ignore[no-untyped-def]
    results = slices.main(["--rows", "8", "--columns", "64", "--seconds", "0"])
    assert len(results["times"]) == len(slices.BACKENDS) * len(slices.DIVERGENCES)
    assert "bytes a row" in capsys.readouterr().out
