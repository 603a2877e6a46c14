"""The unmodified commands against a loopback replica of the hub: what is fetched, pinned, retried and refused.

The replica serves what the recipes pin at the commits that they pin; its `main` holds something else.

One process runs a whole session, so that its imports are paid once; between commands it calls `/mark/<name>`, at which
the replica changes its faults.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from hub_replica import CORPUS, DECODER, ENCODER, PINNED, Fault, Hub, fill

from cache import FeatureReader, FeatureStore
from pipelines.extract.stage import extract
from pipelines.recipes import load_recipe

SESSION = """
import json, os, sys, urllib.request
from tinyaudio.cli import main
for name, arguments in json.loads(sys.argv[1]):
    try:
        urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/mark/" + name)
    except Exception:
        pass
    sys.argv = ["tinyaudio", *arguments]
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = stop.code
    print(f"<<{name} {code}>>", flush=True)
    print(f"<<{name}>>", file=sys.stderr, flush=True)
"""

UNREACHABLE = """
import sys, time
from tinyaudio.cli import app as cli, extract as cli_extract
time.sleep = lambda seconds: None  # the hub client's own pauses; ours wait on an event
cli_extract.PLAN_TIMEOUT_S = 2.5
sys.argv = ["tinyaudio", "extract", "--recipe", "loquacious-small", "--store", "store", "--plan"]
cli.main()
"""


class Session:
    """What a session of commands left: per command exit code, stdout, stderr and the replica's log."""

    def __init__(self, hub: Hub, folder: Path, commands: dict[str, list[object]]) -> None:
        listed = json.dumps([(name, [str(a) for a in arguments]) for name, arguments in commands.items()])
        environment = {**hub.environment(folder / "home"), "PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(
            [sys.executable, "-c", SESSION, listed],
            capture_output=True,
            text=True,
            cwd=folder,
            env=environment,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        self.codes = dict(re.findall(r"<<(\S+) (\S+)>>", done.stdout))
        self.stdout = dict(zip(commands, re.split(r"<<\S+ \S+>>\n", done.stdout), strict=False))
        self.stderr = dict(zip(commands, re.split(r"<<\S+>>\n", done.stderr), strict=False))
        self._log = hub.log

    def requests(self, name: str) -> list[object]:
        marks = [i for i, request in enumerate(self._log) if request.path.startswith("/mark/")]
        first = next(i for i in marks if self._log[i].path == f"/mark/{name}")
        return self._log[first + 1 : next((i for i in marks if i > first), len(self._log))]


ABSENT = "0" * 40  # a commit that no repository has
SHARD_ROWS = 1024  # 20 s: several shards of each file


def set_revisions(revision: str) -> list[str]:
    return ["--set", f"corpus.revision={revision}", "--set", f"encoder.revision={revision}"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One session: plan, a hub that stays away, a hub with faults, nothing to do, training, scoring, transcribing."""
    folder = tmp_path_factory.mktemp("hub")
    with fill(Hub(), folder / "served", num_train=60, num_other=60) as hub:
        hub.redirects = True
        away = [
            Fault(r"resolve/.*small/train-00001.*parquet", 503, times=-1),
            Fault(r"resolve/.*/model.safetensors", 500, times=1),
        ]
        passing = [
            Fault(r"resolve/.*train-00000.*parquet", "disconnect", times=3),
            Fault(r"resolve/.*train-00001.*parquet", "short", times=2),
            Fault(r"resolve/.*dev-00002.*parquet", 429, times=2, retry_after="1"),
            Fault(r"resolve/.*dev-00003.*parquet", 500, times=2),
            Fault(r"resolve/.*dev-00004.*parquet", "slow", times=2),
        ]
        whole = [Fault(rf"resolve/.*dev-0000{i}.*parquet", kind) for i, kind in enumerate(("disconnect", 500, 429))]
        hub.met = {"away": away, "faulty": passing, "files": whole}
        faults = {**hub.met, "gone": [Fault(r"resolve/.*parquet", 404, times=-1)]}
        take = hub.take_fault

        def marked(method: str, path: str, num_bytes: int = 0) -> Fault | None:
            if path == "/mark/eval":
                decoder = hub.repos["models", DECODER]
                decoder.push({**decoder.files, "README.md": clip})
            if path.startswith("/mark/"):
                hub.faults[:] = faults.get(path.removeprefix("/mark/"), [])
            return take(method, path, num_bytes)

        hub.take_fault = marked
        name = "loquacious-small"
        clip = folder / "clip.wav"
        soundfile.write(clip, 0.1 * np.sin(np.arange(16_000) / 20), 16_000)
        extract_it = ["extract", "--recipe", name, "--store", "store", "--set", f"store.rows_per_shard={SHARD_ROWS}"]
        train = ["train", "--recipe", name, "--store", "store", "--run", "run", "--device", "cpu"]
        for key in ("steps=2", "ctc_steps=1", "warmup_steps=1", "eval_every=2", "eval_utterances=2", "save_every=2"):
            train += ["--set", f"train.{key}"]
        commands = {
            "plan": [*extract_it, "--plan", "--json"],
            "branches": [*extract_it, "--plan", "--json", *set_revisions("main")],
            "away": [*extract_it, "--set", "corpus.fetch_patience_s=3.0"],
            "faulty": extract_it,
            "again": extract_it,
            "files": [*extract_it, "--split", "dev", "--store", "files", "--set", "corpus.fetch=files"],
            "gone": ["extract", "--recipe", name, "--store", "other", "--set", "corpus.no_speech=0"],
            "unknown": ["extract", "--recipe", name, "--store", "other", "--set", "corpus.name=nobody/nothing"],
            "unpinned": [
                "extract",
                "--recipe",
                name,
                "--store",
                "other",
                "--plan",
                "--set",
                f"corpus.revision={ABSENT}",
            ],
            "unpinned-encoder": [*extract_it, "--store", "other", "--set", f"encoder.revision={ABSENT}"],
            "unpinned-decoder": [*train, "--run", "other", "--set", f"decoder.revision={ABSENT}"],
            "train": train,
            "eval": ["eval", "runs/run", "--corpus", "loquacious", "--split", "test", "--max-samples", "2", "--json"],
            "transcribe": ["transcribe", "--model", "runs/run", "--max-new-tokens", "5", "clip.wav"],
        }
        yield folder, hub, Session(hub, folder, commands)


def test_plan_reads_metadata_columns_and_not_a_byte_of_audio(world):
    _, hub, session = world
    assert session.codes["plan"] == "0", session.stderr["plan"]
    plan = json.loads(session.stdout["plan"].splitlines()[-1])
    assert plan["splits"] == ["train", "dev"]
    assert plan["utterances"] - plan["no_speech"] == 120
    repo = hub.repos["datasets", CORPUS]
    assert plan["revisions"] == {CORPUS: repo.commit, ENCODER: hub.repos["models", ENCODER].commit}
    touched = 0
    for request in session.requests("plan"):
        match = re.search(rf"/resolve/{repo.commit}/(.+\.parquet)$", request.path)
        if match and request.method == "GET":
            assert request.range is not None, "a whole Parquet file was fetched"
            for start, end in audio_spans(repo.files[match[1]]):
                assert request.range[1] <= start or request.range[0] >= end, f"audio of {match[1]} was fetched"
            touched += 1
    assert touched > 10
    assert not any(
        "model.safetensors" in request.path and request.method == "GET" for request in session.requests("plan")
    )


def audio_spans(path: Path) -> list[tuple[int, int]]:
    footer, spans = pq.read_metadata(path), []
    for group in range(footer.num_row_groups):
        for column in range(footer.num_columns):
            chunk = footer.row_group(group).column(column)
            if chunk.path_in_schema == "wav.bytes":
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                spans.append((start, start + chunk.total_compressed_size))
    assert spans
    return spans


def test_a_hub_that_stays_away_is_one_line_and_keeps_what_is_done(world):
    folder, _, session = world
    assert session.codes["away"] == "1"
    last = session.stderr["away"].strip().splitlines()[-1]
    assert "train-00001" in last
    assert "503" in last
    assert "run the same command again" in last
    assert "Traceback" not in session.stderr["away"]
    written, total = re.search(r"shards +(\d+) written now, (\d+) in all", session.stdout["faulty"]).groups()
    assert 0 < int(written) < int(total)  # the other file's were there
    assert quarantine(folder / "store") == []


def quarantine(store: Path) -> list[str]:
    return [line for path in sorted((store / "quarantine").glob("*.jsonl")) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["away", "faulty", "files"])
def test_every_planted_fault_was_met(world, name):
    _, hub, _ = world
    assert [fault for fault in hub.met[name] if not fault.hits] == []


def test_whole_files_come_through_faults_too(world):
    folder, _, session = world
    assert session.codes["files"] == "0", session.stderr["files"]
    one, other = FeatureReader(folder / "store", split="dev"), FeatureReader(folder / "files")
    ids = other.index["utterance_id"].to_pylist()
    assert sorted(ids) == sorted(one.index["utterance_id"].to_pylist())
    assert all(np.array_equal(one.get(i), other.get(i)) for i in ids)


def test_a_plan_without_a_network_gives_up_soon_although_the_recipe_waits_for_half_a_day(tmp_path):
    assert load_recipe("loquacious-small").corpus.fetch_patience_s > 3600
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment = {**kept, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-c", UNREACHABLE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120)
    assert done.returncode == 1
    *tries, last = done.stderr.splitlines()
    assert "the hub cannot be reached (" in last
    assert tries
    assert all(re.search(r"trying again in [\d.]+ s, for \d+ s more$", line) for line in tries), done.stderr


def test_passing_faults_change_nothing_that_is_stored(world, tmp_path):
    folder, _, session = world
    assert session.codes["faulty"] == "0", session.stderr["faulty"]
    assert "complete" in session.stdout["faulty"] or "written now" in session.stdout["faulty"]
    (tmp_path / "train").mkdir()
    for split, at in (("train", "small"), ("dev", "dev")):
        (tmp_path / "corpus" / split).mkdir(parents=True)
        for path in (folder / "served" / at).glob("*.parquet"):
            (tmp_path / "corpus" / split / path.name).symlink_to(path)
    settings = [f"corpus.path={tmp_path / 'corpus'}", f"encoder.id={ENCODER_FOLDER}"]
    local = load_recipe("loquacious-small", [*settings, f"store.rows_per_shard={SHARD_ROWS}"])
    extract(local, tmp_path / "store", splits=["train", "dev"], device="cpu")
    one, other = FeatureReader(folder / "store"), FeatureReader(tmp_path / "store")
    ids = one.index["utterance_id"].to_pylist()
    assert sorted(ids) == sorted(other.index["utterance_id"].to_pylist())
    assert all(np.array_equal(one.get(i), other.get(i)) for i in ids)


ENCODER_FOLDER = Path(__file__).parents[1] / "pipelines" / "demo" / "encoder"


def test_branch_names_become_commits(world):
    _, hub, session = world
    assert session.codes["branches"] == "0", session.stderr["branches"]
    plan = json.loads(session.stdout["branches"].splitlines()[-1])
    main = {name: repo.branches["main"] for (_, name), repo in hub.repos.items()}
    assert plan["revisions"] == {CORPUS: main[CORPUS], ENCODER: main[ENCODER]}
    assert plan["utterances"] - plan["no_speech"] == 119  # there is one less at main


def test_pinned_commits_are_in_recipe_fingerprint_and_every_request(world):
    folder, _, session = world
    fingerprint = FeatureStore.open(folder / "store").fingerprint
    assert {split["revision"] for split in fingerprint["corpus"]["splits"].values()} == {PINNED[CORPUS]}
    assert fingerprint["encoder"]["revision"] == PINNED[ENCODER]
    saved = load_recipe(str(folder / "store" / "recipe.toml"))
    assert (saved.corpus.revision, saved.encoder.revision) == (PINNED[CORPUS], PINNED[ENCODER])
    others = [name for name in session.codes if name != "branches" and not name.startswith("unpinned")]
    asked = [request.path for name in others for request in session.requests(name)]
    for name, commit in PINNED.items():
        mine = [path for path in asked if name in path]
        assert mine
        assert [path for path in mine if commit not in path] == []
    files = [path for path in asked if path.endswith((".parquet", ".safetensors", ".json"))]
    assert len(files) > 20


def test_a_finished_store_asks_the_hub_nothing(world):
    _, _, session = world
    assert session.codes["again"] == "0"
    assert "nothing to do" in session.stderr["again"]
    assert session.requests("again") == []


@pytest.mark.parametrize(
    ("name", "repo"), [("unpinned", CORPUS), ("unpinned-encoder", ENCODER), ("unpinned-decoder", DECODER)]
)
def test_a_pinned_commit_that_is_not_there_is_one_line_with_how_to_override_it(world, name, repo):
    _, _, session = world
    assert session.codes[name] == "1"
    assert "Traceback" not in session.stderr[name]
    line = session.stderr[name].strip().splitlines()[-1]
    assert f"{repo!r} has no revision {ABSENT!r} on the hub" in line
    assert ".revision=main" in line


@pytest.mark.parametrize("name", ["gone", "unknown"])
def test_what_is_not_there_is_one_line_at_once(world, name):
    _, _, session = world
    assert session.codes[name] == "1"
    assert "Traceback" not in session.stderr[name]
    assert "HF_TOKEN" in session.stderr[name].strip().splitlines()[-1]


def test_training_scoring_and_transcribing_meet_the_same_hub(world):
    folder, hub, session = world
    for name in ("train", "eval", "transcribe"):
        assert session.codes[name] == "0", session.stderr[name]
    begun_with = {"encoder_revision": PINNED[ENCODER], "decoder_revision": hub.repos["models", DECODER].commit}
    for record in ("config.json", "run.json"):
        recorded = json.loads((folder / "runs" / "run" / record).read_text())
        assert {key: recorded[key] for key in begun_with} == begun_with


def test_a_model_keeps_the_decoder_it_was_trained_with(world):
    """The replica's `main` moves before the evaluation: no command may ask for `main` now."""
    _, hub, session = world
    decoder = hub.repos["models", DECODER]
    assert decoder.branches["main"] != decoder.commit
    asked = [r.path for name in ("eval", "transcribe") for r in session.requests(name) if DECODER in r.path]
    assert [path for path in asked if decoder.commit not in path] == []
