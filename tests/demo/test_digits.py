import json

import pytest

from fastkd import _extras
from fastkd.__main__ import main


def test_digits_end_to_end(tmp_path, capsys):
    assert main(["demo", "--task", "digits", "--quick", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0

    printed = capsys.readouterr().out
    for name in ("(the teacher)", "labels only", "usual loss", "fastkd"):
        assert name in printed
    assert (tmp_path / "out" / "digits.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "out" / "digits.json").read_text())
    students = figures["students"]
    assert set(students) == {"labels", "usual", "fastkd"}
    assert students["fastkd"]["losses"] == pytest.approx(students["usual"]["losses"], abs=1e-4)
    assert students["fastkd"]["losses"] != students["labels"]["losses"]
    assert figures["largest_difference"] < 1e-4
    for ratio in (figures["loss_time_ratio"], figures["step_time_ratio"]):
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    for run in (figures["teacher"], *students.values()):
        assert len(run["losses"]) == len(run["loss_seconds"]) == len(run["step_seconds"]) == run["steps"]
        held_out = run["held_out"]
        assert held_out[str(run["steps"])] < held_out["0"]


def test_a_missing_dependency_is_one_line(monkeypatch, capsys):
    """That names packages, not modules, and what works whether fastkd comes from a checkout or a package."""
    monkeypatch.setattr(_extras, "find_spec", lambda name: None if name in ("rich", "sklearn") else object())
    assert main(["demo", "--task", "digits"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (
        "python -m fastkd demo: the digits task needs rich and scikit-learn: pip install rich scikit-learn\n"
    )


def test_help_says_what_a_task_takes(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "scikit-learn" in printed and "--quick" in printed


def test_a_missing_device_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["demo", "--device", "cuda"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_output_that_is_a_file_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["demo", "--task", "digits", "--out", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err
