"""The headers that the compiled backends share, against PyTorch in float64."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastkd
from fastkd import _request
from fastkd.backends import _arguments

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("csrc") / "harness.so"
    flags = ["-O1", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    subprocess.run([COMPILER, *flags, str(HERE / "harness.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def call(function: ctypes._CFuncPtr, x: Tensor, *outs: Tensor) -> None:
    function(pointer(x), ctypes.c_int64(x.numel()), *map(pointer, outs))


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def elementwise(function: ctypes._CFuncPtr, x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    call(function, x, out)
    return out


def ulps(got: Tensor, exact: Tensor) -> float:
    """The largest error in units of the last place of float32."""
    nearest = exact.float().abs()
    spacing = torch.nextafter(nearest, torch.tensor(torch.inf)) - nearest
    return float(((got.double() - exact).abs() / spacing.double()).max())


def test_exp2(headers: ctypes.CDLL) -> None:
    x = torch.linspace(-125.9, 0, 200_001)
    assert ulps(elementwise(headers.exp2_of, x), x.double().exp2()) < 1.2
    special = torch.tensor([0.0, -127.0, -1e30, -torch.inf, torch.nan])
    got = elementwise(headers.exp2_of, special)
    assert got[:4].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert got[4].isnan()


@pytest.mark.parametrize("features", ["", "avx2 fma", "avx2 fma avx512f avx512dq"])
def test_exp2_of_vectors(features: str, tmp_path: Path) -> None:
    if COMPILER is None:
        pytest.skip("needs a C++ compiler")
    cpuinfo = Path("/proc/cpuinfo")
    if missing := set(features.split()) - set(cpuinfo.read_text().split() if cpuinfo.exists() else ()):
        pytest.skip(f"this processor lacks {', '.join(sorted(missing))}")
    library = tmp_path / "lanes.so"
    flags = ["-O1", "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
    flags += [f"-m{feature}" for feature in features.split()]
    subprocess.run([COMPILER, *flags, str(HERE / "lanes.cpp"), "-o", str(library)], check=True)
    exp2_of = ctypes.CDLL(str(library)).exp2_of
    x = torch.linspace(-125.9, 127.0, 500_001)
    assert ulps(elementwise(exp2_of, x), x.double().exp2()) < 1.2
    near = -torch.logspace(-45, 0, 50_001)
    assert ulps(elementwise(exp2_of, near), near.double().exp2()) < 1.2
    special = torch.tensor([0.0, -0.0, -1e30, -torch.inf, torch.nan, -127.0, -150.0])
    got = elementwise(exp2_of, special)
    torch.testing.assert_close(got[:2], torch.ones(2), rtol=2e-7, atol=0)
    assert got[2:4].tolist() == [0.0, 0.0]
    assert got[4].isnan()
    assert (got[5:] <= 2.0**-126).all()


def test_log1p(headers: ctypes.CDLL) -> None:
    small = torch.logspace(-30, 0, 100_001, dtype=torch.float64).float()
    x = torch.cat([small, -small[small < 0.5], torch.linspace(-0.5, 1.0, 100_001)])
    assert ulps(elementwise(headers.log1p_of, x), x.double().log1p()) < 3


def test_exp_remainder(headers: ctypes.CDLL) -> None:
    x = torch.cat([torch.linspace(-0.5, 0.5, 100_001), torch.logspace(-12, -1, 1001)])
    x = x[x != 0]
    exact = torch.expm1(-x.double()) + x.double()
    exact = torch.where(x.abs() < 1e-3, x.double() ** 2 * (0.5 - x.double() / 6 + x.double() ** 2 / 24), exact)
    assert float((elementwise(headers.exp_remainder_of, x).double() / exact - 1).abs().max()) < 3e-7


def test_label_term(headers: ctypes.CDLL) -> None:
    t = torch.cat([torch.linspace(-80, 80, 100_001), torch.tensor([-torch.inf, torch.inf])])
    loss, rest = torch.empty_like(t), torch.empty_like(t)
    call(headers.label_term_of, t, loss, rest)
    exact = t.double()
    torch.testing.assert_close(loss.double(), torch.logaddexp(exact, torch.zeros_like(exact)), rtol=1e-5, atol=0)
    torch.testing.assert_close(rest.double(), exact.sigmoid(), rtol=1e-5, atol=0)
    nan = torch.tensor([torch.nan])
    call(headers.label_term_of, nan, loss, rest)
    assert loss[0].isnan() and rest[0].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_storage_types(headers: ctypes.CDLL, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    exact = every.view(dtype).float()
    wide = torch.empty_like(exact)
    call(getattr(headers, f"widen_{name}"), every, wide)
    torch.testing.assert_close(wide, exact, rtol=0, atol=0, equal_nan=True)
    # Every value, the midpoints between neighbours, and a spread of sizes.
    spread = torch.randn(100_000) * torch.logspace(-12, 6, 100_000)
    x = torch.cat([exact, torch.nextafter(exact, torch.zeros(())), (exact[1:] + exact[:-1]) / 2, spread])
    narrow = torch.empty(x.shape, dtype=torch.int16)
    call(getattr(headers, f"narrow_{name}"), x, narrow)
    torch.testing.assert_close(narrow.view(dtype), x.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_log_sum_exp(headers: ctypes.CDLL) -> None:
    x = torch.randn(999) * 20
    x[:600] = -torch.inf  # all of one half
    merged = torch.empty(2)
    headers.log_sum_exp_of(pointer(x), ctypes.c_int64(999), ctypes.c_float(0.7), pointer(merged))
    exact = torch.logsumexp(x.double() * 0.7 * torch.log(torch.tensor(2.0).double()), 0) / torch.log(torch.tensor(2.0))
    torch.testing.assert_close(merged[0] * 0.7 + merged[1].log2(), exact.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "divergence",
    [
        "forward_kl",
        "reverse_kl",
        "cross_entropy",
        "tvd",
        fastkd.JSD(0.3),
        fastkd.SkewKL(0.1),
        fastkd.SkewReverseKL(0.1),
        fastkd.SymmetricKL(0.3),
    ],
    ids=str,
)
@pytest.mark.parametrize("near", [True, False])
def test_divergence(headers: ctypes.CDLL, divergence: str | fastkd.Divergence, near: bool) -> None:
    """Σ term is the divergence, and g its derivative by log p_s but for a multiple of p_s: by autograd."""
    member = fastkd.divergences.resolve(divergence)
    a = (torch.randn(500, dtype=torch.float64) * 3).log_softmax(0)
    b = (torch.randn(500, dtype=torch.float64) * 3).log_softmax(0).requires_grad_()
    p_t, p_s = a.exp(), b.exp()
    if member.formula == _request.Formula.TOTAL_VARIATION:
        value = (p_s - p_t).abs().sum() / 2
    elif member.formula == _request.Formula.CROSS_ENTROPY:
        value = (p_t * (a - b)).sum()  # the entropy, which has no gradient, is added elsewhere
    elif member.formula == _request.Formula.SYMMETRIC_KL:
        value = (member.c_t * p_t * (a - b) + member.c_s * p_s * (b - a)).sum()
    else:
        log_m = (member.w * p_t + (1 - member.w) * p_s).log()
        value = (member.c_t * p_t * (a - log_m) + member.c_s * p_s * (b - log_m)).sum()
    (derivative,) = torch.autograd.grad(value, b)
    columns = [t.detach().float().contiguous() for t in (a - b, p_t, p_s)]
    term, g = torch.empty(500), torch.empty(500)
    numbers = (ctypes.c_float(x) for x in (member.c_t, member.c_s, member.w))
    found = headers.divergence_of(
        int(member.formula),
        *numbers,
        *map(pointer, columns),
        ctypes.c_int64(500),
        ctypes.c_bool(near),
        pointer(term),
        pointer(g),
    )
    assert found
    torch.testing.assert_close(term.double().sum(), value.detach(), rtol=1e-6, atol=0)
    residual, expected = (x - p_s.detach() * x.sum() for x in (g.double(), derivative))
    torch.testing.assert_close(residual, expected, rtol=1e-5, atol=1e-9)


def test_numbers_agree() -> None:
    """Formulas, statistics and dtypes have the same numbers in Python and in C++."""
    formulas = dict(re.findall(r"k(\w+) = (\d)", source("divergence.h", "enum class Formula")))
    assert {name.lower(): int(number) for name, number in formulas.items()} == {
        formula.name.replace("_", "").lower(): formula.value for formula in _request.Formula
    }
    dtypes = dict(re.findall(r"k(\w+) = (\d)", source("params.h", "enum class DType")))
    assert {name.lower(): int(number) for name, number in dtypes.items()} == {
        str(dtype).removeprefix("torch."): number for dtype, number in _arguments.DTYPES.items()
    }
    kinds = dict(re.findall(r"k(\w+) = (\d)", source("params.h", "enum class HiddenKind")))
    assert {name.lower(): int(number) for name, number in kinds.items()} == {
        kind.name.lower(): kind.value for kind in _request.HiddenKind
    }
    stats = [name.upper() for name in re.findall(r"k(\w+)", source("params.h", "enum Stats"))]
    names = [
        "PEAK_STUDENT",
        "PEAK_TEACHER",
        "LOG_HARD",
        "LOG_STUDENT",
        "LOG_RATIO",
        "GRAD_SUM",
        "LABEL_REST",
        "GRAD_FORM",
        "NUM_STATS",
    ]
    assert stats == [name.replace("_", "") for name in names]
    assert [getattr(_request, name) for name in names] == list(range(len(names)))


def test_the_label_of_another_slice_agrees() -> None:
    assert "kElsewhere = INT64_MIN;" in (CSRC / "params.h").read_text()
    assert torch.iinfo(torch.int64).min == _request.ELSEWHERE


def source(header: str, start: str) -> str:
    """The text of a braced definition."""
    text = (CSRC / header).read_text()
    at = text.index(start)
    return text[text.index("{", at) : text.index("}", at)]


def test_no_pytorch_header() -> None:
    files = [file for file in CSRC.rglob("*") if file.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert files
    assert not [file for file in files if re.search(r"#include\s*[<\"](torch|ATen|c10)/", file.read_text())]
