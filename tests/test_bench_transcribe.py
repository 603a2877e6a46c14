"""`bench transcribe`: both ways do the same work, the keys others read are numbers, lack of memory is one line."""

import json

import pytest

from pipelines.bench import transcribe as bench_transcribe
from pipelines.bench.transcribe import format_table, measure, measure_full_size
from tinyaudio.model.errors import ModelError
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration


def test_one_model_is_loaded_for_both_ways(checkpoint, monkeypatch):
    """Two would double the peak memory that is reported."""
    loads = []
    load = TinyAudioForConditionalGeneration.load_frozen_parts
    monkeypatch.setattr(TinyAudioForConditionalGeneration, "load_frozen_parts", lambda *a: loads.append(1) or load(*a))
    monkeypatch.setattr(bench_transcribe, "_race", lambda *a, **kw: None)
    measure(str(checkpoint), "cpu", num_utterances=1)
    assert loads == [1]


@pytest.mark.filterwarnings("ignore:.*truncated:UserWarning")
def test_both_ways_are_measured_side_by_side_at_equal_text(model, checkpoint):
    path = checkpoint / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_new_tokens": 3}))
    bench = measure(str(checkpoint), "cpu", num_utterances=3, batch_size=2, repeats=1)
    assert bench.same_text
    assert set(bench.by_beams) == {"1", "4"}
    assert bench.batched_vs_single == min(speed.ratio for speed in bench.by_beams.values())
    assert bench.rtfx == bench.by_beams["1"].batched > 0
    assert bench.peak_rss_bytes > 1e8
    assert bench.peak_gpu_bytes is None
    for speed in bench.by_beams.values():
        assert sum(speed.shares.values()) == pytest.approx(1, abs=0.01)


def test_full_size_runs_at_random_weights(model, monkeypatch):
    """On tiny shapes here: texts end when they should, so that nothing is decoded twice."""
    monkeypatch.setattr(bench_transcribe, "full_size_model", lambda device: model)
    asked = []
    generate = type(model).generate
    monkeypatch.setattr(type(model), "generate", lambda self, **kw: asked.append(kw) or generate(self, **kw))
    bench = measure_full_size("cpu")
    assert len(asked) == 1 + 2 + 1 + 1, "warm-up, one by one, batched, and batched once more for the shares"
    assert bench.same_text is None
    assert bench.audio_s == 4.0
    assert "random weights" in format_table({**vars(bench), "by_beams": {"1": vars(bench.by_beams["1"])}})


def test_too_little_memory_for_the_full_size_is_one_line(monkeypatch):
    monkeypatch.setattr(bench_transcribe, "FULL_SIZE_BYTES", 10**18)
    with pytest.raises(ModelError, match=r"needs 1000000000.0 GB of memory on cpu, where .* are free") as raised:
        measure_full_size("cpu")
    assert "\n" not in str(raised.value)
