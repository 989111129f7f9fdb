"""The benchmarks, on cases too small to time: contenders run and are checked, and the documents hold the results."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fastkd import _extras
from fastkd.__main__ import main
from fastkd.bench import check, docs, normalisation, plots, run, summary, timing
from fastkd.bench.cases import Case, Inputs, full, quick
from fastkd.bench.provider import Provider
from fastkd.bench.providers import PROVIDERS

NAMES = {provider.name: provider for provider in PROVIDERS}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(
        run, "PROVIDERS", [NAMES[name] for name in ("copy", "eager", "fastkd cpu", "fastkd torch", "Liger")]
    )


@pytest.fixture
def results(device: str) -> dict[str, Any]:
    cases = [Case(3, 50, "float32"), Case(3, 70, "float32"), Case(2, 50, "bfloat16", "log_softmax")]
    *_, results = run.run(cases, device, 0.0, lambda text: None)
    return results


@pytest.mark.parametrize("case", [
    Case(5, 33), Case(5, 33, "float16", "loss"), Case(5, 33, "float32", "log_softmax"),
    Case(5, 33, kind="hidden states + backward"), Case(5, 33, kind="hidden layers + backward"),
    Case(5, 33, kind="top-k + backward", k=4),
    Case(5, 33, divergence="reverse_kl"), Case(5, 33, divergence="jsd"), Case(5, 33, terms="hard"),
    Case(5, 33, terms="soft"), Case(5, 33, grad_output=0.5), Case(5, 33, inplace=True),
], ids=lambda case: case.name)  # fmt: skip
@pytest.mark.parametrize("name", ["eager", "fastkd torch", "fastkd cpu"])
def test_contenders_are_right(device: str, name: str, case: Case) -> None:
    provider = NAMES[name]
    if provider.unavailable(device) or provider.loss(case) is None:
        pytest.skip("not for this device or case")
    result, call = run.prepare(provider, case, device)
    assert result["status"] == "ok" and call is not None


def test_the_wrong_and_the_broken_are_shown(device: str) -> None:
    def half(case: Case):
        return lambda inputs: 0.5 * NAMES["eager"].loss(case)(inputs)

    def broken(case: Case):
        raise ValueError("not today")

    case = Case(3, 50)
    wrong, call = run.prepare(Provider("half", lambda device: None, half), case, device)
    assert wrong["status"] == "wrong" and call is not None
    failed, call = run.prepare(Provider("broken", lambda device: None, broken), case, device)
    assert failed["status"] == "failed: not today" and call is None


def test_a_gradient_of_the_wrong_size_is_wrong(device: str) -> None:
    """grad_output taken for 1, as a known fault of others."""
    case = Case(3, 50, grad_output=0.5)

    def ignores_grad_output(inputs: Inputs) -> torch.Tensor:
        value = NAMES["eager"].loss(case)(inputs)
        return value + value - value.detach()

    assert check.is_wrong(case, check.errors(case, ignores_grad_output, case.inputs(device), device))


def test_cases_are_told_apart_by_name() -> None:
    for device in ("cpu", "cuda"):
        cases = list(dict.fromkeys(full(device)))
        assert len({case.name for case in cases}) == len(cases) > len(list(quick(device)))
    assert Case(4, 10, "float32").bytes == 3 * 4 * 10 * 4


def test_results(results: dict[str, Any], tmp_path: Path) -> None:
    """Survive JSON, and give a table, documents and plots."""
    results = json.loads(json.dumps(results))
    lines, absent = summary.table(results["cases"][0])
    assert [line[0] for line in lines[1:3]] == ["copy", "eager"]
    assert "Liger" in absent
    assert "fastkd" in docs.short(results) and "| eager |" in docs.full(results)
    big = copy.deepcopy(results)
    for case in big["cases"][:2]:
        case.update(rows=case["rows"] * 10**6, name=Case(case["rows"] * 10**6, case["vocab"], "float32").name)
    written = plots.draw(big, tmp_path / "run")
    assert {path.suffix for path in written} == {".png", ".svg"} and all(path.stat().st_size for path in written)


def test_a_missing_git_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert run.machine("cpu")["commit"] is None


def test_a_call_on_a_gpu_is_queued_behind_a_delay_that_outlasts_its_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is at the call's first kernel too early twice, and the delay grows."""
    delays: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            pass

        def query(self) -> bool:
            return len(delays) < 3

        def elapsed_time(self, end: Event) -> float:
            return 7.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", delays.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(timing.Device, "__init__", lambda self: setattr(self, "flush", torch.empty(1)))
    calls: list[None] = []
    sample = timing.Device().sample(lambda: calls.append(None))
    assert sample["seconds"] == 7e-3 and sample["with_launches"] > 0
    assert len(delays) == 3 and delays[2] > delays[1] > delays[0] > 0
    assert len(calls) == 1 + len(delays)


