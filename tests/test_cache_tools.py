"""Describing, comparing, merging and exporting stores."""

import json
import re
import socket
import weakref
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from cache_stores import create, fill, flip, make_features, sealed
from typer.testing import CliRunner

from cache import (
    FeatureReader,
    FeatureStore,
    Quantized,
    store_diff,
    store_export,
    store_info,
    store_merge,
    store_verify,
)
from cache.blocks import Rows, read_rows
from cache.errors import CorruptShardError, StoreMismatchError
from tinyaudio.cli.app import app

FEATURES = make_features([30] * 7 + [65, 20])
SPLITS = ["train"] * 6 + ["dev"] * 3


def test_info_counts_what_is_stored_and_what_is_not(tmp_path: Path) -> None:
    features = dict(FEATURES)
    features["u3"] = features["u3"] * np.nan
    store = sealed(tmp_path / "store", features, splits=SPLITS)
    info = store_info(store.path)
    assert (info.num_planned, info.num_utterances, info.num_shards, info.is_sealed) == (9, 7, store.num_shards, True)
    assert info.quarantine == {"longer_than_shard": 1, "non_finite": 1}
    assert {name: part["utterances"] for name, part in info.splits.items()} == {"train": 5, "dev": 2}
    assert info.durations["0-1 s"] == 7
    assert info.hours == pytest.approx((6 * 30 + 20) / 50 / 3600)
    assert json.loads(json.dumps(asdict(info)))["num_frames"] == 200
    for words in ("7 utterances", "sealed", "non_finite", "dev", info.fingerprint_id[:12]):
        assert words in info.to_table()


def test_info_of_an_unfinished_store_counts_its_shards(tmp_path: Path) -> None:
    store = create(tmp_path / "store", FEATURES)
    fill(store, FEATURES, [0])
    info = store_info(store.path)
    assert (info.num_committed, info.is_sealed) == (1, False)
    assert f"1 of {store.num_shards} shards, not sealed" in info.to_table()


def test_diff_names_the_fields_that_differ(tmp_path: Path) -> None:
    sealed(tmp_path / "a", FEATURES)
    sealed(tmp_path / "b", FEATURES, fingerprint={"encoder": {"id": "tiny", "layer": 4}})
    assert store_diff(tmp_path / "a", tmp_path / "a") == {}
    assert store_diff(tmp_path / "a", tmp_path / "b")["fingerprint.encoder.layer"] == (3, 4)


