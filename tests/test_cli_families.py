"""`tinyaudio extract`, `train`, `eval` and `transcribe` with an encoder of every family, and what must always hold."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import NoiseMaker, write_folder_corpus, write_recipe
from safetensors.torch import load_file
from tiny_encoders import FAMILIES, WIDTH, save_encoder
from typer.testing import CliRunner

from cache import FeatureReader, FeatureStore
from pipelines.train.meter import counting_encoder_passes
from tinyaudio.cli.app import app
from tinyaudio.model.audio import load_audio
from tinyaudio.model.encoder import encoder_inputs
from tinyaudio.model.frozen import weights_digest
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration
from tinyaudio.model.processing_tinyaudio import TinyAudioProcessor


def tinyaudio(*arguments: str | Path) -> dict:
    """Run a command in this process, and return what --json prints."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, (result.output, result.stderr, result.exception)
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", [*FAMILIES, "whisper-full"])
def test_all_stages_run_with_an_encoder_of_every_family(
    family: str, decoder_folder: Path, tmp_path: Path, spoken: list[tuple[np.ndarray, str]]
) -> None:
    # Stage one.
    name, _, context = family.partition("-")
    encoder, corpus = save_encoder(name, tmp_path / name), tmp_path / "corpus"
    write_folder_corpus(corpus, NoiseMaker(seed=0), {"train": 12, "dev": 4, "test": 4})
    for i, (samples, _) in enumerate(spoken[:3]):  # noise has no transcript
        soundfile.write(corpus / "test" / f"{i:03}.wav", samples, 16_000)
    recipe = write_recipe(tmp_path / "tiny.toml", corpus, encoder, decoder_folder)
    if context:
        recipe.write_text(recipe.read_text().replace("[encoder]", f'[encoder]\ncontext = "{context}"'))
    given = ("--recipe", recipe, "--store", tmp_path / "store", "--device", "cpu")
    plan = tinyaudio("extract", *given, "--plan")
    report = tinyaudio("extract", *given)
    assert (report["utterances"], report["is_complete"], plan["utterances"]) == (16, True, 16)
    store = FeatureStore.open(tmp_path / "store")
    assert store.dim == WIDTH
    assert store.fingerprint["encoder"].get("context") == {"whisper": context or "own"}.get(name)

    # Stage two never runs the encoder.
    run = tmp_path / "run"
    trained = tinyaudio("train", *given, "--run", run)
    assert (trained["steps"], trained["encoder_passes"]) == (6, 0)
    assert all(key.startswith("projector.") for key in load_file(run / "model.safetensors"))
    model = TinyAudioForConditionalGeneration.from_pretrained(run)
    assert weights_digest(model.encoder) == model.config.encoder_digest == store.fingerprint["encoder"]["weights"]
    assert weights_digest(model.decoder) == model.config.decoder_digest

    # Cached features equal live ones.
    processor = TinyAudioProcessor.from_pretrained(run)
    reader, labels = FeatureReader(store, split="train"), torch.tensor([[5, 6, 7, 0]])
    with counting_encoder_passes() as count:
        for row in reader.index.slice(0, 5).to_pylist():
            stored = torch.from_numpy(reader.get(row["utterance_id"]).astype(np.float32))[None]
            live = processor(load_audio(corpus / row["utterance_id"]))
            (features,), (num_frames,) = model.encode(**live)
            assert num_frames == row["num_frames"]
            assert (features - stored[0]).abs().max() < 2e-3, "half precision, of values near 1"
            cached = {"features": stored, "num_frames": torch.tensor([num_frames])}
            assert abs(model(**cached, labels=labels).loss - model(**live, labels=labels).loss) < 1e-3
    assert count.passes == 10

    # The batch changes nothing. (Four beams of a random decoder are too close to each other to be compared.)
    values, mask = encoder_inputs(processor.feature_extractor, [samples for samples, _ in spoken[:3]])
    together = model.generate(values, mask, num_beams=1, max_new_tokens=8)
    for (samples, _), row in zip(spoken, together, strict=False):
        (alone,) = model.generate(**processor(samples), num_beams=1, max_new_tokens=8)
        assert alone.tolist() == row[: len(alone)].tolist()

    # Stage three, and transcription.
    output = tmp_path / "eval"
    tinyaudio("eval", run, "--corpus", corpus, "--batch-size", "3", "--device", "cpu", "--output", output)
    answers = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert sum(answer["pred_text"] != "" for answer in answers) >= 2
    talks = map(str, sorted((corpus / "test").glob("*.wav"))[:3])
    result = CliRunner().invoke(app, ["transcribe", *talks, "--model", str(run), "--json", "--device", "cpu"])
    assert result.exit_code == 0, (result.output, result.exception)
    assert sum(json.loads(line)["text"] != "" for line in result.stdout.splitlines()) >= 2