def test_compare() -> None:
    def results(**seconds: list[float]) -> dict[str, Any]:
        return {"cases": [{"name": "a", "contenders": {name: {"seconds": s} for name, s in seconds.items()}}]}

    before = results(faster=[8.0, 12.0], same=[1.0, 3.0], apart=[1.0, 2.0, 3.0, 4.0, 5.0], gone=[1.0, 1.0])
    after = results(faster=[4.0, 6.0], same=[1.0, 3.0], apart=[2.0, 3.0, 4.0, 5.0, 6.0], new=[1.0, 1.0])
    assert summary.changes(before, after) == [
        ("a", "faster", 2.0, True),
        ("a", "same", 1.0, False),
        ("a", "apart", 0.75, False),
    ]


def test_a_run_that_is_interrupted_shows_what_it_has(
    results: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> Any:
        yield {**results, "cases": results["cases"][:1]}
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run", interrupted)
    monkeypatch.setattr(plots, "draw", lambda *arguments: [Path("a-plot")])
    assert main(["bench", "--out", str(tmp_path / "a.json")]) == 1
    printed = capsys.readouterr().out
    assert "eager" in printed and "interrupted after 1 of" in printed and "a-plot" in printed
    assert len(json.loads((tmp_path / "a.json").read_text())["cases"]) == 1


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "a.json"
    assert main(["bench", "--only", "4 x 1000", "--seconds", "0", "--out", str(out)]) == 0
    assert main(["bench", "--compare", str(out), str(out)]) == 0
    assert "4 x 1000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nothing of this name"], "--only: no case contains 'nothing of this name'"),
        (["--out", "."], "--out: . is a folder, must be a file"),
        (["--device", "cuda"], "--device cuda: PyTorch finds no CUDA device here"),
        (["--compare", "absent.json", "absent.json"], "--compare: a file is missing, or none of this command's: "),
    ],
    ids=lambda value: value[0].removeprefix("--") if isinstance(value, list) else "",
)
def test_a_mistake_on_the_command_line_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"python -m fastkd bench: {message}")


def test_command_says_where_it_saves(
    results: dict[str, Any],
    device: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By default in a folder of its own, plots and all."""
    folder = Path("fastkd-bench")
    saved = {f"{device}.json", f"{device}-vocab.png", f"{device}-vocab.svg"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "is_plain", lambda case: case["kind"] == "loss + backward")
    monkeypatch.setattr(run, "run", lambda *arguments: iter([results]))
    assert main(["bench"]) == 0
    assert {path.name for path in folder.iterdir()} == saved
    printed = capsys.readouterr().out
    assert all(str(folder / name) in printed for name in saved)


def test_a_contender_that_is_not_installed_says_how_to_add_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extras, "find_spec", lambda name: None)
    assert NAMES["Liger"].unavailable("cuda") == "needs liger-kernel: pip install liger-kernel"


@pytest.mark.parametrize("page", docs.PAGES, ids=lambda page: page.name)
def test_documents_hold_the_recorded_figures(page: Path) -> None:
    text = page.read_text()
    assert docs.render(text) == text, "run: python -m fastkd.bench.docs"


def test_all_figures_are_in_a_document() -> None:
    assert set(docs.blocks()) == {match[2] for page in docs.PAGES for match in docs.BLOCK.finditer(page.read_text())}


def test_a_denominator_of_all_tokens_makes_the_gradient_that_of_one_batch() -> None:
    lines = normalisation.table()[1:]
    assert len(lines) == len(normalisation.LOOPS)
    assert {right for _, _, right, _ in lines} == {"0%"}
    assert all(plain != "0%" for _, _, _, plain in lines[1:])
