"""Stage one on tiny random parts: nothing lost, nothing twice, the same rows whoever computes them."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file, save_file

from cache import Calibration, FeatureReader, FeatureStore, ShardWriter, store_merge
from cache.durable import Owner
from cache.errors import DiskFullError, StoreMismatchError
from cache.quantize import Quantized, quantize
from pipelines import calibrating, decoding, disk_room, shard_line
from pipelines.corpora import open_corpus
from pipelines.encoding import EncoderLine, cut_batches, quantize_tensor
from pipelines.errors import CorpusError, DiskError, PipelineError, RunError, TooManyBadError
from pipelines.extract import extract, join, wanted_splits
from pipelines.extraction_request import finished
from pipelines.identity import open_encoder
from pipelines.recipes import EncoderSection, load_recipe
from pipelines.runs import Run
from pipelines.torchrun import Place
from pipelines.train import train
from tinyaudio import cli
from tinyaudio.encoder import encode, encoder_inputs

ROOT = Path(__file__).parents[1]


def stage_one(recipe_file: Path, store: Path, *overrides: str, split: str | None = None, **options):
    recipe = load_recipe(str(recipe_file), overrides)
    splits, _ = wanted_splits(recipe, open_corpus(recipe.corpus), split)
    return extract(recipe, store, splits=splits, device="cpu", **options)


def content(store: Path) -> dict[str, np.ndarray]:
    reader = FeatureReader(store)
    stored = {i: reader.get(i) for i in reader.index["utterance_id"].to_pylist()}
    return {i: one.dequantize() if isinstance(one, Quantized) else one for i, one in stored.items()}


def same_content(one: Path, other: Path) -> bool:
    a, b = content(one), content(other)
    return a.keys() == b.keys() and all(np.array_equal(a[i], b[i]) for i in a)


def quarantine_of(store: Path) -> dict[str, str]:
    lines = [line for path in sorted((store / "quarantine").glob("*.jsonl")) for line in path.read_text().splitlines()]
    return {entry["utterance_id"]: entry["reason"] for entry in map(json.loads, lines)}


@pytest.fixture
def store(recipe_file, tmp_path):
    stage_one(recipe_file, tmp_path / "store")
    return tmp_path / "store"


# ------------------------------------------------------------------------------------------- the same, whoever works


def test_decoding_processes_store_what_threads_store(recipe_file, store, tmp_path):
    stage_one(recipe_file, tmp_path / "processes", "extract.decode_workers=2")
    assert same_content(store, tmp_path / "processes")


def test_parts_write_disjoint_shards_of_one_plan_and_the_last_one_seals(recipe_file, store, tmp_path):
    reports = [stage_one(recipe_file, tmp_path / "parts", part=(i, 3)) for i in range(3)]
    assert [report.is_complete for report in reports] == [False, False, True]
    assert sum(report.shards_written for report in reports) == reports[0].shards_total
    assert same_content(store, tmp_path / "parts")


def test_helping_others_reports_shares_that_are_shares(recipe_file, tmp_path):
    report = stage_one(recipe_file, tmp_path / "store", group=Place(0, 2))
    assert report.is_complete
    assert report.shards_written == report.shards_total
    assert 0 < report.encoder_busy <= 1.01


def test_only_the_first_of_a_group_prepares_and_the_others_join(recipe_file, store, tmp_path, monkeypatch):
    stage_one(recipe_file, tmp_path / "group", part=(0, 3))
    for what in ("prepare", "store_repair", "plan_corpus"):
        monkeypatch.setattr(f"pipelines.extract.{what}", lambda *_, **__: pytest.fail("that is the first one's work"))
    assert stage_one(recipe_file, tmp_path / "group", group=Place(1, 2)).is_complete
    assert same_content(store, tmp_path / "group")


def test_joining_with_another_encoder_is_refused(recipe_file, store, tmp_path, encoder_folder):
    other = shutil.copytree(encoder_folder, tmp_path / "other" / encoder_folder.name)
    weights = load_file(other / "model.safetensors")
    save_file({**weights, min(weights): weights[min(weights)] + 1}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(StoreMismatchError, match="weights"):
        join(load_recipe(str(recipe_file), [f"encoder.id={other}"]), store)


@pytest.mark.slow  # two interpreters with torch each, half a minute
def test_torchrun_with_two_processes_stores_what_one_stores(recipe_file, store, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--standalone"]
    arguments = ["-m", "tinyaudio", "extract", "--recipe", recipe_file, "--store", tmp_path / "group", "--json"]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*launcher, *map(str, arguments)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
            timeout=300,
        )

    done = run()
    assert done.returncode == 0, done.stderr
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == 1
    assert reports[0]["is_complete"]
    assert reports[0]["utterances"] == 48
    assert same_content(store, tmp_path / "group")
    again = run()
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("stored ") == 1, "every process spoke, or none"


@pytest.fixture(scope="module")
def ray_extract():
    pytest.importorskip("ray", reason="the optional extra `ray` is not installed")
    from pipelines.ray_extract import ray_extract

    return ray_extract


@pytest.mark.slow  # a Ray cluster of this machine, half a minute
def test_ray_with_two_actors_stores_what_one_process_stores(ray_extract, recipe_file, store, tmp_path):
    recipe = load_recipe(str(recipe_file))
    report = ray_extract(recipe, tmp_path / "ray", splits=["train", "dev"], num_actors=2)
    assert report.is_complete
    assert report.shards_written == report.shards_total
    assert same_content(store, tmp_path / "ray")


@pytest.mark.slow
def test_ray_goes_on_after_an_actor_was_lost(ray_extract, recipe_file, store, tmp_path):
    """The process behind the first claim is killed, as a spot machine is taken away."""
    killed = []

    def kill_who_claims() -> None:
        while not killed:
            time.sleep(0.001)
            for claim in (tmp_path / "ray" / "claims").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    killed.append(Owner.parse(claim.read_text()).pid)
                    os.kill(killed[0], signal.SIGKILL)
                    return

    killer = threading.Thread(target=kill_who_claims, daemon=True)
    killer.start()
    report = ray_extract(load_recipe(str(recipe_file)), tmp_path / "ray", splits=["train", "dev"], num_actors=1)
    assert killed
    assert report.is_complete
    assert same_content(store, tmp_path / "ray")


@pytest.mark.slow
def test_what_fails_in_an_actor_is_one_line(ray_extract, recipe_file, corpus_folder, tmp_path):
    spoil(corpus_folder, 20)
    with pytest.raises(PipelineError, match=r"^[^\n]* of 48 utterances are bad so far: [^\n]* undecodable[^\n]*$"):
        ray_extract(load_recipe(str(recipe_file)), tmp_path / "ray", splits=["train", "dev"], num_actors=1, max_bad=0.1)


def test_ray_hands_out_devices_itself(recipe_file, tmp_path):
    pytest.importorskip("ray", reason="the optional extra `ray` is not installed")
    from pipelines.ray_extract import ray_extract

    with pytest.raises(PipelineError, match="expected auto, cpu, cuda"):
        ray_extract(load_recipe(str(recipe_file)), tmp_path, splits=["train"], num_actors=1, device="cuda:1")


def test_ray_absent_is_one_line(recipe_file, tmp_path, monkeypatch):
    from pipelines.ray_extract import ray_extract

    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PipelineError, match=r"tinyaudio\[ray\]"):
        ray_extract(load_recipe(str(recipe_file)), tmp_path / "ray", splits=["train"], num_actors=2)


# ------------------------------------------------------------------------------------------- again


def test_a_finished_store_answers_without_torch(recipe_file, store):
    script = (
        "import sys; from pathlib import Path; from pipelines.extraction_request import finished\n"
        "from pipelines.recipes import load_recipe\n"
        f"report = finished(load_recipe({str(recipe_file)!r}), Path({str(store)!r}))\n"
        "assert report.is_complete and report.utterances == 48, report\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


def test_another_question_is_not_answered_by_a_finished_store(recipe_file, store):
    assert finished(load_recipe(str(recipe_file)), store) is not None
    assert finished(load_recipe(str(recipe_file)), store, "dev") is None
    assert finished(load_recipe(str(recipe_file), ["corpus.max_duration_s=2.0"]), store) is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "swap", "record"])
def test_extracting_again_repairs_exactly_the_damaged_shards(recipe_file, store, tmp_path, damage):
    undamaged = tmp_path / "undamaged"
    shutil.copytree(store, undamaged)
    first, second = store / "features" / "c.0.0", store / "features" / "c.1.0"
    if damage == "flip":
        data = bytearray(first.read_bytes())
        data[1000] ^= 1
        first.write_bytes(data)
    elif damage == "truncate":
        os.truncate(first, 100)
    elif damage == "delete":
        first.unlink()
    elif damage == "swap":
        first.rename(tmp_path / "aside"), second.rename(first), (tmp_path / "aside").rename(second)
    else:
        (store / "commits" / "000000.json").write_text("{}")
    untouched = (store / "features" / "c.2.0").stat().st_mtime_ns
    report = stage_one(recipe_file, store)
    assert report.is_complete
    lost = {"swap": 2, "record": 0}.get(damage, 1)  # a lost record comes back from the seal
    assert (report.shards_written, report.shards_repaired) == (lost, lost)
    assert (f"{lost} found damaged" in str(report)) == (lost > 0)
    assert (store / "features" / "c.2.0").stat().st_mtime_ns == untouched
    assert same_content(store, undamaged)
    assert stage_one(recipe_file, store).shards_written == 0


def test_an_unfinished_store_goes_on_without_listing_the_corpus_again(recipe_file, tmp_path, monkeypatch):
    stage_one(recipe_file, tmp_path / "store", part=(0, 2))
    monkeypatch.setattr("pipelines.extract.plan_corpus", lambda *_: pytest.fail("the corpus was listed again"))
    assert stage_one(recipe_file, tmp_path / "store").is_complete


# ------------------------------------------------------------------------------------------- bad data


def test_a_corpus_of_bad_rows_is_quarantined_row_by_row(recipe_file, tmp_path, noise):
    """Parquet as of LoquaciousSet with every kind of bad row between good ones."""
    rows = [parquet_row(f"good-{i}", wav(noise(1.0)), 1.0, "the cat") for i in range(20)]
    bad = {
        "dead": (None, 1.0, "the cat", "no_audio"),
        "text-not-audio": (b"this is no audio", 1.0, "the cat", "undecodable"),
        "cut-header": (wav(noise(1.0))[:30], 1.0, "the cat", "undecodable"),
        "lies-long": (wav(noise(0.5)), 3.0, "the cat", "other_duration"),
        "lies-short": (wav(noise(3.0)), 1.0, "the cat", "other_duration"),
        "nan": (wav(np.full(16_000, np.nan, np.float32), "FLOAT"), 1.0, "the cat", "undecodable"),
        "empty-text": (wav(noise(1.0)), 1.0, " ", "no_text"),
        "null-text": (wav(noise(1.0)), 1.0, None, "no_text"),
        "novel": (wav(noise(1.0)), 1.0, "word " * 400, "text_too_long"),
        "long": (wav(noise(6.0)), 6.0, "the cat", "too_long"),
        "short": (wav(noise(0.05)), 0.05, "the cat", "too_short"),
        "unstated-short": (wav(noise(0.05)), None, "the cat", "too_short"),
        "good-3": (wav(noise(1.0)), 1.0, "the cat", "duplicate_id"),
    }
    rows += [parquet_row(name, audio, duration, text) for name, (audio, duration, text, _) in bad.items()]
    write_parquet(tmp_path / "bad" / "train-00000-of-00001.parquet", rows[::-1])
    report = stage_one(
        recipe_file, tmp_path / "store", f"corpus.path={tmp_path / 'bad'}", "corpus.max_duration_s=5.0", max_bad=0.4
    )
    assert report.is_complete
    assert report.utterances == 20
    assert quarantine_of(tmp_path / "store") == {name: reason for name, (_, _, _, reason) in bad.items()}
    assert {f"good-{i}" for i in range(20)} == set(content(tmp_path / "store"))
    assert sum(report.quarantined.values()) + sum(report.planned_out.values()) == len(bad)


def test_features_that_are_not_finite_are_quarantined(recipe_file, corpus_folder, tmp_path, monkeypatch):
    whole = shard_line.EncoderLine.encode

    def poisoned(self, inputs):
        features, seconds = whole(self, inputs).read()
        features[0][0, 0] = np.nan
        return SimpleNamespace(read_stored=lambda: (features, seconds))

    monkeypatch.setattr(shard_line.EncoderLine, "encode", poisoned)
    report = stage_one(recipe_file, tmp_path / "store", max_bad=1.0)
    assert set(report.quarantined) == {"non_finite"}
    assert report.utterances + report.quarantined["non_finite"] == 48


def test_a_handful_of_bad_recordings_stops_nothing_unless_max_bad_says_so(recipe_file, corpus_folder, tmp_path):
    for path in sorted((corpus_folder / "train").glob("*.wav"))[:3]:
        path.write_bytes(b"no audio")
    with pytest.raises(TooManyBadError, match=r"3 of 48 .*3 undecodable; expected at most 5 %"):
        stage_one(recipe_file, tmp_path / "strict", max_bad=0.05)
    assert stage_one(recipe_file, tmp_path / "store").quarantined == {"undecodable": 3}
    assert stage_one(recipe_file, tmp_path / "exact", max_bad=3 / 48).is_complete


def spoil(corpus: Path, count: int) -> None:
    for path in sorted((corpus / "train").glob("*.wav"))[:count]:
        path.write_bytes(b"no audio")


def test_parts_share_one_budget_of_bad_rows_and_typing_again_buys_no_other(recipe_file, corpus_folder, tmp_path):
    """Every part alone is within its 12 of 48; together they are not, whoever comes last, and however often."""
    spoil(corpus_folder, 20)
    failed = 0
    for part in [(0, 3), (1, 3), (2, 3)] * 2:
        try:
            stage_one(recipe_file, tmp_path / "store", part=part, max_bad=12 / 48)
        except TooManyBadError:
            failed += 1
    assert failed >= 4
    with pytest.raises(TooManyBadError, match="undecodable"):
        stage_one(recipe_file, tmp_path / "store", max_bad=12 / 48)
    assert not FeatureStore.open(tmp_path / "store").is_sealed
    assert stage_one(recipe_file, tmp_path / "store", max_bad=20 / 48).is_complete


def test_bad_rows_that_the_plan_finds_are_of_the_same_budget_and_filtered_ones_are_not(recipe_file, tmp_path, noise):
    rows = [parquet_row(f"u{i}", wav(noise(1.0)), 1.0, "" if i < 4 else "the cat") for i in range(16)]
    rows += [parquet_row(f"long-{i}", wav(noise(1.0)), 99.0, "the cat") for i in range(4)]
    write_parquet(tmp_path / "c" / "train-00000-of-00001.parquet", rows)
    corpus = f"corpus.path={tmp_path / 'c'}"
    with pytest.raises(TooManyBadError, match="4 of 16 utterances are bad so far: 4 no_text"):
        stage_one(recipe_file, tmp_path / "store", corpus, max_bad=3 / 16)
    assert FeatureStore.open(tmp_path / "store").committed_shards() == []
    assert stage_one(recipe_file, tmp_path / "store", corpus, max_bad=4 / 16).is_complete


def test_a_recording_without_end_is_given_up_at_the_limit(monkeypatch):
    given = []

    def endless(_: bytes):
        while True:
            given.append(1)
            yield np.zeros(160_000, np.float32)

    monkeypatch.setattr(decoding, "iter_audio", endless)
    assert decoding._decode(b"audio", 30.0) == "too_long: more than 30 s when decoded"
    assert len(given) == 4


def test_recordings_longer_than_their_corpus_says_are_stored_while_there_is_room(recipe_file, tmp_path, noise):
    """Half a second more than stated is believed, but the plan has given the rows behind to somebody else."""
    rows = [parquet_row(f"u{i:02}", wav(noise(1.4 if i % 2 else 1.0)), 1.0, "the cat") for i in range(20)]
    write_parquet(tmp_path / "c" / "train-00000-of-00001.parquet", rows)
    report = stage_one(recipe_file, tmp_path / "store", f"corpus.path={tmp_path / 'c'}", max_bad=1.0)
    assert set(report.quarantined) == {"longer_than_planned"}
    assert report.utterances >= 10
    assert report.utterances + report.quarantined["longer_than_planned"] == 20


def test_a_damaged_source_file_costs_its_own_rows_only(recipe_file, tmp_path, noise):
    rows = [parquet_row(f"u{i:03}", wav(noise(1.0)), 1.0, "the cat") for i in range(20)]
    whole, cut = tmp_path / "c" / "train-00000-of-00002.parquet", tmp_path / "c" / "train-00001-of-00002.parquet"
    write_parquet(whole, rows[:10])
    write_parquet(cut, rows[10:])
    data = bytearray(cut.read_bytes())
    footer = pq.read_metadata(cut).row_group(0)
    start = next(footer.column(c).data_page_offset for c in range(6) if footer.column(c).path_in_schema == "wav.bytes")
    data[start : start + 40] = b"\xff" * 40
    cut.write_bytes(data)
    report = stage_one(recipe_file, tmp_path / "store", f"corpus.path={tmp_path / 'c'}")
    assert report.quarantined == {"unreadable": 10}
    assert set(content(tmp_path / "store")) == {f"u{i:03}" for i in range(10)}


def test_a_truncated_source_file_is_named(recipe_file, tmp_path, noise):
    path = tmp_path / "c" / "train-00000-of-00001.parquet"
    write_parquet(path, [parquet_row("u", wav(noise(1.0)), 1.0, "the cat")])
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(CorpusError, match=r"train-00000-of-00001.*cut short"):
        stage_one(recipe_file, tmp_path / "store", f"corpus.path={tmp_path / 'c'}")


def wav(samples: np.ndarray, subtype: str = "PCM_16") -> bytes:
    import io

    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16_000, format="WAV", subtype=subtype)
    return buffer.getvalue()


def parquet_row(name: str, audio: bytes | None, duration: float | None, text: str | None) -> dict[str, object]:
    cell = None if audio is None else {"bytes": audio, "path": f"{name}.wav"}
    return {"ID": name, "duration": duration, "wav": cell, "spk_id": None, "sex": None, "text": text}


def write_parquet(path: Path, rows: list[dict[str, object]]) -> None:
    cell = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    names = {"ID": pa.string(), "duration": pa.float32(), "wav": cell, "spk_id": pa.string(), "sex": pa.string()}
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema([*names.items(), ("text", pa.string())])), path)


# ------------------------------------------------------------------------------------------- disk, interrupts, bounds


def test_a_disk_nearly_full_stops_before_the_next_shard_and_goes_on_when_there_is_room(
    recipe_file, store, tmp_path, monkeypatch
):
    usage, left = shutil.disk_usage(tmp_path), iter([True] * 2)
    nearly = type(usage)(usage.total, usage.used, 10)
    monkeypatch.setattr(disk_room.shutil, "disk_usage", lambda _: usage if next(left, None) else nearly)
    with pytest.raises(DiskError, match="make room and type the same again"):
        stage_one(recipe_file, tmp_path / "full")
    assert FeatureStore.open(tmp_path / "full").committed_shards() == [0, 1]
    monkeypatch.undo()
    assert stage_one(recipe_file, tmp_path / "full").is_complete
    assert same_content(store, tmp_path / "full")


def test_extraction_waits_for_room_and_goes_on_by_itself(recipe_file, store, tmp_path, monkeypatch, caplog):
    usage, looks = shutil.disk_usage(tmp_path), iter([True, True, *[False] * 4])
    nearly = type(usage)(usage.total, usage.used, 10)
    monkeypatch.setattr(disk_room.shutil, "disk_usage", lambda _: usage if next(looks, True) else nearly)
    monkeypatch.setattr(disk_room, "POLL_S", 0.01)
    assert stage_one(recipe_file, tmp_path / "full", "extract.disk_patience_s=3600").is_complete
    assert "waiting for room" in caplog.text
    assert same_content(store, tmp_path / "full")


def test_a_disk_that_fills_up_in_the_middle_of_a_write_is_waited_for_too(recipe_file, store, tmp_path, monkeypatch):
    whole, writes = ShardWriter._commit, iter([True, False, True, False])

    def failing(self):
        if not next(writes, True):
            raise DiskFullError(self._layout.root)
        whole(self)

    monkeypatch.setattr(ShardWriter, "_commit", failing)
    monkeypatch.setattr(disk_room, "POLL_S", 0.01)
    with pytest.raises(DiskFullError):
        stage_one(recipe_file, tmp_path / "impatient")
    assert stage_one(recipe_file, tmp_path / "full", "extract.disk_patience_s=3600").is_complete
    assert same_content(store, tmp_path / "full")


def test_room_is_kept_for_what_others_have_begun(recipe_file, tmp_path, monkeypatch):
    stage_one(recipe_file, tmp_path / "store", part=(0, 3))
    recipe, opened = load_recipe(str(recipe_file)), FeatureStore.open(tmp_path / "store")
    shard_bytes = opened.rows_per_shard * opened.header.bytes_per_row
    usage = shutil.disk_usage(tmp_path)
    two_shards = type(usage)(usage.total, usage.used, 2 * shard_bytes)
    monkeypatch.setattr(disk_room.shutil, "disk_usage", lambda _: two_shards)
    room = disk_room.DiskRoom(recipe, opened)
    theirs = opened.write_shard(1)
    assert room.lack([]) == ""
    others = opened.write_shard(2)
    assert "2 that others have begun" in room.lack([])
    assert "others" not in room.lack([1, 2])
    for writer in (theirs, others):
        writer.__exit__(RuntimeError, RuntimeError("interrupted"), None)


def test_whole_files_need_room_in_the_hub_clients_cache_too(recipe_file, store, tmp_path, monkeypatch):
    usage, cache = shutil.disk_usage(tmp_path), tmp_path / "home"
    cache.mkdir()
    full = type(usage)(usage.total, usage.used, 10)
    monkeypatch.setattr(disk_room.constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(disk_room.shutil, "disk_usage", lambda path: full if path == cache else usage)
    settings = ["corpus.name=some/set", "extract.disk_margin_gb=0.001"]
    for fetch, lack in (("ranges", False), ("files", True)):
        recipe = load_recipe(str(recipe_file), [*settings, f"corpus.fetch={fetch}"])
        assert (str(cache) in disk_room.DiskRoom(recipe, FeatureStore.open(store)).lack([])) == lack


def test_raw_errors_of_a_full_disk_are_one_line(recipe_file, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "recipe.toml")

    monkeypatch.setattr("pipelines.extract.save_request", full)
    with pytest.raises(DiskError, match=r"^No space left on device: 'recipe.toml'; make room"):
        stage_one(recipe_file, tmp_path / "store")


def test_a_store_that_somebody_else_is_finishing_is_not_said_to_be_done(recipe_file, tmp_path, capsys, monkeypatch):
    stage_one(recipe_file, tmp_path / "store", part=(0, 3))
    theirs = FeatureStore.open(tmp_path / "store").write_shard(1)
    command = ["tinyaudio", "extract", "--recipe", str(recipe_file), "--store", str(tmp_path / "store")]
    monkeypatch.setattr(sys, "argv", [*command, "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    assert "is not complete: living processes" in capsys.readouterr().err
    theirs.__exit__(RuntimeError, RuntimeError("interrupted"), None)


def test_training_on_a_store_that_is_not_complete_is_warned_of(recipe_file, tmp_path, monkeypatch):
    stage_one(recipe_file, tmp_path / "store", part=(0, 3))
    monkeypatch.setattr("pipelines.train._Stage", lambda *_: sys.exit("far enough"))
    said = []
    with pytest.raises(SystemExit, match="far enough"):
        train(load_recipe(str(recipe_file)), tmp_path / "store", Run(tmp_path / "run"), device="cpu", say=said.append)
    assert said[0].startswith("WARNING: 2 of 3 shards")


def test_an_interrupt_ends_at_once_although_a_worker_waits_for_the_network(tmp_path):
    script = (
        "import os, signal, threading, time\n"
        "from pipelines.decoding import Decoder\n"
        "class Slow:\n"
        "    def pieces(self, source_ids): return [list(source_ids)]\n"
        "    def read_audio(self, source_ids): time.sleep(600); yield\n"
        "if __name__ == '__main__':\n"
        "    with Decoder(Slow(), 1, 30.0) as decoder:\n"
        "        decoder.warm_up()\n"
        "        pieces = decoder.submit(['u'])\n"
        "        threading.Timer(0.5, os.killpg, (0, signal.SIGINT)).start()\n"
        "        decoder.collect(pieces)\n"
    )
    (tmp_path / "waiting.py").write_text(script)
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, tmp_path / "waiting.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        timeout=120,
    )
    assert done.stderr.strip().endswith("KeyboardInterrupt")
    assert done.stderr.count("Traceback") == 1, done.stderr
    assert time.monotonic() - begun < 60


def test_an_error_under_way_gives_every_claim_back(recipe_file, tmp_path, monkeypatch):
    whole, calls = shard_line.EncoderLine.encode, iter(range(100))

    def failing(self, inputs):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return whole(self, inputs)

    monkeypatch.setattr(shard_line.EncoderLine, "encode", failing)
    with pytest.raises(KeyboardInterrupt):
        stage_one(recipe_file, tmp_path / "store")
    assert not list((tmp_path / "store" / "claims").glob("[0-9]*"))
    monkeypatch.undo()
    assert stage_one(recipe_file, tmp_path / "store").is_complete


def test_decoding_processes_end_when_their_parent_is_killed(recipe_file, tmp_path):
    script = (
        "import multiprocessing, os, time\n"
        "from pipelines.corpora import open_corpus\n"
        "from pipelines.decoding import Decoder\n"
        "from pipelines.recipes import load_recipe\n"
        "if __name__ == '__main__':\n"
        f"    corpus = open_corpus(load_recipe({str(recipe_file)!r}).corpus)\n"
        "    decoder = Decoder(corpus, 1, 30.0)\n"
        "    decoder.collect(decoder.submit(corpus.scan('dev')['source_id'].to_pylist()))\n"
        "    print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    (tmp_path / "parent.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, tmp_path / "parent.py"], capture_output=True, text=True, env=environment)
    pids = [int(pid) for pid in done.stdout.split()]
    assert done.returncode == -9, done.stderr
    assert pids
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").exists() and is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a decoding process outlived its parent"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_batches_side_by_side_give_what_one_thread_gives_and_leave_the_threads_as_they_were(encoder_folder, noise):
    section = EncoderSection(id=str(encoder_folder))
    line, num_threads = EncoderLine(open_encoder(section, torch.device("cpu"))), torch.get_num_threads()
    prepared = [line.prepare([noise(1.0 + 0.1 * i), noise(0.5)]) for i in range(8)]
    line.num_lines = 3
    try:
        torch.set_num_threads(1)
        alone = [line.encode(inputs).read()[0] for inputs in prepared]
        torch.set_num_threads(3)
        with line.side_by_side():
            together = [encoded.read()[0] for encoded in [line.encode(inputs) for inputs in prepared]]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(num_threads)
    for one, other in zip(alone, together, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_line_gives_the_bits_of_a_plain_call(encoder_folder, noise):
    encoder = open_encoder(EncoderSection(id=str(encoder_folder)), torch.device("cpu"))
    recordings = [noise(1.0), noise(0.7), noise(0.01)]
    features, _ = EncoderLine(encoder).encode(EncoderLine(encoder).prepare(recordings)).read()
    plain, counts = encode(encoder.model, *encoder_inputs(encoder.feature_extractor, recordings))
    assert [len(one) for one in features] == counts.tolist()
    assert all(np.array_equal(one, row[: len(one)].numpy()) for one, row in zip(features, plain, strict=True))


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e7])
def test_features_quantised_on_the_device_are_those_of_the_store_to_the_bit(scale):
    random = np.random.default_rng(0)
    features = (scale * random.standard_normal((500, 24)) * random.lognormal(0, 2, 24)).astype(np.float32)
    features[7] = 0
    calibration = Calibration(
        mean=features.mean(axis=0), std=features.std(axis=0) * random.choice([1, 40], 24).astype("f4")
    )
    codes, scales = quantize(features, calibration)
    ours = quantize_tensor(torch.from_numpy(features), torch.from_numpy(calibration.array))
    assert np.array_equal(ours[0].numpy(), codes)
    assert np.array_equal(ours[1].numpy(), scales)


# ------------------------------------------------------------------------------------------- int8


INT8 = "store.encoding='int8'"


def test_machines_without_a_common_disk_share_a_calibration_and_merge(recipe_file, tmp_path):
    stage_one(recipe_file, tmp_path / "one", INT8)
    stage_one(recipe_file, tmp_path / "a", INT8, part=(0, 2))
    stage_one(recipe_file, tmp_path / "b", INT8, f"store.calibration={tmp_path / 'a'}", part=(1, 2))
    merged = store_merge(tmp_path / "merged", [tmp_path / "a", tmp_path / "b"])
    assert not merged.pending
    assert same_content(tmp_path / "one", tmp_path / "merged")


def test_a_calibration_that_is_none_is_one_line(recipe_file, store, tmp_path):
    with pytest.raises(RunError, match="is float16 and has no calibration"):
        stage_one(recipe_file, tmp_path / "b", INT8, f"store.calibration={store}")


def test_a_calibration_goes_on_until_it_has_seen_enough(recipe_file, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(calibrating, "ROUND_UTTERANCES", 10)
    monkeypatch.setattr(
        calibrating.Moments, "is_enough", property(lambda self: seen.append(self.num_utterances) or False)
    )
    stage_one(recipe_file, tmp_path / "store", INT8)
    assert len(seen) == 5
    assert seen[-1] == 48


def test_nothing_to_calibrate_on_is_one_line(recipe_file, corpus_folder, tmp_path):
    for path in corpus_folder.rglob("*.wav"):
        path.write_bytes(path.read_bytes()[:44])
    with pytest.raises(CorpusError, match=r"no utterance of .* could be encoded"):
        stage_one(recipe_file, tmp_path / "store", INT8, "corpus.min_duration_s=0")


def test_batches_cost_the_least_padding_within_their_budget():
    random = np.random.default_rng(0)
    durations = [d for d in random.lognormal(np.log(7), 0.55, 400) if 2 <= d <= 30]  # mean about 8 s
    lengths = {str(i): int(d * 16_000) for i, d in enumerate(durations)}
    batches = cut_batches(lengths, 320.0)
    assert sorted(i for batch in batches for i in batch) == sorted(lengths)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert all(len(batch) * max(lengths[i] for i in batch) <= 320 * 16_000 for batch in batches)
    assert 1 - sum(lengths.values()) / padded < 0.03
    assert cut_batches(dict(reversed(lengths.items())), 320.0) == batches
    assert cut_batches({"long": 999 * 16_000, "a": 400}, 320.0) == [["a"], ["long"]]
    assert cut_batches({}, 320.0) == []