@pytest.mark.parametrize("encoding", ["float16", "int8", "int4"])
def test_parts_made_on_three_machines_merge_into_the_store_of_one(tmp_path: Path, encoding: str) -> None:
    whole = sealed(tmp_path / "whole", FEATURES, encoding=encoding)
    parts = [create(tmp_path / f"part{i}", FEATURES, encoding=encoding) for i in range(3)]
    for i, part in enumerate(parts):
        fill(part, FEATURES, part.pending_shards(part=(i, 3)))
    first = store_merge(tmp_path / "merged", [parts[0].path, parts[1].path])
    assert first.pending == list(range(2 * whole.num_shards // 3, whole.num_shards))
    second = store_merge(tmp_path / "merged", [part.path for part in parts])
    assert (second.adopted, second.present, second.pending) == (first.pending, first.adopted, [])
    merged = FeatureStore.open(tmp_path / "merged")
    assert merged.is_sealed
    assert store_verify(merged, deep=True) == []
    for shard in range(whole.num_shards):
        for name in whole.layout.files_of(shard, whole.header):
            assert (merged.path / name).read_bytes() == (whole.path / name).read_bytes()


def run(*words: object) -> str:
    """Run a command; returns its output."""
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False).output


@pytest.mark.parametrize("how", ["merge", "export", "export of some"])
def test_the_same_command_repairs_a_damaged_merged_or_exported_store(tmp_path: Path, how: str) -> None:
    source = sealed(tmp_path / "a source", FEATURES)
    command = {
        "merge": ["merge", tmp_path / "made", source.path],
        "export": ["export", source.path, tmp_path / "made"],
        "export of some": ["export", source.path, tmp_path / "made", "--max-hours", 0.0005, "--seed", 1],
    }[how]
    run("store", *command)
    made = FeatureStore.open(tmp_path / "made")
    before = {path.name: path.read_bytes() for path in (made.path / "features").iterdir()}
    flip(made.layout.array("features", 0), 7)
    with pytest.raises(CorruptShardError, match="the `tinyaudio extract`, `store merge` or `store export` command"):
        FeatureReader(made).read([0])
    run("store", *command)
    assert store_verify(made, deep=True) == []
    assert {path.name: path.read_bytes() for path in (made.path / "features").iterdir()} == before


def test_the_message_of_a_damaged_extracted_store_names_the_command(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", FEATURES)
    (store.path / "recipe.toml").write_text("")
    store.layout.array("features", 0).unlink()
    command = f"tinyaudio extract --recipe {store.path}/recipe.toml --store {store.path}"
    for request, options in ("{}", ""), ('{"splits": ["train", "dev"]}', ""), ('{"splits": ["dev"]}', " --split dev"):
        (store.path / "request.json").write_text(request)
        with pytest.raises(CorruptShardError, match=re.escape(f"Run `{command}{options}` again")):
            FeatureReader(store)


def test_an_export_reads_one_utterance_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sealed(tmp_path / "store", FEATURES)
    held: list[weakref.ref[object]] = []
    most = 0

    def counted(*args: object) -> Rows:
        nonlocal most
        rows = read_rows(*args)  # type: ignore[arg-type]
        held.append(weakref.ref(rows))
        most = max(most, sum(each() is not None for each in held))
        return rows

    monkeypatch.setattr("cache.reader.read_rows", counted)
    store_export(source.path, tmp_path / "small")
    assert len(held) == 8
    assert most <= 2


def test_info_names_machines_without_their_namespace(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", FEATURES)
    assert list(store_info(store.path).writers) == [re.sub("[^A-Za-z0-9.-]", "-", socket.gethostname())]


def test_info_without_the_list_of_rejected_utterances_says_so_in_one_line(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", FEATURES)
    store.layout.rejected.unlink()
    with pytest.raises(CorruptShardError, match=r"quarantine/plan\.jsonl cannot be read"):
        store_info(store.path)


def test_verify_prints_faults_as_they_are_found_and_no_bar_where_there_is_no_terminal(tmp_path: Path) -> None:
    store = sealed(tmp_path / "store", FEATURES)
    flip(store.layout.array("features", 1), 7)
    result = CliRunner().invoke(app, ["store", "verify", str(store.path), "--deep"])
    assert result.exit_code == 1
    assert "features/c.1.0 (shard 1): chunk 0 is not the one that was committed" in result.stdout
    assert result.stderr.splitlines() == [f"tinyaudio: 1 fault in {store.path}"]


def test_merging_another_extraction_is_refused(tmp_path: Path) -> None:
    sealed(tmp_path / "a", FEATURES)
    sealed(tmp_path / "b", FEATURES, fingerprint={"encoder": "other"})
    with pytest.raises(StoreMismatchError, match=r"fingerprint\.encoder"):
        store_merge(tmp_path / "a", [tmp_path / "b"])


def test_a_damaged_shard_is_not_adopted(tmp_path: Path) -> None:
    source = sealed(tmp_path / "a", FEATURES)
    flip(source.layout.array("features", 1), 7)
    with pytest.raises(CorruptShardError, match="shard 1"):
        store_merge(tmp_path / "merged", [source.path])
    merged = FeatureStore.open(tmp_path / "merged")
    assert merged.committed_shards() == [0]
    assert store_verify(merged, deep=True) == []


@pytest.mark.parametrize("encoding", ["float16", "int8", "int4"])
def test_an_exported_subset_holds_the_same_bits(tmp_path: Path, encoding: str) -> None:
    source = sealed(tmp_path / "store", FEATURES, splits=SPLITS, encoding=encoding)
    reader = FeatureReader(source)
    subset = FeatureReader(store_export(source.path, tmp_path / "small", split="dev"))
    assert set(subset.index["utterance_id"].to_pylist()) == {"u6", "u8"}
    for utterance_id in ("u6", "u8"):
        mine, theirs = subset.get(utterance_id), reader.get(utterance_id)
        if isinstance(mine, Quantized):
            np.testing.assert_array_equal(mine.codes, theirs.codes)
            np.testing.assert_array_equal(mine.scales, theirs.scales)
        else:
            np.testing.assert_array_equal(mine, theirs)
    assert subset.store.fingerprint == source.fingerprint
    for column in ("transcript", "num_samples", "duration_s", "speaker", "split"):
        wanted = dict(zip(reader.index["utterance_id"].to_pylist(), reader.index[column].to_pylist(), strict=True))
        for name, value in zip(subset.index["utterance_id"].to_pylist(), subset.index[column].to_pylist(), strict=True):
            assert value == wanted[name]


def test_an_export_is_limited_by_split_and_hours_and_repeatable(tmp_path: Path) -> None:
    source = sealed(tmp_path / "store", FEATURES, splits=SPLITS)
    small = store_export(source.path, tmp_path / "small", split="train", max_hours=2.0 / 3600, seed=5)
    index = FeatureReader(small).index
    assert set(index["split"].to_pylist()) == {"train"}
    assert len(index) == 3
    again = store_export(source.path, tmp_path / "again", split="train", max_hours=2.0 / 3600, seed=5)
    assert index["utterance_id"].to_pylist() == FeatureReader(again).index["utterance_id"].to_pylist()
    with pytest.raises(ValueError, match="no utterance"):
        store_export(source.path, tmp_path / "none", max_hours=0.0)
