"""What is built, and what is released: the choices of setup.py, the wheel, the sdist and the editable install.

The compilers are stand-ins that fail or write nothing: the suite itself runs on what the real ones made.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from fastkd import __main__, _built, _dispatch
from fastkd.backends import cuda

ROOT = Path(__file__).parent.parent
LIST = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
LISTED = subprocess.run(LIST, cwd=ROOT, capture_output=True, text=True).stdout if shutil.which("git") else ""
FILES = {name for name in LISTED.splitlines() if (ROOT / name).is_file()}

in_checkout = pytest.mark.skipif(not FILES, reason="a release is made from a git checkout")


def run(command: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    others = ("FASTKD_", "PYTHON", "CUDA_", "MAKE", "VENV")
    own = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    own |= {"CC": "false", "CXX": "false", **environment}
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True)


def checked(command: list[str], folder: Path, **environment: str) -> str:
    result = run(command, folder, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(kind: str, tree: Path, out: Path) -> Path:
    """Build a ``wheel`` or ``sdist`` of the tree as pip does, and return the file."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    return out / checked([sys.executable, "-c", code, str(out)], tree).splitlines()[-1]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files of a checkout, in a folder of their own."""
    for name in FILES:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / "tree" / name)
    return tmp_path / "tree"


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder of programs: an nvcc that knows three architectures, makes empty files, and keeps a log."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "nvcc").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/nvcc.log\ncase $1 in\n'
        "--list-gpu-arch) echo compute_80 compute_90 compute_100 ;;\n--version) echo 12.8 ;;\n"
        '*) for last; do :; done; : > "$last" ;;\nesac\n'
    )
    (programs / "nvidia-smi").write_text('#!/bin/sh\nprintf "$GPUS"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    return programs


def build_extensions(tree: Path, machine: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{machine}{os.pathsep}{os.environ['PATH']}"
    return run([sys.executable, "setup.py", "build_ext", "--inplace"], tree, PATH=path, **environment)


@in_checkout
@pytest.mark.parametrize(("gpus", "asked", "built"), [
    ("", {}, "there was no GPU, and FASTKD_CUDA_ARCHS named none"),
    ("7.5\n", {}, "there was only a GPU older than sm_80, sm_75, and FASTKD_CUDA_ARCHS named none"),
    ("9.0\n8.9\n9.0\n", {}, "sm_89, sm_90"),
    ("9.0\n", {"FASTKD_CUDA_ARCHS": "none"}, "FASTKD_CUDA_ARCHS=none declined it"),
    ("9.0\n", {"FASTKD_CUDA_ARCHS": "80,10.0"}, "sm_80, sm_100"),
    ("9.0\n", {"FASTKD_REQUIRE": "cuda"}, "sm_90"),
    ("", {"FASTKD_REQUIRE": "cuda"}, "sm_80, sm_90, sm_100"),
])  # fmt: skip
def test_what_the_cuda_part_is_built_for(
    tree: Path, machine: Path, gpus: str, asked: dict[str, str], built: str
) -> None:
    """For the GPUs that are here, or as asked; or the reason why not, which also removes what was built before."""
    module = cuda_module(tree)
    module.touch()
    result = build_extensions(tree, machine, GPUS=gpus, **asked)
    assert result.returncode == 0, result.stderr
    record = json.loads((tree / "fastkd" / "_built.json").read_text())
    log = machine.parent / "nvcc.log"
    compiled = [line for line in log.read_text().splitlines() if " -c " in line] if log.exists() else []
    if built.startswith("sm_"):
        assert record["built"] == {"cuda": built}
        assert module.exists()
        assert len(compiled) == len(
            [path for path in FILES if path.startswith("csrc/cuda/") and path[-2:] in ("pp", "cu")]
        )
        assert all(f"code={arch}" in line for arch in built.split(", ") for line in compiled)
        assert f"CUDA sources for {built}" in result.stdout and "compiled csrc/cuda/launch.cu in" in result.stdout
    else:
        assert record["left_out"]["cuda"] == built
        assert not compiled and not module.exists()
        assert f"backend 'cuda' is not built: {built}" in result.stderr


def cuda_module(tree: Path) -> Path:
    return tree / "fastkd" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"


@in_checkout
def test_a_required_part_that_is_not_built_is_a_failure(tree: Path, machine: Path) -> None:
    declined = build_extensions(tree, machine, GPUS="", FASTKD_REQUIRE="cuda", FASTKD_CUDA_ARCHS="none")
    assert declined.returncode and "FASTKD_CUDA_ARCHS=none declined it" in declined.stderr
    assert build_extensions(tree, machine, GPUS="", FASTKD_REQUIRE="cpu").returncode


def test_info_says_what_was_built_and_why_not_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = {"built": {"cpu": "generic, avx2"}, "left_out": {"cuda": "the moon was full"}}
    monkeypatch.setattr(_built, "_record", record)
    monkeypatch.setattr(cuda, "_cuda", None)
    monkeypatch.setattr(
        cuda, "_missing", _built.missing("cuda", ImportError("No module named 'fastkd._cuda'")), raising=False
    )
    _dispatch._unavailable.cache_clear()
    try:
        assert __main__.main(["info"]) == 0
    finally:
        _dispatch._unavailable.cache_clear()
    output = capsys.readouterr().out
    assert "compiled: cpu for generic, avx2\n" in output
    assert "its CUDA part is not built (the moon was full); " in output


def modules(tree: Path) -> set[str]:
    """Where every module belongs in the wheel."""
    folders = {"fastkd": "fastkd", "kernels": "fastkd/kernels", "benchmarks": "fastkd/bench"}
    return {
        f"{target}/{path.relative_to(tree / folder).as_posix()}"
        for folder, target in folders.items()
        for path in (tree / folder).rglob("*.py")
    }


@in_checkout
def test_the_wheel_has_every_module_and_no_stale_one(tree: Path, tmp_path: Path) -> None:
    """A new package is found; one that is deleted is not taken from what the build before left in build/."""
    before = modules(tree)
    for folder in ("fastkd/new/inner", "benchmarks/new"):
        (tree / folder).mkdir(parents=True)
    for name in ("fastkd/new/__init__.py", "fastkd/new/inner/__init__.py", "benchmarks/new/__init__.py"):
        (tree / name).touch()
    for expected in (modules(tree), before):
        with zipfile.ZipFile(build("wheel", tree, tmp_path)) as wheel:
            names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        assert names == expected | {"fastkd/py.typed", "fastkd/_built.json"}
        for folder in ("fastkd/new", "benchmarks/new"):
            shutil.rmtree(tree / folder, ignore_errors=True)
    assert len(before) > 50


@in_checkout
def test_the_sdist_is_the_whole_tree_and_runs_its_tests(tree: Path, tmp_path: Path) -> None:
    """Installed in place, it is found from any folder; also from its parent, where its own looks like a package."""
    (tree / "fastkd" / "_cpu.so").touch()  # what an install in place leaves
    with tarfile.open(build("sdist", tree, tmp_path)) as archive:
        archive.extractall(tmp_path / "parent", filter="data")
    (unpacked,) = (tmp_path / "parent").iterdir()
    unpacked = unpacked.rename(tmp_path / "parent" / "fastkd")
    made = {"PKG-INFO", "setup.cfg"}
    names = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()}
    assert {name for name in names if ".egg-info/" not in name} - made == FILES - {".gitignore"}

    # Everything else that a test needs is borrowed from the environment that runs this one.
    venv.create(tmp_path / "venv")
    python = str(tmp_path / "venv" / "bin" / "python")
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    borrowed = [path for path in sys.path if path.endswith("site-packages")] or site.getsitepackages()
    (packages / "borrowed.pth").write_text("\n".join(borrowed))
    install = ["-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation", "--editable", "."]
    checked([python, *install], unpacked)

    code = "import fastkd; fastkd.kd_loss; import fastkd.kernels; import fastkd.bench; print(fastkd.__file__)"
    for folder in (unpacked.parent, unpacked, unpacked / "fastkd", tmp_path):
        assert checked([python, "-c", code], folder).strip() == str(unpacked / "fastkd" / "__init__.py")

    everything = checked([python, "-m", "pytest", "--collect-only", "-q"], unpacked)
    assert "error" not in everything.splitlines()[-1]
    telling = ["tests/test_architecture.py", "tests/test_docs.py", "tests/test_views.py", "tests/bench"]
    checked([python, "-m", "pytest", "-q", *telling], unpacked)


def test_from_the_root_the_folder_of_kernels_is_not_taken_for_hugging_faces_package() -> None:
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert checked([sys.executable, "-c", code], ROOT).strip() == "False"


@in_checkout
def test_make_installs_what_a_target_needs_and_once(tree: Path) -> None:
    def installed(target: str, **environment: str) -> str:
        """The extra that a target would install."""
        lines = [
            line for line in checked(["make", "-n", target], tree, **environment).splitlines() if "--editable" in line
        ]
        assert len(lines) <= 1
        return lines[0].partition(".[")[2].partition("]")[0] if lines else ""

    assert [installed(target) for target in ("demo", "test", "docs", "dist")] == ["demo", "dev", "dev", "dev"]
    stamp = tree / ".venv" / ".dev"
    stamp.parent.mkdir()
    stamp.write_text("90\n")
    assert [installed(target) for target in ("demo", "test", "bench")] == ["", "", ""]
    assert installed("test", FASTKD_CUDA_ARCHS="90") == ""
    assert installed("test", FASTKD_CUDA_ARCHS="80,90") == "dev"
    later = stamp.stat().st_mtime + 10
    os.utime(tree / "csrc" / "cuda" / "vec.cuh", (later, later))
    assert installed("test") == "dev"
