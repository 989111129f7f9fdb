"""The PyTorch backend needs the inputs, the gradient and one chunk: nothing else is as large as a chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastkd
from fastkd.backends.torch import CHUNK_CPU


class LargeAllocations(TorchDispatchMode):
    """Bytes of every storage of more than one chunk that an operator returns and that did not exist before."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.nbytes() > CHUNK_CPU * 4 and storage.data_ptr() not in self.known:
                    self.known.add(storage.data_ptr())
                    self.sizes.append(storage.nbytes())
        return result


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "tvd", fastkd.JSD(0.5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_gradient_is_larger_than_a_chunk(divergence: Any, dtype: torch.dtype) -> None:
    rows, vocabulary = 64, 32000
    student = torch.randn(rows, vocabulary).to(dtype).requires_grad_()
    teacher = torch.randn(rows, vocabulary).to(dtype)
    labels = torch.randint(vocabulary, (rows,))
    mask = torch.arange(rows) % 3 > 0
    with LargeAllocations(student, teacher) as allocations:
        loss = fastkd.kd_loss(
            student,
            teacher,
            labels,
            temperature=2.0,
            hard_weight=0.5,
            divergence=divergence,
            mask=mask,
            backend="torch",
        )
        torch.autograd.grad(loss, student)
    assert allocations.sizes == [rows * vocabulary * dtype.itemsize]
