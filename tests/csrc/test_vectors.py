"""Loops that are to be vectorised are: the CPU backend as setup.py compiles it, by GCC's own report. No timing."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
COMPILER = shutil.which("g++")


def pragmas(path: Path) -> Iterator[range]:
    """The lines of each loop."""
    lines = ["", *path.read_text().splitlines()]
    for first, line in enumerate(lines):
        indent, found, _ = line.partition("#pragma omp simd")
        if found:
            end = first + 1 if not lines[first + 1].endswith("{") else lines.index(indent + "}", first)
            yield range(first, end + 1)


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_every_loop_of_the_pragma(isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    build = runpy.run_path(str(ROOT / "setup.py"))
    if COMPILER is None or isa not in build["ISA_FLAGS"]:
        pytest.skip("needs GCC on an x86-64")
    report = tmp_path / "report.txt"
    command = [COMPILER, *build["FLAGS"], *build["ISA_FLAGS"][isa], f"-DFASTKD_ISA={isa}"]
    command += [f'-DFASTKD_ISA_NAME="{isa}"', f"-fopt-info-vec-all={report}", "-c", "csrc/cpu/rows.cpp", "-o"]
    subprocess.run([*command, str(tmp_path / "rows.o")], cwd=ROOT, check=True)
    said = defaultdict(set)  # by file and line: of the pragma, or of a statement in the loop
    for path, line, what in re.findall(
        r"^(\S+?):(\d+):\d+: (optimized: loop v|missed: couldn't v)", report.read_text(), re.M
    ):
        said[path, int(line)].add(what.partition(":")[0])
    loops = [
        (str(path.relative_to(ROOT)), lines) for path in (ROOT / "csrc/cpu").glob("*.h") for lines in pragmas(path)
    ]
    assert len(loops) > 10
    got = {(path, lines[0]): set().union(*(said[path, line] for line in lines)) for path, lines in loops}
    assert got == {loop: {"optimized"} for loop in got}
