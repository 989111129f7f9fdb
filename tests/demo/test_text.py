import random
import sysconfig
from functools import partial
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastkd.demo import losses, memory, picture, report, text
from fastkd.demo.losses import labels_only
from fastkd.demo.models import LanguageModel
from fastkd.demo.training import Comparison, Recipe, Run, Task, compare, train

VOCABULARY = 320
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files():
    return text.source_files(Path(sysconfig.get_paths()["stdlib"]))


@pytest.fixture(scope="module")
def tokenizer(files):
    return text.train_tokenizer(text.read(files, 50_000), VOCABULARY)


def silent(name, steps):
    return lambda run: None


def toy_task(ids):
    model = partial(LanguageModel, torch.zeros(VOCABULARY), text.CONTEXT, width=16, layers=1, heads=2)
    recipe = Recipe(model, partial(text.random_batches, ids), steps=4, learning_rate=1e-2)
    return Task(
        name="toy",
        summary="",
        row="token",
        rows=text.BATCH * text.CONTEXT,
        classes=VOCABULARY,
        held_out=list(text.even_batches(ids)),
        teacher=recipe,
        student=recipe,
        temperature=2.0,
        hard_weight=0.1,
        has_hidden_states=True,
        has_cache=True,
    )


def test_source_files_are_the_library_alone(files):
    parts = {part for path in files for part in path.parts}
    assert len(files) > 100 and files == sorted(files)
    assert "site-packages" not in parts and "idle_test" not in parts


def test_split_is_by_file_and_by_seed(files):
    train, held_out = text.split(files, 0)
    assert not set(train) & set(held_out)
    assert set(train) | set(held_out) == set(files)
    assert text.split(files, 0) == (train, held_out) != text.split(files, 1)


def test_read_stops_at_the_limit(files):
    texts = text.read(files, 50_000)
    assert sum(map(len, texts[:-1])) < 50_000 <= sum(map(len, texts))


def test_tokenizer_gives_the_text_back(tokenizer):
    assert tokenizer.get_vocab_size() == VOCABULARY
    source = "def naïve(x):\n\treturn 'π'  # 🐍\n"
    ids = text.encode(tokenizer, [source, source])
    end = tokenizer.token_to_id(text.END)
    assert (ids == end).sum() == 2
    assert tokenizer.decode(ids[: len(ids) // 2 - 1].tolist()) == source


def test_batches_are_windows_with_the_next_token_as_label():
    ids = torch.arange(500)
    batches = [*text.random_batches(ids, 3, seed=0), *text.even_batches(ids)]
    for inputs, labels in batches:
        assert inputs.shape[1] == text.CONTEXT and torch.equal(labels, inputs + 1)
    again = list(text.random_batches(ids, 3, seed=0))
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(again, batches[:3], strict=True))


def test_model_is_causal_and_starts_at_the_frequencies():
    torch.manual_seed(0)
    frequencies = torch.randn(VOCABULARY).log_softmax(-1)
    model = LanguageModel(frequencies, text.CONTEXT, width=16, layers=2, heads=2)
    ids = torch.randint(VOCABULARY, (1, 10))
    changed = ids.clone()
    changed[0, 6:] += 1
    changed %= VOCABULARY
    for parameter in model.blocks.parameters():
        parameter.data.normal_(std=0.2)
    before, after = model(ids), model(changed)
    assert torch.allclose(before[0, :6], after[0, :6], atol=1e-5)
    assert not torch.allclose(before[0, 6:], after[0, 6:], atol=1e-2)
    assert torch.allclose(before.log_softmax(-1), frequencies.expand(1, 10, -1), atol=1.0)


def test_a_few_steps_agree_and_repeat(files, tokenizer):
    ids = text.encode(tokenizer, random.Random(0).sample(text.read(files, 50_000), 3))
    seen = []
    comparison = compare(toy_task(ids), seed=3, track=lambda name, steps: lambda run: seen.append(name))
    assert seen == ["teacher"] * 4 + ["labels", "usual", "fastkd", "hidden", "cache"] * 4
    assert max(comparison.differences) < 1e-5
    assert comparison.students["hidden"].losses == pytest.approx(comparison.students["fastkd"].losses, abs=1e-5)
    cached = comparison.students["cache"]
    assert cached.losses != comparison.students["fastkd"].losses
    assert cached.final == pytest.approx(comparison.students["fastkd"].final, abs=0.05)
    assert 4 * losses.CACHED_K < comparison.cached_bytes < 5 * losses.CACHED_K
    assert comparison.teacher.final < comparison.teacher.held_out[0]
    again = compare(toy_task(ids), seed=3, track=silent)
    assert again.students["fastkd"].losses == comparison.students["fastkd"].losses


def test_the_table_fits_80_columns(capsys):
    run = Run(1, [1.0], {1: 12.345}, loss_seconds=[0.01, 0.0123, 0.09], step_seconds=[0.1, 0.2, 0.9])
    comparison = Comparison(run, dict.fromkeys(picture.STYLES, run))
    table = report._table(toy_task(torch.arange(500)), comparison, dict.fromkeys(picture.STYLES, 10**9))
    Console(width=80).print(table)
    printed = capsys.readouterr().out
    assert "12.30 ± 163%*" in printed and "200 ± 100%" in printed and "954" in printed
    assert all(style["label"] in printed for style in picture.STYLES.values()) and "…" not in printed


def test_models_take_turns_on_the_same_batches():
    task = toy_task(torch.randint(VOCABULARY, (500,)))
    seen = []

    def watched(name):
        def loss(student, teacher, labels, temperature, hard_weight):
            seen.append((name, labels.sum().item()))
            return labels_only(student, teacher, labels, temperature, hard_weight)

        return loss

    trainees = train(task, task.student, None, {"a": watched("a"), "b": watched("b")}, seed=0, track=silent)
    names, batches = zip(*seen, strict=True)
    assert "".join(names) == "abbaabba"
    assert batches[::2] == batches[1::2] and len(set(batches)) == 4
    assert trainees["a"].run.losses == trainees["b"].run.losses


def test_a_quick_task_has_a_quarter_of_each_batch():
    task = toy_task(torch.arange(500))
    quick = task.quick()
    assert 4 * quick.rows == task.rows and quick.student.steps == task.student.steps
    whole, quarter = (list(recipe.batches(3, 0)) for recipe in (task.student, quick.student))
    for (inputs, labels), (few_inputs, few_labels) in zip(whole, quarter, strict=True):
        assert few_inputs.numel() == quick.rows and torch.equal(few_labels, labels[: len(few_labels)])
        assert torch.equal(few_inputs, inputs[: len(few_inputs)])


@pytest.mark.skipif(not memory.STATUS.exists(), reason="the system does not tell a process's peak memory")
def test_peak_memory_is_at_least_the_gradient():
    rows, classes = 1024, 8192
    usual, fast, hidden = (memory.peak_bytes(name, rows, classes, CPU) for name in ("usual", "fastkd", "hidden"))
    cached = memory.peak_bytes("cache", rows, classes, CPU)
    assert hidden < 4 * rows * classes <= min(fast, cached) <= max(fast, cached) < usual
