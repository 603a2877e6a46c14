"""Token ids are computed once for a store, kept with it, and computed again when they are damaged."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cache_stores import create, fill, make_features

from cache import FeatureReader, FeatureStore
from pipelines.train import targets as targets_module
from pipelines.train.model import load_tokenizer
from pipelines.train.targets import stored_targets, tokenize
from tinyaudio.model.prompt import many_transcript_ids, transcript_ids

LENGTHS = [5, 60, 17, 33, 1, 48, 25, 9] * 4


@pytest.fixture
def store(tmp_path):
    features = make_features(LENGTHS)
    fill(create(tmp_path / "store", features, rows_per_shard=512), features)
    return FeatureStore.open(tmp_path / "store")


def kept(store: FeatureStore) -> list[Path]:
    return sorted((store.path / "derived").glob("*.npz"))


def never(*_: object) -> dict[str, np.ndarray]:
    pytest.fail("computed again")


def test_second_start_computes_nothing(store, tokenizer, monkeypatch):
    first, again = [], []
    expected = stored_targets(FeatureReader(FeatureStore.open(store.path), split="train"), tokenizer, first.append)
    monkeypatch.setattr(targets_module, "tokenize", never)
    found = stored_targets(FeatureReader(FeatureStore.open(store.path), split="train"), tokenizer, again.append)
    assert np.array_equal(expected.ids, found.ids)
    assert np.array_equal(expected.offsets, found.offsets)
    assert len(first) == 1
    assert first[0] == f"tokenizing the train transcripts of {store.path}"
    assert again == []


def test_another_tokenizer_or_split_is_another_question(store, tokenizer):
    reader = FeatureReader(store, split="train")
    stored_targets(reader, tokenizer, lambda _: None)
    stored_targets(FeatureReader(store), tokenizer, lambda _: None)
    before = tokenizer.eos_token
    try:
        tokenizer.eos_token = tokenizer.pad_token
        ends = stored_targets(reader, tokenizer, lambda _: None)
        assert ends[0][-1] == tokenizer.pad_token_id
    finally:
        tokenizer.eos_token = before
    assert len(kept(store)) == 3


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_damaged_file_is_computed_again_with_a_line(store, tokenizer, damage):
    reader = FeatureReader(store, split="train")
    expected = stored_targets(reader, tokenizer, lambda _: None)
    (path,) = kept(store)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 1
    path.write_bytes({"flip": bytes(content), "truncate": bytes(content[:middle]), "empty": b""}[damage])
    lines: list[str] = []
    found = stored_targets(reader, tokenizer, lines.append)
    assert np.array_equal(found.ids, expected.ids)
    assert "are damaged" in lines[0]
    assert stored_targets(reader, tokenizer, never) is not None


def test_store_that_cannot_be_written_to_warns_and_works(store, tokenizer, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    lines: list[str] = []
    reader = FeatureReader(store, split="train")
    targets = stored_targets(reader, tokenizer, lines.append)
    assert len(targets.lengths) == len(reader)
    assert "tokenizing the train transcripts" in lines[0]
    (warning,) = lines[1:]
    assert warning.startswith(f"warning: cannot keep token ids in {store.path / 'derived'} (Permission denied)")
    assert not kept(store)


def test_store_that_grows_asks_again(store, tokenizer):
    before = stored_targets(FeatureReader(store, split="train"), tokenizer, lambda _: None)
    moved = store.path / "commits.aside"
    moved.mkdir()
    shutil.move(store.layout.commit(0), moved)
    smaller = stored_targets(FeatureReader(FeatureStore.open(store.path), split="train"), tokenizer, lambda _: None)
    assert len(smaller.lengths) < len(before.lengths)
    assert len(kept(store)) == 2


def test_processes_that_start_together_keep_one_whole_file(store, tokenizer):
    """Both may do the work; what they write is the same, and each file is replaced as a whole."""
    readers = [FeatureReader(FeatureStore.open(store.path), split="train") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda reader: stored_targets(reader, tokenizer, lambda _: None), readers))
    assert all(np.array_equal(one.ids, found[0].ids) for one in found)
    assert len(kept(store)) == 1
    assert np.array_equal(stored_targets(readers[0], tokenizer, never).ids, found[0].ids)
    assert [path.suffix for path in (store.path / "derived").iterdir()] == [".npz"]


def test_batched_tokens_are_those_of_one_transcript_at_a_time(tokenizer, monkeypatch):
    monkeypatch.setattr(targets_module, "TOKENIZED_AT_ONCE", 3)
    texts = ["the cat sat", "", "  on the mat ", "a dog", "\n", "the dog", "a cat and a dog"]
    targets = tokenize(tokenizer, texts)
    assert [targets[i].tolist() for i in range(len(texts))] == [transcript_ids(tokenizer, text) for text in texts]


def test_the_text_of_a_special_token_is_text(tokenizer):
    """It would end the target in its middle, and never be written."""
    end = tokenizer.eos_token_id
    for text in ("<|end_of_text|>", "he said <|end_of_text|> twice <|end_of_text|>", "<|finetune_right_pad_id|> x"):
        ids = transcript_ids(tokenizer, text)
        assert ids.index(end) == len(ids) - 1
        assert tokenizer.pad_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True).strip() == text
        assert tokenize(tokenizer, [text])[0].tolist() == ids


def test_ordinary_transcripts_keep_their_ids(tokenizer):
    real = load_tokenizer("pipelines/demo/decoder")
    rows = pq.read_table(next(Path("pipelines/demo/corpus").glob("test-0*.parquet")), columns=["text"])
    texts = [*rows["text"].to_pylist(), "", "It's 3.5 % <i>of</i> x|y <| end >", "caf\u00e9 \u4f60\u597d\U0001f600"]
    for one in (tokenizer, real):
        plain = one([" " + text if text else "" for text in texts], add_special_tokens=False)["input_ids"]
        assert many_transcript_ids(one, texts) == [[*ids, one.eos_token_id] for ids in plain]
