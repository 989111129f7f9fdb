"""What is written is read, and what is not of a cache is refused."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastkd
from fastkd import cache
from tests.cache.sequences import SETTINGS, VOCAB, K, check, sequence, write


def padded(numbers: list[int], left: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A batch's tokens, its mask, and the ids and log-probabilities, padded with what must not be stored."""
    sequences = [sequence(number) for number in numbers]
    length = max(len(input_ids) for input_ids, _ in sequences) + 1
    input_ids = torch.full((len(numbers), length), 7)
    mask = torch.zeros(len(numbers), length, dtype=torch.bool)
    ids, log_probs = torch.full((*mask.shape, K), VOCAB), torch.full((*mask.shape, K), torch.nan)
    for row, (tokens, topk) in enumerate(sequences):
        run = slice(length - len(tokens), None) if left else slice(len(tokens))
        input_ids[row, run], mask[row, run] = tokens, True
        ids[row, run], log_probs[row, run] = topk.ids, topk.log_probs
    return input_ids, mask, ids, log_probs


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write(tmp_path, range(20))
    found = cache.Cache(tmp_path)
    assert len(found) == 20
    assert len(list(found.shards())) > 5
    for number, (digest, topk) in enumerate(found):
        tokens = sequence(number)[0].to(torch.int32)
        assert digest == hashlib.blake2b(tokens.numpy().tobytes(), digest_size=16).digest()
        check(topk, number)
    check(found[-1][1], 19)
    for outside in (20, -21):
        with pytest.raises(IndexError, match=rf"index: got {outside}, the cache at .* has 20 sequences"):
            found[outside]
    with pytest.raises(TypeError, match="index: got slice, must be an int"):
        found[:2]  # type: ignore[index]


@pytest.mark.parametrize("left", [False, True])
def test_batches(tmp_path: Path, left: bool) -> None:
    """Padding on either side is neither stored nor given a teacher."""
    numbers = [4, 2, 9, 13]
    input_ids, mask, ids, log_probs = padded(numbers, left)
    with cache.Writer(tmp_path, **SETTINGS | {"k": np.int64(K), "vocab_size": np.int32(VOCAB)}) as writer:
        writer.add(input_ids, fastkd.TopK(ids, log_probs, 2.0), mask)
    found = cache.Cache(tmp_path)
    for position, number in enumerate(numbers):
        check(found[position][1], number)
    order = torch.tensor([3, 0, 1])
    batch = found.batch(order, input_ids[order].to(torch.int32), mask[order])
    assert batch.ids.shape == (3, input_ids.shape[1], K)
    for row, position in enumerate(order.tolist()):
        check(batch._replace(ids=batch.ids[row, mask[position]], log_probs=batch.log_probs[row, mask[position]]),
              numbers[position])  # fmt: skip
        assert (batch.ids[row, ~mask[position]] == -1).all()
        assert (batch.log_probs[row, ~mask[position]] == -torch.inf).all()
    if not left:
        without = found.batch(order, input_ids[order])
        assert torch.equal(without.ids, batch.ids)
        assert torch.equal(without.log_probs, batch.log_probs)


@pytest.mark.parametrize(("vocab_size", "stored"), [(50, "uint16"), (2**16 - 1, "uint16"), (2**16, "uint32"),
                                                    (2**31 - 1, "uint32")])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_types_on_disk(tmp_path: Path, vocab_size: int, stored: str, dtype: torch.dtype) -> None:
    """The largest id and padding are told apart; log-probabilities are rounded once."""
    ids = torch.tensor([[0, vocab_size - 1], [vocab_size - 2, -1]], dtype=torch.int32)
    log_probs = torch.tensor([[-1e-6, -14.1], [-0.3, -torch.inf]], dtype=torch.float64)
    tokens = torch.tensor([1, vocab_size - 1])
    settings = SETTINGS | {"k": 2, "vocab_size": vocab_size, "temperature": 1.0, "dtype": dtype, "tail": "renormalize"}
    with cache.Writer(tmp_path, **settings) as writer:
        writer.add(tokens, fastkd.TopK(ids, log_probs, tail="renormalize"))
    found = cache.Cache(tmp_path).batch([0], tokens[None])
    assert torch.equal(found.ids[0], ids)
    assert torch.equal(found.log_probs[0], log_probs.to(dtype))
    assert found[2:] == (1.0, "renormalize")
    tensors = load_file(tmp_path / "shard-0-000000.safetensors")
    assert tensors["ids"].dtype == getattr(torch, stored)
    assert tensors["log_probs"].dtype == dtype


