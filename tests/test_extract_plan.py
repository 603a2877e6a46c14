"""Planning: from metadata alone, with every reason counted, and items without speech at equal distances."""

import numpy as np
import pyarrow as pa
import pytest

from pipelines.corpora import open_corpus
from pipelines.corpora.corpus import SCAN_SCHEMA
from pipelines.corpora.transcripts import prepare_transcript
from pipelines.errors import CorpusError
from pipelines.extract import plan as plan_module
from pipelines.extract.forecast import forecast, spell_duration
from pipelines.extract.plan import forget_scans, plan_corpus
from pipelines.extract.request import fix_revisions
from pipelines.recipes import load_recipe
from pipelines.recipes.recipe import CorpusSection


class Listed:
    """A corpus that is its list."""

    kind = "list"

    def __init__(self, rows: list[tuple[str, float | None, str | None]]) -> None:
        names = ("utterance_id", "duration_s", "transcript")
        full = [{**dict(zip(names, row, strict=True)), "source_id": f"train:{i}"} for i, row in enumerate(rows)]
        self.table = pa.Table.from_pylist(full, schema=SCAN_SCHEMA)

        self.num_scans = 0

    def scan(self, split: str) -> pa.Table:
        self.num_scans += 1
        return self.table

    def audio_bytes(self, split: str) -> int | None:
        return None

    def provenance(self, split: str) -> dict[str, str]:
        return {"kind": self.kind, "split": split}


def plan_of(rows, *overrides: str):
    recipe = load_recipe("demo", ["store.rows_per_shard=2048", *overrides])
    return plan_corpus(recipe, Listed(rows), ["train"])


def reasons(plan) -> dict[str, str]:
    return dict(zip(plan.table["utterance_id"].to_pylist(), plan.table["reason"].to_pylist(), strict=True))


def test_every_filter_has_its_reason():
    plan = plan_of(
        [
            ("good", 5.0, "hello there"),
            ("unknown", None, ""),
            ("short", 0.05, "a"),
            ("long", 31.0, "a"),
            ("mute", 5.0, "  "),
            ("null", 5.0, None),
            ("novel", 2.0, "x" * 500),
            ("good", 5.0, "again"),
            ("nan", float("nan"), "a"),
        ]
    )
    assert reasons(plan) | {"good": ""} == {
        **dict.fromkeys(("good", "unknown", "nan"), ""),
        **{"short": "too_short", "long": "too_long", "mute": "no_text", "null": "no_text", "novel": "text_too_long"},
    }
    assert plan.rejected() == {"no_text": 2, "too_short": 1, "too_long": 1, "text_too_long": 1, "duplicate_id": 1}
    assert plan.rejected_hours()["too_long"] == pytest.approx(31 / 3600)


def test_nothing_to_store_is_an_error():
    with pytest.raises(CorpusError, match=r"nothing to store .*too_long"):
        plan_of([("long", 100.0, "a")])


def test_items_without_speech_are_spread_evenly_in_the_requested_share_and_as_long_as_speech():
    rows = [(f"u{i}", 2.0 + i % 5, "words") for i in range(1000)]
    plan = plan_of(rows, "corpus.no_speech=0.03")
    silent = np.array(plan.table["source"].to_pylist()) == "no-speech"
    assert silent.sum() == 30
    assert set(np.array(plan.table["transcript"].to_pylist())[silent]) == {""}
    assert plan.rejected() == {}
    by_source = plan.table.take(np.argsort(plan.table["shard"].to_numpy(), kind="stable"))["source"].to_pylist()
    places = np.flatnonzero(np.array(by_source) == "no-speech")
    assert np.diff(places).max() < 80
    durations = plan.table["duration_s"].to_numpy()
    assert set(durations[silent]) <= set(durations[~silent])


def test_dev_and_test_get_no_items_without_speech():
    recipe = load_recipe("demo", ["corpus.no_speech=0.5"])
    plan = plan_corpus(recipe, Listed([("u", 2.0, "words"), ("v", 2.0, "words")]), ["dev"])
    assert len(plan.table) == 2


@pytest.mark.parametrize(
    ("text", "policy", "expected"),
    [
        ("It's  3.5, OK?", {"text_case": "lower", "text_punctuation": "remove"}, "it's 3.5 ok"),
        ("AND <COMMA> SO [noise] ON", {"text_tags": "remove"}, "AND SO ON"),
        ("<MUSIC>", {"text_tags": "remove"}, ""),
        ("snake_case \u2014 r\u00e9sum\u00e9", {"text_punctuation": "remove"}, "snake case r\u00e9sum\u00e9"),
        ("As it is!", {}, "As it is!"),
    ],
)
def test_text_policy(text, policy, expected):
    assert prepare_transcript(text, CorpusSection(path="x", **policy)) == expected


