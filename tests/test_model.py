"""The model: invariants 2 to 6 of the design, on tiny random parts of the real classes."""

import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_hubert_config
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    HubertConfig,
    HubertModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from tinyaudio.model.configuration_tinyaudio import TinyAudioConfig
from tinyaudio.model.encoder import load_encoder
from tinyaudio.model.errors import MissingModelError, ModelError
from tinyaudio.model.frozen import place, weights_digest
from tinyaudio.model.modeling_tinyaudio import TRAVELLING, TinyAudioForConditionalGeneration
from tinyaudio.model.prompt import transcript_ids
from tinyaudio.transcribe import Transcriber

TRANSCRIPTS = ["the cat sat", "a dog", "", "the cat and a dog on the mat"]


def make_labels(tokenizer, transcripts):
    rows = [torch.tensor(transcript_ids(tokenizer, text)) for text in transcripts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


@pytest.fixture
def batch(processor, noise):
    return processor([noise(s) for s in (1.0, 0.31, 0.01, 2.2)])


def test_cached_features_give_the_live_loss(model, batch, tokenizer):
    labels = make_labels(tokenizer, TRANSCRIPTS)
    live = model(**batch, labels=labels).loss
    features, num_frames = model.encode(**batch)
    cached = model(features=features.half(), num_frames=num_frames, labels=labels).loss
    assert abs(live - cached) < 1e-3
    assert torch.equal(live, model(features=features, num_frames=num_frames, labels=labels).loss)


def test_batched_loss_is_the_mean_over_single_utterances(model, processor, noise, tokenizer):
    recordings = [noise(s) for s in (1.0, 0.31, 0.05, 2.2)]
    together = model(**processor(recordings), labels=make_labels(tokenizer, TRANSCRIPTS), num_items_in_batch=1).loss
    alone = [
        model(**processor([samples]), labels=make_labels(tokenizer, [text]), num_items_in_batch=1).loss
        for samples, text in zip(recordings, TRANSCRIPTS, strict=True)
    ]
    assert abs(together - sum(alone)) < 1e-5 * abs(together)


def test_gradient_reaches_the_projector_only(model, batch, tokenizer):
    before = weights_digest(model.encoder), weights_digest(model.decoder)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"projector.{n}" for n, _ in model.projector.named_parameters()
    }
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(**batch, labels=make_labels(tokenizer, TRANSCRIPTS)).loss
        loss.backward()
        optimizer.step()
    assert (weights_digest(model.encoder), weights_digest(model.decoder)) == before
    assert all(p.grad is None for part in (model.encoder, model.decoder) for p in part.parameters())


def test_encoder_stays_in_eval_mode_when_the_model_trains(model, batch):
    model.train()
    assert not any(module.training for module in model.encoder.modules())
    first, second = model.encode(**batch)[0], model.encode(**batch)[0]
    assert torch.equal(first, second), "dropout or SpecAugment is on"


def test_encoder_in_training_mode_is_refused(model, batch):
    model.encoder.train()
    with pytest.raises(AssertionError, match="training mode"):
        model.encode(**batch)


def test_projector_stays_float32_under_bf16_autocast(model, batch, tokenizer):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch, labels=make_labels(tokenizer, TRANSCRIPTS)).loss
    loss.backward()
    assert {p.dtype for p in model.projector.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.projector.parameters()} == {torch.float32}


def test_checkpointed_activations_give_the_same_gradient(model, batch, tokenizer):
    labels = make_labels(tokenizer, TRANSCRIPTS)

    def gradient():
        model.zero_grad()
        model.train()
        model(**batch, labels=labels).loss.backward()
        return [p.grad.clone() for p in model.projector.parameters()]

    plain = gradient()
    assert not model.decoder.training
    model.checkpoint_activations()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain, gradient(), strict=True))
    assert model.decoder.training, "transformers checkpoints in training mode only"


