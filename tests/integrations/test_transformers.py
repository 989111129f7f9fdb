"""KDTrainer against a Trainer whose loss is written out: the step that each takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, HfArgumentParser, Trainer

import fastkd
from fastkd import cache
from fastkd.integrations.transformers import KDConfig, KDTrainer, kd_loss_func, linear_logits
from tests.integrations.models import VOCAB, arguments, check_steps, llama, rows, step

pytestmark = pytest.mark.integration
CONFIG = KDConfig(hard_weight=0.3, soft_weight=0.7, temperature=2.0)


class ByHand(Trainer):
    """CE and T²·KL on whole logits in float32, by the book."""

    shifts = True

    def __init__(self, *args: Any, teacher: Any, vocab: int = VOCAB, hidden: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, compute_loss_func=lambda *_: None, **kwargs)
        self.teacher, self.vocab, self.hidden = teacher.eval(), vocab, hidden

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        outputs = model(**inputs, output_hidden_states=True)
        with torch.no_grad():
            its = self.teacher(**inputs, output_hidden_states=True)
        z, u = (o.logits[..., : self.vocab].float() for o in (outputs, its))
        if self.shifts:
            z, u, labels = z[:, :-1], u[:, :-1], labels[:, 1:]
        keep = labels != -100
        z, u, y = z[keep], u[keep], labels[keep]
        soft = F.kl_div(F.log_softmax(z / 2, -1), F.log_softmax(u / 2, -1), reduction="sum", log_target=True)
        loss = 0.3 * F.cross_entropy(z, y, reduction="sum") + 0.7 * 4 * soft
        if self.hidden is not None:
            for (i, j), project in zip(self.hidden.pairs, self.hidden.projections, strict=True):
                s, t = (o.hidden_states[k][:, :-1][keep] for o, k in ((outputs, i), (its, j)))
                loss = loss + 0.5 * (project(s) - t).square().mean(-1).sum() / len(self.hidden.pairs)
        loss = loss / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


def models() -> tuple[Any, Any]:
    return llama(16, seed=1), llama(32, seed=2)


def ours(folder: Path, config: KDConfig = CONFIG, given: dict[str, Any] | None = None, **kwargs: Any) -> KDTrainer:
    student, teacher = models()
    args = arguments(folder, **(given or {}))
    return KDTrainer(student, args, teacher=teacher, kd_config=config, train_dataset=rows(), **kwargs)


@pytest.fixture
def expected(tmp_path: Path) -> tuple[float, dict[str, Tensor]]:
    student, teacher = models()
    return step(ByHand(student, arguments(tmp_path), teacher=teacher, train_dataset=rows()))


ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


@pytest.mark.parametrize("given", [
    {}, ACCUMULATED, {"average_tokens_across_devices": False}, {"gradient_checkpointing": True},
    {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("whole", [False, True])
def test_a_step_is_the_step_by_hand(
    tmp_path: Path, expected: tuple[float, dict[str, Tensor]], given: dict[str, Any], whole: bool
) -> None:
    """Of batches with unequal numbers of labels, one with none, padded, as one or as four."""
    config = KDConfig(hard_weight=0.3, soft_weight=0.7, temperature=2.0, whole_logits=whole)
    trainer = ours(tmp_path, config, given)
    check_steps(step(trainer), expected)
    (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["loss"] == pytest.approx(0.3 * entry["hard_loss"] + 0.7 * 4 * entry["soft_loss"], rel=1e-5)


def test_no_logits_of_either_model_are_computed(tmp_path: Path) -> None:
    """Nor in an evaluation that has no metrics; one that has gets the student's."""
    seen: list[int] = []
    trainer = ours(tmp_path, given={"eval_strategy": "steps", "eval_steps": 1}, eval_dataset=rows(4))
    for model in (trainer.model, trainer.kd.teacher):
        model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    trainer.train()
    assert seen and set(seen) == {1}
    seen.clear()
    trainer.compute_metrics = lambda predictions: {"shape": predictions.predictions.shape[-2]}
    assert trainer.evaluate()["eval_shape"] == 12
    assert set(seen) == {1, 12}


