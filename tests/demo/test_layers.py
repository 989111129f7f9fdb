"""The layers task, at a size that takes a second."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from rich.console import Console

from fastkd.__main__ import main
from fastkd.demo import layers, layers_report, text
from fastkd.demo.models import LanguageModel
from fastkd.demo.training import Recipe

VOCABULARY = 50


@pytest.fixture
def task(monkeypatch):
    monkeypatch.setattr(layers, "WIDTH", 8)
    ids = torch.randint(VOCABULARY, (2000,), generator=torch.Generator().manual_seed(0)).cumsum(0) % VOCABULARY

    def recipe(count, steps):
        model = partial(LanguageModel, torch.zeros(VOCABULARY), text.CONTEXT, width=8, layers=count, heads=2)
        return Recipe(model, partial(text.random_batches, ids), steps=steps, learning_rate=1e-2)

    return layers.Task("toy", list(text.even_batches(ids))[:2], recipe(12, 8), recipe(6, 4))


@pytest.fixture
def comparison(task):
    return layers.compare(task, 0, 3, lambda name, run: None)


def test_students_of_a_seed_differ_in_what_they_learn_from_alone(task, comparison):
    methods = [method.name for method in layers.METHODS]
    assert list(comparison.students) == methods == [
        "labels only", "KD", "KD + hidden layers", "KD + hidden + copied layers"
    ]  # fmt: skip
    for runs in comparison.students.values():
        assert len(runs) == 3 and all(list(run.held_out) == [0, 1, 2, 3, 4] for run in runs)
    for number in range(3):
        starts = [comparison.students[name][number].held_out[0] for name in methods]
        assert starts[0] == starts[1] == starts[2] != starts[3]
        assert len({comparison.students[name][number].final for name in methods}) == 4
    _, again = layers.train(task, task.student, 1, layers.METHODS[0], None)
    assert again.held_out == comparison.students["labels only"][0].held_out


def test_a_copy_is_of_everything():
    teacher, student = (LanguageModel(torch.zeros(VOCABULARY), 16, 8, count, 2) for count in (12, 6))
    report = layers.fastkd.copy_layers(teacher, student, layers.PAIRS, teacher_layers="blocks")
    assert {name for name, _ in student.named_parameters()} == set(report.copied)


def test_report(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(layers, "make_task", lambda seed, device: task)
    layers_report.run(Console(width=80), 5, torch.device("cpu"), tmp_path)
    printed = capsys.readouterr().out
    for method in layers.METHODS:
        assert f"{method.name}  " in printed and f"{method.name}, seed 3" in printed
    assert "…" not in printed  # nothing is cut off
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "layers.json").read_text())
    assert figures["steps"] == {"teacher": 8, "student": 4} and figures["seed"] == 5
    assert [len(runs) for runs in figures["students"].values()] == [3] * 4


def test_what_is_said_follows_the_figures(task):
    def comparison(finals):
        runs = {
            method.name: [layers.Run({0: 5.0, 4: final}) for final in finals_of]
            for method, finals_of in zip(layers.METHODS, finals, strict=True)
        }
        return layers.Comparison(layers.Run({0: 5.0, 8: 1.0}), runs)

    said = list(layers_report.findings(task, comparison([[4.0, 4.0], [3.0, 3.5], [3.2, 3.4], [3.3, 3.6]])))
    assert said[0] == "KD: 0.750 nats below labels only, for every seed (+0.500 to +1.000)."
    assert said[1] == "KD + hidden layers: 0.050 nats above KD, not for every seed (-0.200 to +0.100)."
    assert said[2].startswith("KD + hidden + copied layers: 0.150 nats above KD + hidden layers, for every seed")


def test_command(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(layers, "make_task", lambda seed, device: replace(task, summary=f"seed {seed}"))
    assert main(["demo", "--task", "layers", "--seed", "7", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    assert "seed 7" in capsys.readouterr().out and (tmp_path / "out" / "layers.json").exists()