def test_a_default_device(tmp_path: Path) -> None:
    """It is read on the CPU, and goes where the tokens are."""
    with torch.device("cpu"):
        tokens, topk = sequence(1)
    with torch.device("meta"):
        with cache.Writer(tmp_path, **SETTINGS) as writer:
            writer.add(tokens, topk)
        found = cache.Cache(tmp_path)
        both = found[0][1], found.batch([0], tokens[None])
    check(both[0], 1)
    assert torch.equal(both[1].ids[0], both[0].ids) and torch.equal(both[1].log_probs[0], both[0].log_probs)


def test_what_a_teacher_gives_in_bfloat16(tmp_path: Path) -> None:
    tokens, topk = sequence(1)
    log_probs = topk.log_probs.bfloat16().requires_grad_()
    with cache.Writer(tmp_path, **SETTINGS) as writer:
        writer.add(tokens, topk._replace(log_probs=log_probs))
    assert torch.equal(cache.Cache(tmp_path)[0][1].log_probs, log_probs.detach().half())


def test_a_sequence_of_no_tokens(tmp_path: Path) -> None:
    """It has its number, so that those of others stay right."""
    empty = torch.zeros(0, dtype=torch.int64)
    with cache.Writer(tmp_path, **SETTINGS) as writer:
        writer.add(empty, fastkd.TopK(torch.zeros(0, K, dtype=torch.int64), torch.zeros(0, K), 2.0))
        writer.add(*sequence(1))
    found = cache.Cache(tmp_path)
    assert len(found[0][1].ids) == 0
    check(found[1][1], 1)


def test_other_tokens_are_refused(tmp_path: Path) -> None:
    """Whatever differs: a token, the length, the order, the mask."""
    write(tmp_path, [4, 2, 9])
    found = cache.Cache(tmp_path)
    input_ids, mask, _, _ = padded([4, 2, 9])
    found.batch([0, 1, 2], input_ids, mask)
    changed, longer, shorter = input_ids.clone(), mask.clone(), mask.clone()
    changed[1, 0] += 1
    longer[2, mask[2].sum()] = True
    shorter[0, mask[0].sum() - 1] = False
    wrong: list[tuple[list[int], torch.Tensor, torch.Tensor | None, str]] = [
        ([0, 1, 2], changed, mask, "row 1 is not what the teacher read as sequence 1"),
        ([0, 1, 2], changed, None, "row 1 is not what the teacher read as sequence 1"),
        ([0, 2, 1], input_ids, mask, "row 1 is not what the teacher read as sequence 2"),
        ([0, 1, 2], input_ids, longer, r"row 2 is not what the teacher read as sequence 2 \(5 tokens\)"),
        ([0, 1, 2], input_ids, shorter, "row 0 is not what the teacher read as sequence 0"),
        ([0, 1, 2], input_ids[:, :4], None, "row 0 is not what the teacher read as sequence 0"),
    ]
    for indices, tokens, given, message in wrong:
        with pytest.raises(ValueError, match=f"input_ids: {message}"):
            found.batch(indices, tokens, given)