def test_evaluation(tmp_path: Path) -> None:
    """The loss by hand, and both of its terms, whatever their weights."""
    student, teacher = models()
    by_hand = ByHand(student, arguments(tmp_path), teacher=teacher, eval_dataset=rows()).evaluate()
    trainer = ours(tmp_path, eval_dataset=rows())
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(by_hand["eval_loss"], rel=1e-5)
    assert found["eval_loss"] == pytest.approx(0.3 * found["eval_hard_loss"] + 2.8 * found["eval_soft_loss"], rel=1e-5)
    alone = ours(tmp_path, KDConfig(hard_weight=0.0, temperature=2.0), eval_dataset=rows())
    assert alone.evaluate()["eval_hard_loss"] == pytest.approx(found["eval_hard_loss"], rel=1e-5)
    loss, _ = step(alone)
    assert "soft_loss" not in alone.state.log_history[0] and loss > 0
    assert alone.predict(rows(2)).predictions.shape == (2, 12, VOCAB)


@pytest.mark.parametrize("given", [{}, ACCUMULATED], ids=str)
def test_as_the_loss_function_of_a_trainer(
    tmp_path: Path, expected: tuple[float, dict[str, Tensor]], given: dict[str, Any]
) -> None:
    student, teacher = models()
    func = kd_loss_func(student, teacher, CONFIG)
    trainer = Trainer(student, arguments(tmp_path, **given), train_dataset=rows(), compute_loss_func=func)
    check_steps(step(trainer), expected)
    with pytest.raises(RuntimeError, match="has not run"):
        func(None, torch.zeros(1, 2, dtype=torch.int64))


def test_num_items_of_shape_1(tmp_path: Path) -> None:
    """As DataParallel gives it, a tensor of one element, or an int."""
    trainer = ours(tmp_path)
    batch = trainer.data_collator(rows())
    losses = [
        trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
        for items in (torch.tensor([40]), torch.tensor(40), 40)
    ]
    assert losses[0].shape == () and losses[0] == losses[1] == losses[2]
    assert "labels" in batch


@pytest.mark.parametrize("whole", [False, True])
def test_padded_vocabularies(tmp_path: Path, whole: bool) -> None:
    """Heads of different heights: the tokens are the first of both, and padding learns nothing."""
    student, teacher = llama(16, 1, vocab=224), llama(32, 2, vocab=256)
    settings = {"hard_weight": 0.3, "soft_weight": 0.7, "temperature": 2.0, "whole_logits": whole}
    by_hand = step(ByHand(student, arguments(tmp_path), teacher=teacher, train_dataset=rows()))
    student, teacher = llama(16, 1, vocab=224), llama(32, 2, vocab=256)
    trainer = KDTrainer(
        student, arguments(tmp_path), teacher=teacher, kd_config=KDConfig(vocab_size=VOCAB, **settings),
        train_dataset=rows(),
    )  # fmt: skip
    mine = step(trainer)
    check_steps(mine, by_hand)
    assert not mine[1]["lm_head.weight"][VOCAB:].any()
    trainer = KDTrainer(
        student, arguments(tmp_path), teacher=teacher, kd_config=KDConfig(**settings), train_dataset=rows()
    )
    with pytest.raises(ValueError, match=r"vocabulary of 256, student_logits has 224.*vocab_size"):
        trainer.train()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(tmp_path: Path, dtype: torch.dtype) -> None:
    """The gradient is as near to float32's as the storage allows, and nearer than of the logits that are rounded."""
    errors = []
    for make in (lambda: ours(tmp_path), lambda: by_hand(tmp_path)):
        trainer = make()
        batch = trainer.data_collator(rows())
        grads = []
        for enabled in (False, True):
            with torch.autocast("cpu", dtype, enabled=enabled):
                loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(40))
            assert loss.dtype == torch.float32
            grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(trainer.model.parameters()))]))
        errors.append(((grads[1] - grads[0]).norm() / grads[0].norm()).item())
    assert errors[0] <= 1.1 * errors[1] and errors[0] < 0.05


