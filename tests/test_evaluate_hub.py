"""The named test sets, through the command and a loopback hub that holds replicas in the layout of their pages.

Layouts: dataset_info and configs of hf-audio/esb-datasets-test-only-sorted @ d4563d5, fixie-ai/common_voice_17_0 @
d062013 and fixie-ai/gigaspeech @ 21d9f45 (README.md of each); rows are bundled synthetic speech.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from audio_files import with_soundfile
from hub_replica import Fault, Hub

from pipelines.evaluate.eval_sets import named_sections, open_eval_set
from pipelines.recipes import load_recipe
from pipelines.recipes.recipe import Columns, CorpusSection
from tinyaudio.model.audio import Samples

ESB, COMMON_VOICE = "hf-audio/esb-datasets-test-only-sorted", "fixie-ai/common_voice_17_0"

ESB_FEATURES = """
  features:
  - name: audio
    dtype: {audio: {sampling_rate: 16000}}
  - {name: dataset, dtype: string}
  - {name: text, dtype: string}
  - {name: id, dtype: string}
  - {name: audio_length_s, dtype: float64}"""
ESB_CARD = f"""---
dataset_info:
- config_name: gigaspeech{ESB_FEATURES}
- config_name: librispeech{ESB_FEATURES}
configs:
- config_name: gigaspeech
  data_files:
  - {{split: test, path: gigaspeech/test-*}}
- config_name: librispeech
  data_files:
  - {{split: test.clean, path: librispeech/test.clean-*}}
  - {{split: test.other, path: librispeech/test.other-*}}
extra_gated_prompt: >-
  Three of the ESB datasets have specific terms of usage that must be agreed to
---
"""
COMMON_VOICE_CARD = """---
configs:
- config_name: en
  data_files:
  - {split: test, path: en/test-*}
  - {split: validation, path: en/validation-*}
---
"""

SESSION = """
import json, sys
from tinyaudio.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["tinyaudio", *arguments]
    try:
        main()
    except SystemExit as stop:
        print(f"<<{stop.code or 0}>>", flush=True)
        print("<<>>", file=sys.stderr, flush=True)
"""


def cell(samples: Samples, name: str, rate: int = 16_000) -> dict[str, Any]:
    return {"bytes": with_soundfile(samples, rate), "path": name}


def esb_rows(spoken: list[tuple[Samples, str]], dataset: str) -> pa.Table:
    """Longest first, as the set is; GigaSpeech's texts have their tags."""
    rows = sorted(spoken, key=lambda one: -len(one[0]))
    tag = " <COMMA> hello <PERIOD>" if dataset == "gigaspeech" else ""
    return pa.Table.from_pylist(
        [
            {
                "audio": cell(samples, f"{i}.wav"),
                "dataset": dataset,
                "text": text + tag,
                "id": f"{dataset}-{i:04}",
                "audio_length_s": len(samples) / 16_000,
            }
            for i, (samples, text) in enumerate(rows)
        ]
    )


def common_voice_rows(spoken: list[tuple[Samples, str]]) -> pa.Table:
    rows = []
    for i, (samples, text) in enumerate(spoken):
        name = f"common_voice_en_{i}.mp3"
        row = {"client_id": f"c{i % 2}", "path": name, "audio": cell(np.repeat(samples, 3), name, 48_000)}
        row |= {"sentence": f"{text.capitalize()}.", "up_votes": 2, "down_votes": 0, "age": "twenties"}
        row |= {"gender": ["male_masculine", "female_feminine", ""][i % 3], "accent": "", "locale": "en"}
        rows.append({**row, "segment": "", "variant": "", "continuation": None})
    return pa.Table.from_pylist(rows)


def write(path: Path, content: pa.Table | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, str):
        path.write_text(content)
    else:
        pq.write_table(content, path, row_group_size=3)
    return path


def esb(hub: Hub, folder: Path, spoken: list[tuple[Samples, str]]) -> None:
    contents = {
        "README.md": ESB_CARD,
        "gigaspeech/test-00000-of-00002.parquet": esb_rows(spoken[:2], "gigaspeech"),
        "gigaspeech/test-00001-of-00002.parquet": esb_rows(spoken[2:4], "gigaspeech").slice(0, 1),
        "librispeech/test.clean-00000-of-00001.parquet": esb_rows(spoken[:4], "librispeech"),
        "librispeech/test.other-00000-of-00001.parquet": esb_rows(spoken[4:7], "librispeech"),
    }
    hub.add("datasets", ESB, {name: write(folder / name, content) for name, content in contents.items()})


