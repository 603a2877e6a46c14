"""Stage two's batches: a pure function of their number, padded within a budget, every utterance once an epoch."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cache_stores import create, fill, make_features
from transformers import PreTrainedTokenizerFast

from cache import FeatureReader, Quantized
from pipelines.errors import RunError
from pipelines.train.batches import Dequantizer, TrainingBatches, collate, cut_by_budget, positions_needed
from pipelines.train.targets import tokenize
from tinyaudio.model.modeling_tinyaudio import IGNORED_LABEL

LENGTHS = [5, 60, 17, 33, 1, 48, 25, 9, 40, 12, 55, 21] * 8
STACK_FACTOR, BUDGET = 5, 256


def open_batches(
    path: Path, tokenizer: PreTrainedTokenizerFast, encoding: str = "float16", **options: object
) -> TrainingBatches:
    if not path.exists():
        features = make_features(LENGTHS)
        fill(create(path, features, rows_per_shard=512, encoding=encoding), features)
    reader = FeatureReader(path, split="train")
    targets = tokenize(tokenizer, reader.index["transcript"].to_pylist())
    costs = positions_needed(reader, targets, tokenizer, STACK_FACTOR)
    settings = {"budget": BUDGET, "seed": 0, "num_batches": 60} | options
    return TrainingBatches(reader, targets, costs, **settings)


def ids(batches: TrainingBatches, number: int) -> list[str]:
    return batches[number]["utterance_ids"]


def test_any_batch_is_the_same_whatever_came_before(tmp_path, tokenizer):
    in_order = open_batches(tmp_path / "store", tokenizer)
    expected = [ids(in_order, number) for number in range(60)]
    resumed = open_batches(tmp_path / "store", tokenizer)
    assert [ids(resumed, number) for number in (41, 7, 59, 0, 42)] == [expected[n] for n in (41, 7, 59, 0, 42)]


def test_an_epoch_brings_every_utterance_once_and_the_next_in_another_order(tmp_path, tokenizer):
    batches = open_batches(tmp_path / "store", tokenizer)
    per_epoch = batches._length(0)
    first = [batches.positions(number) for number in range(per_epoch)]
    second = [batches.positions(number) for number in range(per_epoch, per_epoch + batches._length(1))]
    for epoch in (first, second):
        assert sorted(position for batch in epoch for position in batch) == list(range(len(LENGTHS)))
    assert first != second


def test_coverage_names_the_epochs_or_the_share_and_the_hours(tmp_path, tokenizer):
    batches = open_batches(tmp_path / "store", tokenizer)
    epoch = next(n for n in range(1, 60) if sum(len(batches.positions(i)) for i in range(n)) == len(LENGTHS))
    epoch_h = sum(batches.reader.column("duration_s").to_pylist()) / 3600
    twice = open_batches(tmp_path / "store", tokenizer, num_batches=2 * epoch).coverage(accumulate=2)
    assert twice == (
        f"{epoch} steps of 256 positions x 2 batches are about {2 * epoch_h:.1f} h of audio: 2.0 epochs of the "
        f"{epoch_h:.1f} h in split 'train'"
    )
    part = open_batches(tmp_path / "store", tokenizer, num_batches=3).coverage(accumulate=1)
    assert f": {300 / epoch:.0f} % of the " in part


def test_another_seed_is_another_order(tmp_path, tokenizer):
    one = open_batches(tmp_path / "store", tokenizer)
    other = open_batches(tmp_path / "store", tokenizer, seed=1)
    assert [one.positions(n) for n in range(8)] != [other.positions(n) for n in range(8)]


def test_no_batch_exceeds_the_budget_with_its_padding(tmp_path, tokenizer):
    batches = open_batches(tmp_path / "store", tokenizer)
    for number in range(batches._length(0)):
        costs = batches.costs[batches.positions(number)]
        assert len(costs) * costs.max() <= BUDGET


def test_ranks_see_the_batches_that_one_process_sees(tmp_path, tokenizer):
    whole = open_batches(tmp_path / "store", tokenizer)
    ranks = [open_batches(tmp_path / "store", tokenizer, world_size=2) for _ in range(2)]
    shared = [ids(ranks[number % 2], number) for number in range(60)]
    assert shared == [ids(whole, number) for number in range(60)]


def test_rows_behind_an_end_are_zero_and_labels_behind_it_are_ignored(tmp_path, tokenizer):
    batches = open_batches(tmp_path / "store", tokenizer)
    by_length = np.argsort(batches.reader.num_frames, kind="stable")
    shortest, longest = int(by_length[0]), int(by_length[-1])
    batch = collate(batches.reader, batches.targets, [shortest, longest])
    assert batch["features"].shape[:2] == (2, 60)
    assert batch["num_frames"].tolist() == [1, 60]
    assert batch["features"][0, :1].any()
    assert not batch["features"][0, 1:].any()
    length = len(batches.targets[shortest])
    assert (batch["labels"][0, length:] == IGNORED_LABEL).all()
    assert batch["labels"][0, length - 1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("encoding", "dtype", "width"), [("int8", torch.int8, 8), ("int4", torch.uint8, 4), ("int3", torch.uint8, 3)]
)
def test_codes_become_features_on_the_device_as_the_reader_would_decode_them(
    tmp_path, tokenizer, encoding, dtype, width
):
    batches = open_batches(tmp_path / "store", tokenizer, encoding=encoding)
    batch = collate(batches.reader, batches.targets, [3, 4, 1])
    assert (batch["features"].dtype, batch["features"].shape[2]) == (dtype, width)
    features = Dequantizer(batches.reader)(batch)
    for row, position, count in zip(features, [3, 4, 1], batch["num_frames"], strict=True):
        stored = batches.reader.read([position])[0]
        assert isinstance(stored, Quantized)
        np.testing.assert_allclose(row[:count].numpy(), stored.dequantize(), rtol=1e-5, atol=1e-6)
        assert not row[count:].any()


def test_an_utterance_beyond_the_budget_is_one_line_before_training(tmp_path, tokenizer):
    with pytest.raises(RunError, match=r"decoder positions; expected at most 8. Raise train.batch_tokens"):
        open_batches(tmp_path / "store", tokenizer, budget=8)


def test_chosen_utterances_are_the_only_ones(tmp_path, tokenizer):
    chosen = np.array([2, 3, 5, 7])
    batches = open_batches(tmp_path / "store", tokenizer, chosen=chosen, num_batches=20)
    assert {position for number in range(20) for position in batches.positions(number)} == set(chosen.tolist())


@pytest.mark.parametrize("encoding", ["float16", "int8", "int4"])
def test_jitter_drops_first_frames_and_nothing_else_the_same_way_each_time(tmp_path, tokenizer, encoding):
    plain = open_batches(tmp_path / "store", tokenizer, encoding)
    jittered = open_batches(tmp_path / "store", tokenizer, encoding, jitter_frames=4)
    again = open_batches(tmp_path / "store", tokenizer, encoding, jitter_frames=4)
    lost = set()
    for number in (13, 2, 30):
        whole, part = plain[number], jittered[number]
        torch.testing.assert_close(part["features"], again[number]["features"])
        assert torch.equal(whole["labels"], part["labels"])
        before, after = Dequantizer(plain.reader)(whole), Dequantizer(plain.reader)(part)
        for i, (long, short) in enumerate(zip(whole["num_frames"], part["num_frames"], strict=True)):
            assert short >= 1
            torch.testing.assert_close(after[i, :short], before[i, long - short : long])
            lost.add(int(long - short))
    assert lost == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("budget", [60, 100, 1_000])
def test_cuts_keep_order_lose_nothing_and_stay_within_the_budget(budget):
    costs = np.sort(np.random.default_rng(0).integers(1, 60, 200))
    batches = cut_by_budget(np.arange(200), costs, budget)
    assert np.concatenate(batches).tolist() == list(range(200))
    assert all(len(batch) * costs[batch].max() <= budget for batch in batches)