def by_hand(folder: Path) -> ByHand:
    student, teacher = models()
    return ByHand(student, arguments(folder), teacher=teacher, train_dataset=rows())


def test_a_bf16_run(tmp_path: Path) -> None:
    """TrainingArguments(bf16=True), with accumulation and checkpointing, goes down."""
    given = {**ACCUMULATED, "bf16": True, "gradient_checkpointing": True, "max_steps": 12, "learning_rate": 0.3}
    trainer = ours(tmp_path, given=given)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("given", [{}, ACCUMULATED], ids=str)
def test_hidden_layers(tmp_path: Path, given: dict[str, Any]) -> None:
    """Their projections, within the student, learn with it."""
    trained = []
    for make in (ByHand, KDTrainer):
        student, teacher = models()
        torch.manual_seed(3)
        student.projections = fastkd.HiddenLoss([(1, 1), (2, 2)], 16, 32)
        args = arguments(tmp_path, **given)
        if make is ByHand:
            trainer: Any = ByHand(student, args, teacher=teacher, hidden=student.projections, train_dataset=rows())
        else:
            config = KDConfig(hard_weight=0.3, soft_weight=0.7, temperature=2.0, hidden_weight=0.5)
            trainer = KDTrainer(
                student, args, teacher=teacher, kd_config=config, hidden_loss=student.projections, train_dataset=rows()
            )
        trained.append(step(trainer))
    check_steps(trained[1], trained[0])
    assert trained[1][1]["projections.projections.0.weight"].norm() > 1e-3
    assert "hidden_loss" in trainer.state.log_history[0]
    with pytest.raises(ValueError, match=r"student.projections = hidden_loss"):
        ours(tmp_path, hidden_loss=fastkd.HiddenLoss([(1, 1)], 16, 32))


def test_a_step_without_labels(tmp_path: Path) -> None:
    """Leaves all as it was: no term of it is 0/0."""
    student, teacher = models()
    student.projections = fastkd.HiddenLoss([(1, 1)], 16, 32)
    unlabelled = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in rows()]
    trainer = KDTrainer(
        student, arguments(tmp_path), teacher=teacher, kd_config=CONFIG, hidden_loss=student.projections,
        train_dataset=unlabelled,
    )  # fmt: skip
    loss, taken = step(trainer)
    assert loss == 0 and all((change == 0).all() for change in taken.values())


def test_logs_of_a_second_run(tmp_path: Path) -> None:
    """Nothing of the steps that the first had taken after its last."""
    trainer = ours(tmp_path, given={"max_steps": 3, "logging_steps": 2})
    for _ in range(2):
        trainer.train()
        (entry,) = (entry for entry in trainer.state.log_history if "loss" in entry)
        logged = 0.3 * entry["hard_loss"] + 0.7 * 4 * entry["soft_loss"]
        assert entry["loss"] == pytest.approx(logged, rel=1e-5)