def test_forecast_says_sizes_time_and_whether_it_fits(recipe_file, tmp_path):
    recipe = fix_revisions(load_recipe(str(recipe_file)), tmp_path / "store")
    corpus = open_corpus(recipe.corpus)
    plan = plan_corpus(recipe, corpus, ["train", "dev"])
    found = forecast(recipe, corpus, plan, tmp_path / "store", "cpu")
    assert found.utterances == 48
    assert found.bytes["float16"] == plan.num_shards * 1024 * 32 * 2
    assert found.bytes["int8"] == plan.num_shards * 1024 * (32 + 2)
    assert found.bytes["int4"] == plan.num_shards * 1024 * (16 + 2)
    assert found.bytes["int3"] == plan.num_shards * 1024 * (12 + 2)
    assert found.fits
    assert found.seconds > 0
    assert found.encoder_speed > 0
    assert found.audio_bytes > 0
    assert not (tmp_path / "store").exists()
    crowded = recipe.model_copy(update={"extract": recipe.extract.model_copy(update={"disk_margin_gb": 1e9})})
    assert "TOO LITTLE" in str(forecast(crowded, corpus, plan, tmp_path / "store", "cpu"))


def test_a_forecast_is_of_what_this_command_would_do_and_says_what_it_takes(recipe_file, tmp_path):
    recipe = fix_revisions(load_recipe(str(recipe_file)), tmp_path / "store")
    corpus = open_corpus(recipe.corpus)
    plan = plan_corpus(recipe, corpus, ["train", "dev"])
    part = forecast(recipe, corpus, plan, tmp_path / "store", "cpu", (0, plan.num_shards))
    assert part.hours == forecast(recipe, corpus, plan, tmp_path / "store", "cpu").hours
    at_least_s = part.hours * 3600 / plan.num_shards * (1 / part.encoder_speed + 1 / part.decode_speed)
    assert part.seconds == pytest.approx(at_least_s)
    assert part.fetch_bytes_per_s == pytest.approx(part.audio_bytes / plan.num_shards / part.seconds)
    assert part.write_bytes_per_s == pytest.approx(1024 * 64 / part.seconds)
    assert "MB/s to keep up" in str(part)
    assert f"at most {part.memory_bytes / 1e9:.2f} GB" in str(part)


def test_a_plan_with_too_many_bad_rows_says_so_before_anything_runs(tmp_path):
    rows = [(f"u{i}", 2.0, "words" if i % 10 else "") for i in range(100)]
    recipe = load_recipe("demo", ["store.rows_per_shard=2048"])
    corpus = Listed(rows)
    found = forecast(recipe, corpus, plan_corpus(recipe, corpus, ["train"]), tmp_path, "cpu")
    assert found.bad_share == pytest.approx(0.1)
    assert "MORE than the 1 % of bad rows allowed" in str(found)


def test_local_files_listed_quickly_leave_nothing_beside_the_store(tmp_path, monkeypatch):
    corpus, recipe = Listed([("u", 2.0, "words")]), load_recipe("demo")
    corpus.kind = "parquet"
    plan_corpus(recipe, corpus, ["train"], tmp_path / "data" / "store")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(plan_module, "KEEP_LOCAL_FROM_S", 0.0)
    plan_corpus(recipe, corpus, ["train"], tmp_path / "data" / "store")
    assert len(list((tmp_path / "data").glob(".store.scan-*"))) == 1


def test_a_corpus_is_listed_once_for_plan_and_extraction(tmp_path):
    """And again if other columns are asked for, or the data are others."""
    corpus, recipe = Listed([("u", 2.0, "words")]), load_recipe("demo")
    plans = [plan_corpus(recipe, corpus, ["train"], tmp_path / "store") for _ in range(2)]
    assert plans[0].table.equals(plans[1].table)
    assert corpus.num_scans == 1
    other = load_recipe("demo", ["corpus.columns.text=said"])
    plan_corpus(other, corpus, ["train"], tmp_path / "store")
    assert corpus.num_scans == 2
    damaged = next(tmp_path.glob(".store.scan-*"))
    damaged.write_bytes(b"half a file")
    plan_corpus(recipe, corpus, ["train"], tmp_path / "store")
    plan_corpus(other, corpus, ["train"], tmp_path / "store")
    assert corpus.num_scans == 3
    forget_scans(tmp_path / "store")
    assert list(tmp_path.iterdir()) == []


def test_a_plan_without_shards_is_an_error():
    with pytest.raises(CorpusError, match=r"nothing to store .*longer_than_shard"):
        plan_of([("u", 20.0, "words")], "store.rows_per_shard=512")


def test_durations_are_spelt_as_one_says_them():
    assert [spell_duration(s) for s in (40, 720, 12_600, 181_440)] == ["40 s", "12 min", "3.5 h", "2.1 days"]
