"""A training step with a framework's own loss and with ours: ``python -m fastkd.bench.integrations [--out FILE.json]``.

Where a framework has no loss of distillation (Transformers, Lightning, PyTorch), its own is the idiom written out, on
whole logits. A step is both models' forward, loss and backward; the models are small Llamas with a large vocabulary.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastkd.bench import run, summary, timing

VOCAB, BATCH, LENGTH = 32000, 4, 128
PAGE = Path(__file__).resolve().parent.parent / "docs" / "integrations.md"
T = 2.0

Loss = Callable[[], Tensor]


def llama(width: int, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=LENGTH, initializer_range=0.1, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def batch() -> dict[str, Tensor]:
    """Three quarters of the labels count."""
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, : LENGTH // 4] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def shifted(labels: Tensor) -> Tensor:
    return F.pad(labels[:, 1:], (0, 1), value=-100)


def eager(z: Tensor, u: Tensor, y: Tensor, hard: float, soft: float) -> Tensor:
    """The loss of Hinton et al. as it is mostly written."""
    keep = y != -100
    z, u, y = z[keep], u[keep], y[keep]
    kl = F.kl_div(F.log_softmax(z / T, -1), F.softmax(u / T, -1), reduction="batchmean") * T * T
    return hard * F.cross_entropy(z, y) + soft * kl


def of_transformers(student: Any, teacher: Any, folder: str) -> tuple[Loss, Loss]:
    from transformers import TrainingArguments

    from fastkd.integrations.transformers import KDConfig, KDTrainer

    config = KDConfig(hard_weight=0.1, soft_weight=0.9, temperature=T)
    args = TrainingArguments(folder, use_cpu=True, report_to=[])
    trainer = KDTrainer(student, args, teacher=teacher, kd_config=config)
    given = batch()
    items = (shifted(given["labels"]) != -100).sum()

    def own() -> Tensor:
        inputs = {name: given[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            its = teacher(**inputs, use_cache=False).logits
        return eager(student(**inputs).logits, its, shifted(given["labels"]), 0.1, 0.9)

    return own, lambda: trainer.compute_loss(student, given, num_items_in_batch=items)


def of_trl_gkd(student: Any, teacher: Any, folder: str) -> tuple[Loss, Loss]:
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from fastkd.integrations import trl

    args = GKDConfig(folder, use_cpu=True, report_to=[], bf16=False)
    data = Dataset.from_list([{"messages": []}])
    trainers = [
        cls(student, teacher, args, data_collator=list, train_dataset=data, processing_class=tokenizer())
        for cls in (GKDTrainer, trl.GKDTrainer)
    ]
    own, ours = (lambda trainer=trainer: trainer.compute_loss(student, batch()) for trainer in trainers)
    return own, ours


def of_trl_distillation(student: Any, teacher: Any, folder: str) -> tuple[Loss, Loss]:
    from datasets import Dataset
    from trl import DistillationConfig, DistillationTrainer

    from fastkd.integrations import trl

    args = DistillationConfig(folder, use_cpu=True, report_to=[], bf16=False)
    data = Dataset.from_list([{"prompt": "w"}] * 8)
    trainers = [
        cls(student, teacher, args, train_dataset=data, processing_class=tokenizer())
        for cls in (DistillationTrainer, trl.DistillationTrainer)
    ]
    ids, prompt = batch()["input_ids"], LENGTH // 4
    given = {
        "prompt_ids": ids[:, :prompt], "prompt_mask": torch.ones_like(ids[:, :prompt]),
        "completion_ids": ids[:, prompt:], "completion_mask": torch.ones_like(ids[:, prompt:]),
    }  # fmt: skip
    own, ours = (lambda trainer=trainer: trainer.compute_loss(student, given) for trainer in trainers)
    return own, ours


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "w": 3}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w")), pad_token="<pad>", eos_token="<eos>"
    )


def of_torchtune(student: Any, teacher: Any, folder: str) -> tuple[Loss, Loss]:
    from torchtune.modules import loss

    from fastkd.integrations import torchtune

    def step(loss_fn: Any) -> Loss:
        """As its recipe does, with the distillation alone."""
        return lambda: loss_fn(*flat_logits(student, teacher), shifted(batch()["labels"]).flatten())

    return step(loss.ForwardKLLoss()), step(torchtune.ForwardKLLoss())


def flat_logits(student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    ids = batch()["input_ids"]
    with torch.no_grad():
        its = teacher(ids, use_cache=False).logits
    return student(ids, use_cache=False).logits.flatten(0, 1), its.flatten(0, 1)


def of_lightning(student: Any, teacher: Any, folder: str) -> tuple[Loss, Loss]:
    import fastkd
    from fastkd.integrations.lightning import UNIT, KDModule

    class Module(KDModule):
        def distil(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
            return *flat_logits(self.student, self.teacher), shifted(batch["labels"]).flatten()

    module = Module(student, teacher, fastkd.KDLoss(temperature=T, hard_weight=0.1, soft_weight=0.9))
    given = batch()
    items = (shifted(given["labels"]) != -100).sum()

    def own() -> Tensor:
        return eager(*flat_logits(student, teacher), shifted(given["labels"]).flatten(), 0.1, 0.9)

    return own, lambda: module.training_step(given, 0) * (UNIT / items)


def of_modelopt(student: Any, teacher: Any, folder: str) -> tuple[Loss, Loss]:
    from modelopt.torch.distill.plugins.huggingface import KDTrainer
    from transformers import TrainingArguments

    from fastkd.integrations import modelopt

    args = TrainingArguments(folder, use_cpu=True, report_to=[])
    settings = {"teacher_model": teacher, "temperature": T, "distill": True}
    trainers = [cls(student, args, distill_args=settings) for cls in (KDTrainer, modelopt.KDTrainer)]
    own, ours = (lambda trainer=trainer: trainer.compute_loss(student, batch()) for trainer in trainers)
    return own, ours


def of_pytorch(student: Any, teacher: Any, folder: str) -> tuple[Loss, Loss]:
    from fastkd.integrations.torch import KLDivLoss

    own, ours = torch.nn.KLDivLoss(reduction="batchmean"), KLDivLoss(temperature=T)

    def idiom() -> Tensor:
        z, u = flat_logits(student, teacher)
        return own(F.log_softmax(z / T, -1), F.softmax(u / T, -1)) * T * T

    return idiom, lambda: ours(*flat_logits(student, teacher))


# By the heading of the documentation's section.
FRAMEWORKS = {
    "Transformers": of_transformers,
    "TRL GKD": of_trl_gkd,
    "TRL distillation": of_trl_distillation,
    "torchtune": of_torchtune,
    "Lightning": of_lightning,
    "ModelOpt": of_modelopt,
    "PyTorch": of_pytorch,
}
BY_HAND = ("Transformers", "Lightning", "PyTorch")


def measure(name: str, seconds: float) -> dict[str, Any]:
    student, teacher = llama(128, seed=1).train(), llama(256, seed=2).eval()
    parameters = list(student.parameters())

    def step(loss: Loss) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(), parameters)

    with tempfile.TemporaryDirectory() as folder:
        losses = dict(zip(("own", "fastkd"), FRAMEWORKS[name](student, teacher, folder), strict=True))
        calls = {which: step(loss) for which, loss in losses.items()}
        values, grads = zip(*((loss().item(), step(loss)()) for loss in losses.values()), strict=True)
        error, size = (
            sum(g.square().sum() for g in part) ** 0.5
            for part in ([a - b for a, b in zip(*grads, strict=True)], grads[0])
        )
        del grads
        found = {
            "loss_error": abs(values[1] - values[0]) / abs(values[0]),
            "gradient_error": (error / size).item(),
            "bytes": {which: timing.peak_bytes(call, "cpu") for which, call in calls.items()},
            "seconds": {
                which: samples["seconds"] for which, samples in timing.interleaved(calls, "cpu", seconds).items()
            },
        }
    return {"name": name, **found}


def lines_changed() -> dict[str, int]:
    """How many lines the documentation marks, by section."""
    sections = re.split(r"^## (.*)$", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return {name: text.count("# <--") for name, text in zip(sections[::2], sections[1::2], strict=True)}


def table(results: dict[str, Any]) -> list[list[str]]:
    lines = [
        ["framework", "lines changed", "loss, relative error", "gradient", "time of a step", "x its own's", "memory"]
    ]
    changed = lines_changed()
    for case in results["cases"]:
        ours, own = (median(case["seconds"][which]) for which in ("fastkd", "own"))
        memory = case["bytes"]["fastkd"] / case["bytes"]["own"] if case["bytes"]["own"] else None
        lines.append([
            f"{case['name']}{' (by hand)' if case['name'] in BY_HAND else ''}",
            str(changed[case["name"]]),
            f"{case['loss_error']:.0e}",
            f"{case['gradient_error']:.0e}",
            summary.duration(ours),
            f"{ours / own:.2f}",
            f"{memory:.0%} of its own's" if memory is not None else "",
        ])  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fastkd.bench.integrations", description=__doc__.partition(":")[0])
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=8.0, help="of measuring a framework, after the first 9 rounds")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {"machine": run.machine("cpu"), "cases": []}
    for name in FRAMEWORKS:
        results["cases"].append(measure(name, arguments.seconds))
        print(*table({"cases": results["cases"][-1:]})[1], sep="  ", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