def test_a_teacher_on_disk(tmp_path: Path) -> None:
    """All tokens of it, so that it is the teacher itself."""
    student, teacher = models()
    unlabelled = [{name: row[name] for name in ("input_ids", "attention_mask", "labels")} for row in rows()]
    with torch.no_grad(), cache.Writer(tmp_path / "c", k=VOCAB, temperature=2.0, vocab_size=VOCAB, teacher="t") as disk:
        for row in unlabelled:
            logits = teacher.eval()(row["input_ids"][None], attention_mask=row["attention_mask"][None]).logits[0]
            mask = row["attention_mask"].bool()
            disk.add(row["input_ids"], fastkd.top_k(logits, VOCAB, temperature=2.0), mask)
    data = cache.CachedDataset(unlabelled, cache.Cache(tmp_path / "c"))
    steps = []
    for given in ({}, ACCUMULATED):
        student, _ = models()
        trainer = KDTrainer(
            student, arguments(tmp_path, **given), kd_config=CONFIG, train_dataset=data, data_collator=data.collate
        )
        steps.append(step(trainer))
    check_steps(steps[1], steps[0])
    online = step(ours(tmp_path))
    assert steps[0][0] == pytest.approx(online[0], rel=2e-3)  # log-probabilities on disk are float16
    with pytest.raises(ValueError, match="teacher: got None"):
        step(KDTrainer(student, arguments(tmp_path), kd_config=CONFIG, train_dataset=rows()))


def bert(width: int, seed: int) -> Any:
    torch.manual_seed(seed)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB, hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=2 * width, max_position_embeddings=16, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, initializer_range=0.3,
        )
    )  # fmt: skip


