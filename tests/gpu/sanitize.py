"""Small cases of every kernel, for a checker: ``compute-sanitizer --tool memcheck python tests/gpu/sanitize.py cuda``.

``--quick`` leaves out what takes the same ways through the kernels: one dtype of two bytes, half of the divergences.
Each size is printed when it is done, so that a run that is cut short says how far it came.

The tools are memcheck, racecheck, initcheck and synccheck. PyTorch's caching allocator hides overruns between its
blocks, so run with PYTORCH_NO_CUDA_MEMORY_CACHING=1.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch

import fastkd

# One tile and several, aligned and not; the last needs clusters of more than one block.
COLUMNS = (7, 1000, 4099, 70001)
DIVERGENCES = (
    "forward_kl", "reverse_kl", "cross_entropy", "tvd", fastkd.JSD(0.5), fastkd.SkewKL(0.1), fastkd.SymmetricKL()
)  # fmt: skip


def main(backend: str, sizes: list[int], quick: bool) -> None:
    dtypes = (torch.bfloat16, torch.float32) if quick else (torch.bfloat16, torch.float16, torch.float32)
    divergences = DIVERGENCES[1::2] if quick else DIVERGENCES
    for columns, dtype in product(sizes, dtypes):
        student, teacher = (torch.randn(4, columns, device="cuda").to(dtype) for _ in range(2))
        # The first token and the last, one outside the vocab_size below, which makes its row NaN, and none.
        labels = torch.tensor([0, columns - 2, columns - 1, -100], device="cuda")
        small = columns < 5000  # the checkers slow kernels down a hundredfold
        for divergence in divergences if small else DIVERGENCES[:1]:
            for reduction in ("mean", "none"):
                for inplace in (False, True):
                    leaf = student.clone().requires_grad_()
                    loss = fastkd.kd_loss(
                        leaf * 1, teacher, labels, temperature=2.0, hard_weight=0.5, divergence=divergence,
                        label_smoothing=0.1, vocab_size=columns - 1, reduction=reduction, inplace_backward=inplace,
                        backend=backend,
                    )  # fmt: skip
                    (0.5 * loss).sum().backward()
        if small and backend != "cuda":  # which has no kernel for hidden states
            for kind in ("mse", "cosine"):
                leaf = student.clone().requires_grad_()
                fastkd.hidden_loss(leaf, teacher, kind=kind, mask=labels >= 0, backend=backend).backward()
        for tail in ("bucket", "support") if small else ("bucket",):
            few = fastkd.top_k(teacher, 5, temperature=2.0, tail=tail)
            leaf = student.clone().requires_grad_()
            loss = fastkd.kd_loss(leaf, few, labels, temperature=2.0, hard_weight=0.5, backend=backend)
            (0.5 * loss).backward()
        leaf = student.clone().requires_grad_()
        fastkd.log_softmax(leaf, temperature=2.0, backend=backend).square().sum().backward()
        torch.cuda.synchronize()
        print(f"{backend}: {columns} columns of {dtype}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("backend")
    parser.add_argument("columns", type=int, nargs="*", default=COLUMNS)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    main(options.backend, options.columns, options.quick)
