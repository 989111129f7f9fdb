"""``python -m fastkd info``."""

from __future__ import annotations

import pytest
import torch

import fastkd
from fastkd import __main__, _dispatch, demo


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    """For every device: every backend with its state, and which of them is the default."""
    assert __main__.main(["info"]) == 0
    output = capsys.readouterr().out
    assert f"fastkd {fastkd.__version__}" in output
    assert f"torch {torch.__version__}" in output
    for block in output.split("\n\n")[1:]:
        device, *lines = block.strip().split("\n")
        logits = torch.empty(1, 1, device=device.split()[0])
        assert [line.split()[0] for line in lines] == list(_dispatch.NAMES)
        default = [line.split()[0] for line in lines if "used by default" in line]
        assert default == [_dispatch.choose(logits, "").__name__.rpartition(".")[2]]  # type: ignore[attr-defined]
        for line in lines:
            why = _dispatch.refusal(logits, line.split()[0])
            assert why is None or why in line


@pytest.mark.usefixtures("restore_backend")
def test_info_of_an_override(capsys: pytest.CaptureFixture[str]) -> None:
    fastkd.use_backend("torch")
    assert __main__.main(["info"]) == 0
    cpu = capsys.readouterr().out.split("\n\n")[-1]
    assert [line.split()[0] for line in cpu.split("\n") if "used by default" in line] == ["torch"]


def test_an_interrupted_command_ends_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(options: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert __main__.main(["demo"]) == 130


def test_command_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        __main__.main([])
    assert "info" in capsys.readouterr().err
