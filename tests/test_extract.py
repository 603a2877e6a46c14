"""Stage one on tiny random parts: what a store holds, when it is done, and what extracting again repairs."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from extractions import INT8, same_content, stage_one

from pipelines.errors import CorpusError, RunError
from pipelines.extract import calibration as calibrating
from pipelines.extract.request import finished
from pipelines.recipes import load_recipe

ROOT = Path(__file__).parents[1]


def test_a_finished_store_answers_without_torch(recipe_file, store):
    script = (
        "import sys; from pathlib import Path; from pipelines.extract.request import finished\n"
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
    lost = 2 if damage == "swap" else 1
    assert (report.shards_written, report.shards_repaired) == (lost, lost)
    assert f"{lost} found damaged" in str(report)
    assert (store / "features" / "c.2.0").stat().st_mtime_ns == untouched
    assert same_content(store, undamaged)
    assert stage_one(recipe_file, store).shards_written == 0


def test_a_damaged_calibration_is_measured_again_and_no_shard_is_redone(recipe_file, tmp_path):
    stage_one(recipe_file, tmp_path / "store", INT8)
    shutil.copytree(tmp_path / "store", tmp_path / "undamaged")
    header = tmp_path / "store" / "zarr.json"
    text = header.read_text()
    at = text.index('"calibration": "') + 20
    header.write_text(text[:at] + ("A" if text[at] != "A" else "B") + text[at + 1 :])
    report = stage_one(recipe_file, tmp_path / "store", INT8)
    assert report.is_complete
    assert report.shards_written == 0
    assert header.read_text() == text
    assert same_content(tmp_path / "store", tmp_path / "undamaged")


def test_an_unfinished_store_resumes_without_listing_the_corpus_again(recipe_file, tmp_path, monkeypatch):
    stage_one(recipe_file, tmp_path / "store", part=(0, 2))
    monkeypatch.setattr("pipelines.extract.stage.plan_corpus", lambda *_: pytest.fail("the corpus was listed again"))
    assert stage_one(recipe_file, tmp_path / "store").is_complete


def test_a_calibration_that_is_none_is_one_line(recipe_file, store, tmp_path):
    with pytest.raises(RunError, match="is float16 and has no calibration"):
        stage_one(recipe_file, tmp_path / "b", INT8, f"store.calibration={store}")


def test_a_calibration_continues_until_it_has_seen_enough(recipe_file, tmp_path, monkeypatch):
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
