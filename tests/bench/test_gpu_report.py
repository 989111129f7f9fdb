"""gpu_report.sh over stand-ins for Python and for the tools of the driver: what it runs, writes and calls passed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from fastkd.bench import docs

SCRIPT = docs.ROOT / "benchmarks" / "gpu_report.sh"
QUICK = ["environment", "build", "cuda", "triton", "sanitizer", "benchmarks"]
FULL = ["environment", "build", "cuda", "triton", "tests", "sanitizer", "profile", "benchmarks"]
# Each does what its name asks for, unless FAULT says otherwise.
STAND_INS = {
    "nvidia-smi": 'case "$*" in *compute_cap*) echo 9.0 ;; *name*) echo "NVIDIA H200" ;; esac',
    "nvcc": "echo nvcc",
    "compute-sanitizer": 'while [[ $1 == --* ]]; do shift 2; done; [[ $FAULT != race ]] && "$@"',
    "ncu": """
        until [[ $1 == *python ]]; do shift; done
        echo ==PROF==
        "$@"
        [[ $FAULT == counters ]] || printf '"ID","Kernel Name"\\n"0","kd_rows"\\n'
    """,
    "python": """
        case "$*" in
        *get_device_properties*) [[ $FAULT != gpu ]] || exit 1 ;;
        *build_ext*) touch fastkd/_cpu.so fastkd/_cuda.so fastkd/_built.json ;;
        *"-m pytest"*)
            [[ $FAULT == skipped ]] && case='<testcase name="a"><skipped/></testcase>' || case='<testcase name="a" />'
            for argument; do [[ $argument != --junitxml=* ]] || echo "$case" >"${argument#*=}"; done
            [[ $FAULT != test ]] || exit 1 ;;
        *"fastkd bench"*) [[ $* == *"--device cuda"* ]] || exit 1 ;;
        esac
        case $FAULT-$* in
        hangs-*info)
            setsid sleep 100 &
            touch "$out/hangs"
            sleep 100 ;;
        slow-*"-m pytest"*)
            trap 'echo interrupted; exit 2' INT
            sleep 100 &
            wait ;;
        esac
        echo "$@"
    """,
}


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The script of a tree of its own, and the folder that it writes to."""
    for folder in ("bin", "tree/benchmarks", "tree/fastkd"):
        (tmp_path / folder).mkdir(parents=True)
    for name, text in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{text}")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", str(tmp_path / "bin" / "python"))
    monkeypatch.setenv("FAULT", "")
    return [shutil.copy(SCRIPT, tmp_path / "tree" / "benchmarks"), str(tmp_path / "out")]


def report(command: list[str], *options: str) -> tuple[int, dict[str, str]]:
    """(the exit status, the result of each stage)"""
    status = subprocess.run([*command, *options], stdout=subprocess.DEVNULL).returncode
    summary = Path(command[1], "summary.md").read_text()
    return status, dict(re.findall(r"^\| (\w+) \| ([^|]+) \| \d+ \|", summary, re.MULTILINE))


def limit(command: list[str], stage: str, seconds: int) -> None:
    """Shorten a stage of the quick ones."""
    script = Path(command[0])
    script.write_text(re.sub(rf"\[{stage}\]=\d+", f"[{stage}]={seconds}", script.read_text(), count=1))


def left_running(command: list[str]) -> list[str]:
    """What bears the mark of a stage, and was given this script's own paths."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            environment = entry.read_bytes()
        except OSError:
            continue
        if b"GPU_REPORT_STAGE=" in environment and command[1].encode() in environment:
            found.append(entry.parent.name)
    return found


@pytest.mark.parametrize("quick", [True, False])
def test_stages_are_short(quick: bool) -> None:
    """Eight minutes for all of the quick ones, nine for any; each is a function of the script."""
    script = SCRIPT.read_text()
    limits = [dict(re.findall(r"\[(\w+)\]=(\d+)", text)) for text in re.findall(r"limits=\((.*)\)", script)]
    order = [text.split() for text in re.findall(r"order=\((.*)\)", script)]
    seconds, stages = limits[not quick], order[not quick]
    assert sorted(seconds) == sorted(stages)
    assert all(re.search(rf"^{stage}\(\) {{", script, re.MULTILINE) for stage in stages)
    assert max(map(int, seconds.values())) <= 540
    assert not quick or sum(map(int, seconds.values())) <= 480


@pytest.mark.parametrize("options, stages", [(["--quick"], QUICK), ([], FULL), (["--stage", "tests"], ["tests"])])
def test_all_passes(command: list[str], options: list[str], stages: list[str]) -> None:
    assert report(command, *options) == (0, dict.fromkeys(stages, "passed"))
    out = Path(command[1])
    written = {path.name for path in out.iterdir()}
    assert written >= {f"{stage}.log" for stage in stages} and "site" not in written
    assert ("sanitizer-triton-racecheck.log" in written) == ("sanitizer" in stages)
    assert ("profile-triton.csv" in written) == ("profile" in stages)
    assert ("tests-all.xml" in written) == ("tests" in stages)
    summary = (out / "summary.md").read_text()
    assert re.findall("^## (.*)", summary, re.MULTILINE) == stages
    if "build" in stages:  # stages that are run later find it
        assert {path.name for path in Path(command[0]).parents[1].joinpath("fastkd").iterdir()} >= {
            "_cpu.so", "_cuda.so", "_built.json"
        }  # fmt: skip


@pytest.mark.parametrize("fault, failing", [
    ("gpu", {"environment", "cuda", "triton", "tests"}),  # PyTorch sees none
    ("test", {"cuda", "triton", "tests"}),
    ("skipped", {"cuda", "triton", "tests"}),  # every test
    ("race", {"sanitizer"}),
    ("counters", {"profile"}),  # of the GPU, which ncu may not read
])  # fmt: skip
def test_what_failed_or_did_nothing_has_not_passed(
    command: list[str], monkeypatch: pytest.MonkeyPatch, fault: str, failing: set[str]
) -> None:
    monkeypatch.setenv("FAULT", fault)
    status, results = report(command)
    assert status == 1
    assert results == {stage: "failed (1)" if stage in failing else "passed" for stage in FULL}


def test_a_stage_that_hangs_leaves_nothing(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "hangs")
    limit(command, "environment", 1)
    status, results = report(command, "--quick", "--stage", "environment", "--stage", "cuda")
    assert (status, results) == (1, {"environment": "out of time (1 s)", "cuda": "passed"})
    assert not left_running(command)


def test_a_script_that_is_ended_leaves_nothing(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "hangs")
    script = subprocess.Popen([*command, "--stage", "environment"])
    while not Path(command[1], "hangs").exists():
        time.sleep(0.05)
    script.terminate()
    assert script.wait(timeout=60)
    assert not left_running(command)


def test_tests_that_take_too_long_show_what_they_have(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAULT", "slow")
    limit(command, "cuda", 20)
    assert report(command, "--quick", "--stage", "cuda") == (1, {"cuda": "out of time (20 s)"})
    assert "interrupted" in Path(command[1], "cuda.log").read_text()


def test_an_unknown_stage_is_refused_before_any_runs(command: list[str]) -> None:
    result = subprocess.run([*command, "--stage", "environment", "--stage", "test"], stderr=subprocess.PIPE, text=True)
    assert result.returncode and "no stage test here" in result.stderr
    assert not Path(command[1], "environment.log").exists()
