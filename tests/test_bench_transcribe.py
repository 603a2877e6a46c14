"""`bench transcribe`: both ways do the same work, and a lack of memory is an error of one line."""

import json

import pytest
import torch
from transformers import LlamaConfig

from pipelines.bench import drafts as bench_drafts
from pipelines.bench import transcribe as bench_transcribe
from pipelines.bench.transcribe import PARTS, measure, measure_full_size
from tinyaudio.model.errors import ModelError
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration
from tinyaudio.model.verify import Written
from tinyaudio.transcribe import Transcriber

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL = LlamaConfig(**SIZES, vocab_size=49_152, num_key_value_heads=2, eos_token_id=None)


def test_one_model_is_loaded_for_both_ways(checkpoint, monkeypatch):
    """Two would double the peak memory that is reported."""
    loads = []
    load = TinyAudioForConditionalGeneration.load_frozen_parts
    monkeypatch.setattr(TinyAudioForConditionalGeneration, "load_frozen_parts", lambda *a: loads.append(1) or load(*a))
    monkeypatch.setattr(bench_transcribe, "_compare", lambda *a, **kw: {})
    measure(str(checkpoint), "cpu", num_utterances=1)
    assert loads == [1]


@pytest.mark.filterwarnings("ignore:.*truncated:UserWarning")
def test_both_ways_are_measured_side_by_side_at_equal_text(model, checkpoint):
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_new_tokens": 3}))
    bench = measure(str(checkpoint), "cpu", num_utterances=3, batch_size=2, repeats=1)
    assert bench["same_text"] is True
    assert set(bench["by_beams"]) == {"1", "4"}
    assert bench["batched_vs_single"] == min(speed["ratio"] for speed in bench["by_beams"].values())
    assert bench["rtfx"] == bench["by_beams"]["1"]["batched"] > 0
    assert bench["peak_rss_bytes"] > 1e8
    assert bench["peak_gpu_bytes"] is None
    assert bench["drafts"] == {}, "this model has no drafter"
    for speed in bench["by_beams"].values():
        assert set(speed["shares"]) == set(PARTS)
        assert sum(speed["shares"].values()) == pytest.approx(1, abs=0.01)
        assert min(speed["shares"].values()) > 0


def test_drafts_are_measured_against_generate_at_equal_text(with_head, processor, spoken, monkeypatch):
    with_head.add_token_ctc(torch.arange(2, 50))
    monkeypatch.setattr(bench_drafts, "smollm2_135m", lambda: SMALL)
    monkeypatch.setattr(bench_drafts, "BUDGET", 6)
    transcriber = Transcriber(with_head, processor)
    monkeypatch.setattr(bench_drafts, "_transcribe", lambda *_: 1.0)
    found = bench_drafts.measure_drafts(transcriber, [samples for samples, _ in spoken[:3]], 1)
    rows = [f"{kind}, batch {size}" for size in (1, 16) for kind in ("projector", "encoder", "transcribe")]
    assert set(found) == {*rows, "135 M, batch 1"}
    for name, row in found.items():
        if not name.startswith("transcribe"):
            assert row["same_text"] == 1
            assert row["speedup"] > 0
            assert row["passes_per_token"] + row["accepted_share"] == pytest.approx(1, abs=0.002)


def test_the_larger_decoder_repeats_the_passes_that_were_measured(monkeypatch):
    monkeypatch.setattr(bench_drafts, "smollm2_135m", lambda: SMALL)
    like = [Written(token_ids=[0] * 12, num_passes=passes) for passes in (1, 2, 3)]
    found = bench_drafts.measure_large(like, 20, 1)
    assert found["same_text"] == 1
    assert found["passes"] == pytest.approx(2, abs=0.4)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_full_size_runs_at_random_weights(model, monkeypatch, num_beams):
    """Tiny shapes here. Texts are those of a script and end with it, so nothing is decoded twice."""
    model.decoder.resize_token_embeddings(640)  # the bundled tokenizer's
    monkeypatch.setattr(bench_transcribe, "full_size_model", lambda device: model)
    compare = bench_transcribe._compare
    monkeypatch.setattr(bench_transcribe, "_compare", lambda *a, **kw: compare(*a, **kw | {"beams": (num_beams,)}))
    asked = []
    generate = type(model).generate
    monkeypatch.setattr(type(model), "generate", lambda self, **kw: asked.append(generate(self, **kw)) or asked[-1])
    bench = measure_full_size("cpu")
    assert len(asked) == 1 + 2 + 1 + 1, "warm-up, one by one, batched, and batched once more for the shares"
    assert {tokens.shape[1] for tokens in asked} == {7}
    assert len({tuple(row) for tokens in asked for row in tokens.tolist()}) == 1
    assert bench["same_text"] is None
    assert bench["audio_s"] == 4.0
    assert "random weights" in bench["model"]


def test_too_little_memory_for_the_full_size_is_one_line(monkeypatch):
    monkeypatch.setattr(bench_transcribe, "FULL_SIZE_BYTES", 10**18)
    with pytest.raises(ModelError, match=r"needs 1000000000.0 GB of memory on cpu, .* are free") as raised:
        measure_full_size("cpu")
    assert "\n" not in str(raised.value)