def run(hub: Hub, folder: Path, commands: list[list[str]]) -> list[tuple[int, list[str], list[str]]]:
    """Run commands in one process, which pays its imports once; for each: exit code, lines of stdout, of stderr."""
    environment = {**hub.environment(folder / "home"), "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", SESSION, json.dumps(commands)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    parts = done.stdout.split("<<")
    outputs = [parts[0], *(part.split(">>\n", 1)[1] for part in parts[1:-1])]
    codes = [int(part.split(">>")[0]) for part in parts[1:]]
    told = done.stderr.split("<<>>\n")
    return [(code, out.splitlines(), err.splitlines()) for code, out, err in zip(codes, outputs, told, strict=False)]


def test_every_named_test_set_is_scored_from_its_own_layout(
    tmp_path: Path, spoken: list[tuple[Samples, str]], checkpoint: Path
) -> None:
    names = {"librispeech-clean": 4, "librispeech-other": 3, "gigaspeech": 3, "common-voice": 5}
    assert {"loquacious", *names} == set(named_sections())
    with Hub() as hub:
        esb(hub, tmp_path / "esb", spoken)
        files = {"README.md": COMMON_VOICE_CARD, "en/test-00000-of-00001.parquet": common_voice_rows(spoken[:5])}
        files |= {"en/validation-00000-of-00001.parquet": common_voice_rows(spoken[5:6])}
        written = {name: write(tmp_path / "cv" / name, content) for name, content in files.items()}
        hub.add("datasets", COMMON_VOICE, written)
        common = ["eval", str(checkpoint), "--num-beams", "1", "--max-new-tokens", "4", "--device", "cpu", "--json"]
        results = run(hub, tmp_path, [[*common, "--corpus", name] for name in names])
    for (name, count), (code, out, err) in zip(names.items(), results, strict=True):
        assert code == 0, (name, err)
        printed = json.loads(out[-1])
        assert (printed["utterances"], printed["failed"]) == (count, 0), name
        summary = json.loads((Path(printed["output"]) / "summary.json").read_text())
        lines = [json.loads(line) for line in (Path(printed["output"]) / "predictions.jsonl").read_text().splitlines()]
        words = sum(len(line["text"].split()) for line in lines) - (2 * count if name == "gigaspeech" else 0)
        assert summary["scores"][0]["word_errors"]["words"] == words, "tags are not words"
        assert summary["settings"]["scored"]["provenance"]["revision"], "pinned to a commit"
        if name == "common-voice":
            assert {line["sex"] for line in lines} == {"male_masculine", "female_feminine", ""}
            assert {line["speaker"] for line in lines} == {"c0", "c1"}
            assert [line["text"].rstrip(".").lower() for line in lines] == [text for _, text in spoken[:5]]


def test_a_model_of_the_hub_brings_its_recipe_and_the_note_that_goes_with_it(
    tmp_path: Path, spoken: list[tuple[Samples, str]], checkpoint: Path
) -> None:
    load_recipe("loquacious-small").save(checkpoint / "recipe.toml")
    common = ["--num-beams", "1", "--max-new-tokens", "4", "--device", "cpu", "--corpus", "librispeech-other"]
    with Hub() as hub:
        esb(hub, tmp_path / "esb", spoken)
        hub.add("models", "someone/tiny", {path.name: path for path in checkpoint.iterdir()})
        hub.add("models", "someone/bare", {p.name: p for p in checkpoint.iterdir() if p.name != "recipe.toml"})
        known, bare, unsaid = run(
            hub,
            tmp_path,
            [["eval", "someone/tiny", *common], ["eval", "someone/bare", *common], ["eval", "someone/bare"]],
        )
    assert (known[0], bare[0], unsaid[0]) == (0, 0, 1), (known, bare, unsaid)
    summaries = {
        name: json.loads(path.read_text())
        for name in ("tiny", "bare")
        for path in (tmp_path / "evaluations" / f"someone--{name}").glob("*/summary.json")
    }
    assert summaries["tiny"]["settings"]["trained_on"] == "speechbrain/LoquaciousSet"
    assert any("LibriHeavy" in note for note in summaries["tiny"]["notes"])
    assert summaries["tiny"]["settings"]["model"]["revision"], "pinned to a commit"
    assert summaries["bare"]["settings"]["trained_on"] is None
    [line] = unsaid[2]
    assert line.startswith("tinyaudio: 'someone/bare' has no recipe.toml; it is not a folder, and the hub has none.")
    assert line.endswith("name a --corpus or a --recipe")


def test_a_gated_set_asks_for_its_terms_and_a_token_in_one_line(
    tmp_path: Path, spoken: list[tuple[Samples, str]], checkpoint: Path
) -> None:
    with Hub() as hub:
        esb(hub, tmp_path / "esb", spoken)
        hub.faults.append(Fault("/(resolve|datasets)/", 401, times=-1))
        hub.faults.append(Fault("/(resolve|datasets)/", 401, times=-1, method="HEAD"))
        [(code, _, told)] = run(hub, tmp_path, [["eval", str(checkpoint), "--corpus", "librispeech-clean"]])
    assert code == 1
    [line] = told
    assert f"Accept its terms at https://huggingface.co/datasets/{ESB} and set HF_TOKEN" in line


def test_sources_stored_as_class_labels_go_by_their_names(tmp_path: Path, spoken: list[tuple[Samples, str]]) -> None:
    samples, text = spoken[0]
    row = {"segment_id": "YOU1_S1", "speaker": "N/A", "text": text.upper(), "audio": cell(samples, "a.wav")}
    table = pa.Table.from_pylist([{**row, "source": 2}, {**row, "segment_id": "POD1_S1", "source": 1}])
    label = {"names": ["audiobook", "podcast", "youtube"], "_type": "ClassLabel"}
    about = {"info": {"features": {"source": label, "text": {"dtype": "string", "_type": "Value"}}}}
    write(tmp_path / "test-00000-of-00001.parquet", table.replace_schema_metadata({"huggingface": json.dumps(about)}))
    columns = Columns(id="segment_id", audio="audio", text="text", speaker="speaker", source="source")
    found = open_eval_set(CorpusSection(path=str(tmp_path), columns=columns), split="test")
    assert [one.source for one in found.utterances] == ["youtube", "podcast"]