def test_autocast_does_not_reach_a_float32_encoder(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model.encode(**batch)[0]
    assert torch.equal(inside, model.encode(**batch)[0])


def test_generation_sees_the_prompt_that_training_saw(model, batch, tokenizer):
    """Decoding's first step must give every token the probability that training gives it after the prompt."""
    found = model.generate(**batch, num_beams=1, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
    for row in range(2):  # padded to different lengths
        one = {name: values[row : row + 1] for name, values in batch.items()}
        losses = [model(**one, labels=torch.tensor([[token]])).loss for token in range(len(tokenizer))]
        expected = found.logits[0][row].log_softmax(-1)
        torch.testing.assert_close(-torch.stack(losses), expected, rtol=1e-4, atol=1e-5)


def test_checkpoint_holds_the_projector_and_nothing_frozen(checkpoint):
    from safetensors import safe_open

    with safe_open(checkpoint / "model.safetensors", "pt") as weights:
        assert all(key.startswith("projector.") for key in weights.keys())  # noqa: SIM118  (safe_open is not a dict)
    assert {p.name for p in checkpoint.glob("*.py")} == set(TRAVELLING)


def test_travelling_modules_are_a_closed_set_with_soft_dependencies_only():
    from transformers.dynamic_module_utils import get_relative_import_files

    import tinyaudio.model.modeling_tinyaudio as entry

    needed = {Path(f).name for f in get_relative_import_files(entry.__file__)} | {Path(entry.__file__).name}
    assert needed == set(TRAVELLING)


def test_saved_model_loads_back_the_same(model, checkpoint, batch):
    loaded = TinyAudioForConditionalGeneration.from_pretrained(checkpoint)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    options = {"max_new_tokens": 8}
    assert torch.equal(model.generate(**batch, **options), loaded.generate(**batch, **options))
    assert loaded.generation_config.num_beams == 4


def test_checkpoint_without_projector_weights_is_refused(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    weights.pop("projector.linear_out.weight")
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="linear_out"):
        TinyAudioForConditionalGeneration.from_pretrained(checkpoint)


def test_another_encoder_than_the_one_trained_with_is_refused(model, processor, tmp_path, batch):
    model.config.encoder_digest = weights_digest(model.encoder)
    model.save_pretrained(tmp_path / "model")
    torch.manual_seed(9)
    HubertModel(tiny_hubert_config()).save_pretrained(tmp_path / "other")
    load = TinyAudioForConditionalGeneration.from_pretrained
    assert load(tmp_path / "model")
    with pytest.raises(ModelError, match="trained with"):
        load(tmp_path / "model", encoder_id=str(tmp_path / "other"))
    assert load(tmp_path / "model", encoder_id=str(tmp_path / "other"), encoder_digest=None)


def test_missing_checkpoint_and_missing_parts_are_one_line(checkpoint, tmp_path):
    load = TinyAudioForConditionalGeneration.from_pretrained
    with pytest.raises(MissingModelError, match="no tinyaudio model"):
        load(tmp_path / "nowhere")
    with pytest.raises(MissingModelError, match="expected a model folder"):
        load(checkpoint, encoder_id="./nowhere")


def test_encoder_with_other_frames_is_refused(tmp_path, feature_extractor):
    HubertModel(tiny_hubert_config(conv_stride=(5, 2, 2, 2, 2, 2, 1))).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="hop 160"):
        load_encoder(str(tmp_path))


def test_process_without_tinyaudio_transcribes_with_the_checkpoint(checkpoint, model, processor, spoken, tmp_path):
    """No tinyaudio on the path: code, processor and pipeline come from the folder; no ffmpeg either (empty PATH)."""
    import soundfile

    samples = spoken[0][0]
    soundfile.write(tmp_path / "speech.wav", samples, 16_000, subtype="FLOAT")
    script = (
        "import sys; sys.modules['tinyaudio'] = None\n"
        "from transformers import pipeline, AutoProcessor, AutoModelForSpeechSeq2Seq\n"
        f"asr = pipeline('automatic-speech-recognition', model={str(checkpoint)!r}, trust_remote_code=True)\n"
        f"path = {str(tmp_path / 'speech.wav')!r}\n"
        "import soundfile\n"
        "samples, rate = soundfile.read(path, dtype='float32')\n"
        "few = {'max_new_tokens': 8, 'num_beams': 1}\n"
        "texts = [asr(path, **few), asr(open(path, 'rb').read(), **few),\n"
        "         asr({'raw': samples, 'sampling_rate': rate}, generate_kwargs=few),\n"
        "         *asr([path, samples], batch_size=2, **few)]\n"
        "assert len({t['text'] for t in texts}) == 1, texts\n"
        f"processor = AutoProcessor.from_pretrained({str(checkpoint)!r}, trust_remote_code=True)\n"
        f"again = {str(tmp_path / 'again')!r}; asr.model.save_pretrained(again); processor.save_pretrained(again)\n"
        "again = AutoModelForSpeechSeq2Seq.from_pretrained(again, trust_remote_code=True)\n"
        "print('TEXT', repr(texts[0]['text']))\n"
    )
    env = {"PATH": "/nonexistent", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300
    )
    assert result.returncode == 0, result.stderr
    expected = Transcriber(model, processor).transcribe([samples], max_new_tokens=8, num_beams=1)[0].text
    assert expected
    assert f"TEXT {expected!r}" in result.stdout


def test_pipeline_refuses_times_of_words_without_a_head(asr, noise):
    with pytest.raises(ValueError, match="expected an encoder with a CTC head"):
        asr(noise(0.5), return_timestamps="word")


def test_default_projector_at_full_size_has_14684160_parameters():
    full = TinyAudioForConditionalGeneration(TinyAudioConfig())
    assert sum(p.numel() for p in full.parameters()) == 14_684_160
    half = TinyAudioForConditionalGeneration(TinyAudioConfig(projector_hidden_size=1024))
    assert sum(p.numel() for p in half.parameters()) == 7_343_104


def hubert_large_config() -> HubertConfig:
    return HubertConfig(
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        conv_bias=True,
    )


@pytest.mark.slow
def test_full_size_parts_fit_together():
    encoder = HubertModel(hubert_large_config())
    assert sum(p.numel() for p in encoder.parameters()) == 315_438_720
    with torch.device("meta"):
        decoder = SmolLM3ForCausalLM(SmolLM3Config())
    assert sum(p.numel() for p in decoder.parameters()) == 3_075_098_624
    model = TinyAudioForConditionalGeneration(TinyAudioConfig(), encoder=encoder, decoder=decoder)
    values = torch.from_numpy(np.zeros((1, 16_000), np.float32))
    features, (frames,) = model.encode(values, torch.ones_like(values, dtype=torch.long))
    assert features.shape == (1, 49, 1024)
    assert frames == 49
    assert model.projector(features).shape == (1, 10, 2048)


def test_another_copy_of_a_part_does_not_inherit_the_originals_revision(checkpoint, config, decoder_folder):
    """A commit of the original's repository does not exist in the other's."""
    stored = json.loads((checkpoint / "config.json").read_text())
    pins = {"encoder_revision": "a" * 40, "decoder_revision": "b" * 40}
    (checkpoint / "config.json").write_text(json.dumps({**stored, **pins}))
    load = TinyAudioForConditionalGeneration.from_pretrained
    model = load(checkpoint, decoder_id=str(decoder_folder), encoder_id=config.encoder_id, encoder_revision="mine")
    assert (model.config.encoder_revision, model.config.decoder_revision) == ("mine", None)
    assert load(checkpoint).config.decoder_revision == "b" * 40


def test_dtype_that_torch_does_not_have_is_one_clear_line(checkpoint):
    with pytest.raises(ModelError, match=r"expected a dtype of float32, bfloat16 or float16, found 'fp16'"):
        TinyAudioForConditionalGeneration.from_pretrained(checkpoint, dtype="fp16")


def test_placing_a_model_on_a_gpu_switches_cudnn_attention_off(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda is_on: calls.append(is_on))
    monkeypatch.setattr(torch.nn.Linear, "to", lambda self, device: calls.append(device) or self)
    module = torch.nn.Linear(2, 2)
    assert place(module, "cpu") is module
    assert place(module, torch.device("cuda", 1)) is module
    assert calls == [torch.device("cpu"), False, torch.device("cuda", 1)]


def test_models_are_moved_in_one_place():
    root = Path(__file__).parents[1]
    moved = re.compile(r"(model|encoder|decoder|loaded|module|\))\.(to\((self\.)?(device|where|pick_device)|cuda\()")
    found = {
        f"{path.relative_to(root)}: {line.strip()}"
        for package in ("tinyaudio", "pipelines")
        for path in (root / package).rglob("*.py")
        for line in path.read_text().splitlines()
        if moved.search(line)
    }
    loss_head = "pipelines/bench/train.py: head = nn.Linear(LOSS_WIDTH, VOCABULARY, bias=False)"
    rest = {line for line in found if not line.startswith(loss_head) and "torch.from_numpy" not in line}
    assert rest == {"tinyaudio/model/frozen.py: return module.to(device)"}


def test_generation_puts_its_options_into_the_configuration(model, batch, monkeypatch):
    """transformers deprecates a generation_config beside options."""
    seen = []
    features, num_frames = model.encode(batch["input_values"], batch["attention_mask"])
    monkeypatch.setattr(type(model.decoder), "generate", lambda self, **kwargs: seen.append(kwargs))
    criteria = object()
    model.generate(features=features, num_frames=num_frames, num_beams=3, max_new_tokens=7, stopping_criteria=criteria)
    (kwargs,) = seen
    assert kwargs.keys() == {"inputs_embeds", "attention_mask", "generation_config", "stopping_criteria"}
    assert (kwargs["generation_config"].num_beams, kwargs["generation_config"].max_new_tokens) == (3, 7)
    assert model.generation_config.num_beams == 4


def test_a_ctc_head_that_the_encoder_does_not_use_is_not_reported(ctc_folder, caplog):
    logger = logging.getLogger("transformers")
    level, logger.propagate = logger.level, True
    logger.setLevel(logging.WARNING)
    try:
        AutoModel.from_pretrained(ctc_folder)
        assert "lm_head" in caplog.text, "transformers' own report"
        caplog.clear()
        load_encoder(str(ctc_folder))
        assert caplog.text == ""
        weights = load_file(ctc_folder / "model.safetensors")
        other = ctc_folder.with_name("other-weights")
        shutil.copytree(ctc_folder, other)
        save_file({**weights, "surprise.weight": torch.zeros(2)}, other / "model.safetensors", {"format": "pt"})
        load_encoder(str(other))
        assert "surprise.weight" in caplog.text
    finally:
        logger.setLevel(level)
        logger.propagate = False