def test_a_masked_language_model_is_not_shifted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its head has a bias, behind a layer of its own."""
    monkeypatch.setattr(ByHand, "shifts", False)
    by_hand = step(ByHand(bert(16, 1), arguments(tmp_path), teacher=bert(32, 2), train_dataset=rows()))
    for given in ({}, ACCUMULATED):
        args = arguments(tmp_path, **given)
        check_steps(
            step(KDTrainer(bert(16, 1), args, teacher=bert(32, 2), kd_config=CONFIG, train_dataset=rows())), by_hand
        )


@pytest.mark.parametrize("family", ["Gemma2", "Cohere", "Granite"])
def test_scale_and_softcap_of_a_head(tmp_path: Path, family: str) -> None:
    config = {
        "Gemma2": {"final_logit_softcapping": 3.0}, "Cohere": {"logit_scale": 0.25}, "Granite": {"logits_scaling": 4.0},
    }[family]  # fmt: skip

    def model(width: int, seed: int) -> Any:
        torch.manual_seed(seed)
        return getattr(transformers, f"{family}ForCausalLM")(
            getattr(transformers, f"{family}Config")(
                vocab_size=VOCAB, hidden_size=width, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
                intermediate_size=32, max_position_embeddings=64, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
                eos_token_id=2, head_dim=width // 2, **config,
            )
        )  # fmt: skip

    by_hand = step(ByHand(model(16, 1), arguments(tmp_path), teacher=model(32, 2), train_dataset=rows()))
    student, teacher = model(16, 1), model(32, 2)
    check_steps(
        step(KDTrainer(student, arguments(tmp_path), teacher=teacher, kd_config=CONFIG, train_dataset=rows())), by_hand
    )


def test_a_head_that_is_not_what_its_config_says(tmp_path: Path) -> None:
    student, teacher = models()
    teacher.config.logit_scale = 7.0  # in which its forward has no part
    trainer = KDTrainer(student, arguments(tmp_path), teacher=teacher, kd_config=CONFIG, train_dataset=rows())
    with pytest.raises(ValueError, match="LlamaForCausalLM: its logits are not those of its head"):
        trainer.train()


def test_compiled(tmp_path: Path, expected: tuple[float, dict[str, Tensor]]) -> None:
    """The head gives one position in training, and all of them where metrics want them."""
    trainer = ours(tmp_path, given={"torch_compile": True, "torch_compile_backend": "aot_eager"}, eval_dataset=rows())
    check_steps(step(trainer), expected)
    before = trainer.evaluate()["eval_loss"]
    trainer.compute_metrics = lambda predictions: {"shape": predictions.predictions.shape[-2]}
    after = trainer.evaluate()
    assert after["eval_shape"] == 12 and after["eval_loss"] == pytest.approx(before, rel=1e-5)


def test_adapters(tmp_path: Path, expected: tuple[float, dict[str, Tensor]]) -> None:
    """LoRA on the layers learns alone; on the head it is refused, whose matrix is then not what multiplies."""
    from peft import LoraConfig, get_peft_model

    def student(*targets: str) -> Any:
        return get_peft_model(llama(16, seed=1), LoraConfig(r=4, target_modules=list(targets)))

    settings: Any = {"teacher": llama(32, seed=2), "kd_config": CONFIG, "train_dataset": rows()}
    loss, taken = step(KDTrainer(student("q_proj", "v_proj"), arguments(tmp_path, **ACCUMULATED), **settings))
    assert loss == pytest.approx(expected[0], rel=1e-5)
    assert {"lora_B" in name for name, change in taken.items() if change.any()} == {True}
    with pytest.raises(TypeError, match=r"peft.*Linear'>, must be nn.Linear"):
        KDTrainer(student("lm_head"), arguments(tmp_path), **settings)


def torchrun(script: str, *arguments: str) -> None:
    """On two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(Path(__file__).with_name(script)), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-3000:]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_two_processes(tmp_path: Path, expected: tuple[float, dict[str, Tensor]], accumulated: int) -> None:
    """DDP, each rank with another number of labels, takes the step of one process; and the terms are all ranks'."""
    given = {"per_device_train_batch_size": 4 // accumulated, "gradient_accumulation_steps": accumulated}
    torchrun("ranks.py", str(tmp_path), json.dumps(given))
    found, evaluated = torch.load(tmp_path / "found.pt")
    check_steps(found, expected)
    trainer = ours(tmp_path, eval_dataset=rows())
    step(trainer)
    alone = trainer.evaluate()
    assert evaluated == pytest.approx({name: alone[name] for name in evaluated}, rel=1e-4)


def test_sharded_models(tmp_path: Path, expected: tuple[float, dict[str, Tensor]]) -> None:
    """By FSDP2, heads and all: the step of whole ones."""
    torchrun("sharded.py", str(tmp_path))
    check_steps(torch.load(tmp_path / "found.pt"), expected)


def test_linear_logits() -> None:
    model = llama(16, 1)
    ids = rows()[0]["input_ids"][None]
    hidden = model.model(ids).last_hidden_state
    source = linear_logits(model, hidden)
    assert fastkd.kd_loss(source, model(ids).logits.detach()).item() == pytest.approx(0, abs=1e-6)


def test_config_is_read_from_a_command_line() -> None:
    (config,) = HfArgumentParser(KDConfig).parse_args_into_dataclasses(
        ["--hard_weight", "0.1", "--divergence", "reverse_kl", "--vocab_size", "211", "--no_scale_soft_by_t2"]
    )
    loss_fn = config.loss_fn()
    assert (loss_fn.hard_weight, loss_fn.divergence, loss_fn.vocab_size) == (0.1, "reverse_kl", 211)
    assert not loss_fn.scale_soft_by_t2
    assert KDConfig(hard_weight=0.0, divergence=fastkd.JSD(0.3)).loss_fn().divergence == fastkd.JSD(0.3)
    with pytest.raises(TypeError, match="hard_weight"):
        KDConfig()  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="temperature: got -1"):
        KDConfig(hard_weight=0.0, temperature=-1).loss_fn()


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"KDConfig.label_smoothing"):
        ours(tmp_path, given={"label_smoothing_factor": 0.1})
    student, teacher = models()
    teacher.set_output_embeddings(nn.Sequential(nn.Linear(32, VOCAB)))
    with pytest.raises(TypeError, match=r"Sequential.*, must be nn.Linear; give KDConfig.whole_logits=True"):
        KDTrainer(student, arguments(tmp_path), teacher=teacher, kd_config=CONFIG, train_dataset=rows())
    unlabelled = [{"input_ids": row["input_ids"]} for row in rows()]
    trainer = ours(tmp_path)
    with pytest.raises(ValueError, match="labels: got None"):
        trainer.compute_loss(trainer.model, trainer.data_collator(unlabelled))