def test_what_is_kept_does_not_change(tmp_path: Path) -> None:
    """Tensors of the caller, after they were added; and those that it got."""
    tokens, topk = sequence(1)
    with cache.Writer(tmp_path, **SETTINGS, dtype=torch.float32) as writer:
        writer.add(tokens, topk._replace(ids=topk.ids.to(torch.int32)))
        tokens.zero_(), topk.ids.zero_(), topk.log_probs.zero_()
    found = cache.Cache(tmp_path)
    for tensor in found[0][1][:2]:
        tensor.zero_()
    check(found[0][1], 1, torch.float32)


def test_resuming(tmp_path: Path) -> None:
    """A writer goes on where another stopped, by an exception too; whoever reads meanwhile reads what there was."""
    with pytest.raises(KeyboardInterrupt), cache.Writer(tmp_path, **SETTINGS) as writer:
        writer.add(*sequence(0))
        raise KeyboardInterrupt
    before = cache.Cache(tmp_path)
    with cache.Writer(tmp_path, **SETTINGS) as writer:
        assert len(writer) == 1
        writer.add(*sequence(1))
        assert len(writer) == 2
        assert len(cache.Cache(tmp_path)) == 1  # it is not on disk yet
        writer.flush()
        assert len(cache.Cache(tmp_path)) == 2
    assert len(before) == 1
    for number, (_, topk) in enumerate(cache.Cache(tmp_path)):
        check(topk, number)


def test_resuming_as_another_is_refused(tmp_path: Path) -> None:
    write(tmp_path, [0])
    others = {"k": 2, "temperature": 1.0, "vocab_size": 2**17, "teacher": "another", "tail": "support",
              "dtype": torch.float32, "world_size": 2}  # fmt: skip
    for name, value in others.items():
        with pytest.raises(ValueError, match=r"\w+: got .*, the cache at .* has .*"):
            cache.Writer(tmp_path, **SETTINGS | {name: value})
        with pytest.raises(ValueError, match=r"world_size: got 2, the cache at .* has 1"):
            cache.Writer(tmp_path, **SETTINGS, rank=1, world_size=2)
    check(cache.Cache(tmp_path)[0][1], 0)


def test_several_writers(tmp_path: Path) -> None:
    """Each of its own rank, side by side; the sequences are in the order of a DistributedSampler's indices."""
    writers = [cache.Writer(tmp_path, **SETTINGS, shard_bytes=100, rank=rank, world_size=3) for rank in range(3)]
    assert len(cache.Cache(tmp_path)) == 0
    for number in range(11):
        writers[number % 3].add(*sequence(number))
    writers[0].flush()
    assert len(cache.Cache(tmp_path)) <= 9
    for writer in writers[1:]:
        writer.flush()
    found = cache.Cache(tmp_path)
    assert len(found) == 11
    for number, (_, topk) in enumerate(found):
        check(topk, number)


def test_a_rank_that_is_behind(tmp_path: Path) -> None:
    """What comes before its first missing sequence is there, no more; a rank that has not begun has none."""
    write(tmp_path, [0, 2, 4], rank=0, world_size=2)
    assert len(cache.Cache(tmp_path)) == 1
    write(tmp_path, [1], rank=1, world_size=2)
    found = cache.Cache(tmp_path)
    assert len(found) == 3
    for number, (_, topk) in enumerate(found):
        check(topk, number)


