"""What is worked out from a store is worked out once, kept beside it, and never trusted blindly."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cache_stores import create, fill, make_features

from cache import FeatureReader, FeatureStore
from pipelines.train import batches as batches_module
from pipelines.train.batches import stored_targets, tokenize
from pipelines.train.derived import remembered
from tinyaudio.model.prompt import transcript_ids

LENGTHS = [5, 60, 17, 33, 1, 48, 25, 9] * 4


@pytest.fixture
def store(tmp_path):
    features = make_features(LENGTHS)
    fill(create(tmp_path / "store", features, rows_per_shard=512), features)
    return FeatureStore.open(tmp_path / "store")


def kept(store: FeatureStore) -> list[Path]:
    return sorted((store.path / "derived").glob("*.npz"))


def never(*_: object) -> dict[str, np.ndarray]:
    pytest.fail("worked out again")


def test_second_start_works_nothing_out(store, tokenizer, monkeypatch):
    first, again = [], []
    expected = stored_targets(FeatureReader(FeatureStore.open(store.path), split="train"), tokenizer, first.append)
    monkeypatch.setattr(batches_module, "tokenize", never)
    found = stored_targets(FeatureReader(FeatureStore.open(store.path), split="train"), tokenizer, again.append)
    assert np.array_equal(expected.ids, found.ids)
    assert np.array_equal(expected.offsets, found.offsets)
    assert len(first) == 1
    assert "are not there yet" in first[0]
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
def test_damaged_file_is_worked_out_again_with_a_line(store, tokenizer, damage):
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
    assert lines == [
        f"warning: the token-ids of {store.path} cannot be kept there (Permission denied); every start works them out"
    ]
    assert not kept(store)


def test_store_that_grows_asks_again(store):
    answers = iter([{"n": np.array([1])}, {"n": np.array([2])}])
    assert remembered(store, "number", {}, lambda: next(answers), lambda _: None)["n"] == [1]
    moved = store.path / "commits.aside"
    moved.mkdir()
    shutil.move(store.layout.commit(0), moved)
    assert remembered(store, "number", {}, lambda: next(answers), lambda _: None)["n"] == [2]


def test_one_process_works_it_out_while_the_other_waits(store, tmp_path):
    """Both begin at once; the work takes a while and leaves a mark each time it is done."""
    script = """
import sys, time, uuid
from pathlib import Path
import numpy as np
from cache import FeatureStore
from pipelines.train.derived import remembered
def work():
    (Path(sys.argv[2]) / uuid.uuid4().hex).touch()
    time.sleep(1.5)
    return {"n": np.arange(3)}
Path(sys.argv[2], "ready" + sys.argv[3]).touch()
while len(list(Path(sys.argv[2]).glob("ready*"))) < 2:
    time.sleep(0.01)
assert remembered(FeatureStore.open(sys.argv[1]), "number", {}, work, print)["n"].tolist() == [0, 1, 2]
"""
    marks = tmp_path / "marks"
    marks.mkdir()
    command = [sys.executable, "-c", script, str(store.path), str(marks)]
    both = [subprocess.Popen([*command, name]) for name in "ab"]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert len([path for path in marks.iterdir() if not path.name.startswith("ready")]) == 1


def test_batched_tokens_are_those_of_one_transcript_at_a_time(tokenizer, monkeypatch):
    monkeypatch.setattr(batches_module, "TOKENIZED_AT_ONCE", 3)
    texts = ["the cat sat", "", "  on the mat ", "a dog", "\n", "the dog", "a cat and a dog"]
    targets = tokenize(tokenizer, texts)
    assert [targets[i].tolist() for i in range(len(texts))] == [transcript_ids(tokenizer, text) for text in texts]