def test_a_cache_can_be_sent_to_a_worker(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    found = cache.Cache(tmp_path)
    check(found[2][1], 2)
    sent = pickle.dumps(found)
    assert len(sent) < 1000
    check(pickle.loads(sent)[2][1], 2)


def test_who_may_read_it(tmp_path: Path) -> None:
    """Who may read any new file, as the user's umask says; whatever a killed writer left."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "shard-0-000000.safetensors.part").touch(0o600)
    write(tmp_path / "cache", range(4))
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in (tmp_path / "cache").iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_there_is_no_cache(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: there is no cache"):
        cache.Cache(tmp_path)


@pytest.mark.parametrize(("settings", "message"), [
    ({"k": 0}, "k, vocab_size: got 0 and 50"),
    ({"k": 51}, "k, vocab_size: got 51 and 50"),
    ({"vocab_size": 2**31}, "k, vocab_size: got"),
    ({"k": 2.5}, "k: got float"),
    ({"temperature": 0.0}, "temperature: got 0.0"),
    ({"tail": "none"}, "tail: got 'none', must be one of 'bucket'"),
    ({"teacher": None}, "teacher: got NoneType, must be a string"),
    ({"shard_bytes": 0}, "shard_bytes: got 0, must be >= 1"),
    ({"world_size": 2.0}, "world_size: got float"),
    ({"rank": 1}, r"rank: got 1, must be in \[0, 1\)"),
    ({"dtype": torch.bfloat16}, "dtype: got torch.bfloat16"),
])  # fmt: skip
def test_bad_settings(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        cache.Writer(tmp_path / "cache", **SETTINGS | settings)
    assert not (tmp_path / "cache").exists()


def test_bad_sequences(tmp_path: Path) -> None:
    tokens, topk = sequence(1)
    hole = torch.tensor([True, False, True, True])
    wrong: list[tuple[Any, Any, Any, str]] = [
        (tokens.float(), topk, None, "input_ids: got torch.float32"),
        (tokens.tolist(), topk, None, "input_ids: got list"),
        (tokens[None, None], topk, None, r"input_ids: got shape \(1, 1, 4\), must be \(batch, length\)"),
        (tokens[:-1], topk, None, r"topk.ids: got shape \(1, 4, 3\), must be \(1, 3, 3\)"),
        (tokens, topk._replace(log_probs=topk.log_probs[:, :2]), None, r"topk.log_probs: got shape \(1, 4, 2\)"),
        (tokens, topk._replace(temperature=1.0), None, "topk: got temperature 1.0 and tail 'bucket', must be .* 2.0"),
        (tokens, topk._replace(tail="support"), None, "topk: got temperature 2.0 and tail 'support'"),
        (tokens, topk._replace(ids=topk.ids + VOCAB), None, r"topk.ids: got \d+ to \d+, must be in \[0, 50\)"),
        (tokens, topk._replace(ids=topk.ids - VOCAB), None, r"topk.ids: got -\d+ to -\d+, must be in \[0, 50\)"),
        (tokens, tuple(topk), None, "topk: got tuple, must be a fastkd.TopK"),
        (tokens, topk._replace(ids=topk.ids.float()), None, "topk.ids: got torch.float32, must be torch.int32 or"),
        (tokens, topk._replace(ids=topk.ids.tolist()), None, "topk.ids: got list, must be a tensor"),
        (tokens, topk._replace(log_probs=topk.ids), None, "topk.log_probs: got torch.int64, must be float32"),
        (tokens, topk._replace(log_probs=-topk.log_probs), None, "log_probs: got probabilities of sum .* in row 0"),
        (tokens, topk._replace(log_probs=topk.log_probs * torch.nan), None, "log_probs: got probabilities of sum nan"),
        (tokens, topk, hole, "mask: row 0 has padding between its tokens"),
        (tokens, topk, hole.long(), r"mask: got torch.int64, must be torch.bool; .* \.bool\(\)"),
    ]
    with cache.Writer(tmp_path, **SETTINGS) as writer:
        for input_ids, given, mask, message in wrong:
            with pytest.raises((ValueError, TypeError), match=message):
                writer.add(input_ids, given, mask)
        assert len(writer) == 0
        writer.add(tokens, topk)
    with pytest.raises(TypeError, match=r"indices: got int, must be a sequence of ints"):
        cache.Cache(tmp_path).batch(0, tokens[None])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"indices: got 2, must be 1, one a row of input_ids"):
        cache.Cache(tmp_path).batch([0, 1], tokens[None])
