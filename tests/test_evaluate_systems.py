"""Other systems under evaluation: CTC heads, any model of the hub, Whisper."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_hubert_config
from evaluations import answers, noise_clips  # noqa: F401 (a fixture)
from tiny_encoders import save_ctc, save_encoder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoFeatureExtractor,
    AutoModelForCTC,
    AutoTokenizer,
    HubertForCTC,
    Wav2Vec2FeatureExtractor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizerFast,
)

from pipelines.errors import EvaluationError
from pipelines.evaluate.eval_sets import Clip, Utterance, open_eval_set
from pipelines.evaluate.providers.base import ProviderOptions
from pipelines.evaluate.providers.registry import open_provider
from pipelines.evaluate.stage import evaluate, evaluation_name
from pipelines.recipes.recipe import CorpusSection
from tinyaudio.model.encoder import load_encoder, load_encoder_with_head
from tinyaudio.model.frozen import weights_digest
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration
from tinyaudio.model.processing_tinyaudio import TinyAudioProcessor
from tinyaudio.transcribe import Transcriber


def first_clips(corpus: Path) -> list[Clip]:
    found = open_eval_set(CorpusSection(path=str(corpus)), split="test")
    return [clip for clips, _ in found.load({f"utt-{i}" for i in range(4)}) for clip in clips]


def test_the_encoders_own_head_is_a_control(corpus: Path, ctc_folder: Path, tmp_path: Path) -> None:
    texts = []
    for batch_size in (1, 5):
        provider = open_provider("ctc", ProviderOptions(model=str(ctc_folder), device="cpu", batch_size=batch_size))
        evaluate(provider, open_eval_set(CorpusSection(path=str(corpus)), split="test"), tmp_path / str(batch_size))
        texts.append(answers(tmp_path / str(batch_size)))
    assert texts[0] == texts[1]
    assert not any("<" in text for text in texts[0].values())


def test_the_projectors_own_head_is_a_control(
    corpus: Path,
    model: TinyAudioForConditionalGeneration,
    processor: TinyAudioProcessor,
    tmp_path: Path,
) -> None:
    torch.manual_seed(3)
    model.add_token_ctc(torch.arange(20, 60))
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    texts = []
    for batch_size in (1, 5):
        options = ProviderOptions(model=str(folder), device="cpu", batch_size=batch_size)
        provider = open_provider("projector", options)
        evaluate(provider, open_eval_set(CorpusSection(path=str(corpus)), split="test"), tmp_path / str(batch_size))
        texts.append(answers(tmp_path / str(batch_size)))
    assert texts[0] == texts[1]
    assert provider.identity()["decoding"] == "greedy, projector alone"
    for clip in first_clips(corpus):
        projected, lengths = model.project(*model.encode(**processor(clip.samples)))
        (path,) = model.token_ctc.best_path(projected, lengths, model.get_input_embeddings().weight)
        assert path
        assert set(path) <= set(range(20, 60))
        assert texts[0][clip.utterance_id] == processor.tokenizer.decode(path).strip()


def test_the_choice_among_the_best_texts_of_ctc_is_evaluated(
    corpus: Path, model: TinyAudioForConditionalGeneration, processor: TinyAudioProcessor, tmp_path: Path
) -> None:
    """It is another system than the one that writes: it has its own folder, and its own identity."""
    torch.manual_seed(3)
    model.add_token_ctc(torch.arange(20, 60))
    model.config.ctc_weight = 0.3
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    options = ProviderOptions(model=str(folder), device="cpu", ctc_nbest=4)
    eval_set = open_eval_set(CorpusSection(path=str(corpus)), split="test")
    assert evaluation_name("tinyaudio", eval_set, options).endswith("-nbest4")
    provider = open_provider("tinyaudio", options)
    evaluate(provider, eval_set, tmp_path / "nbest")
    assert provider.identity()["decoding"]["ctc_nbest"] == 4
    expected = Transcriber.load(folder, device="cpu").transcribe([c.samples for c in first_clips(corpus)], ctc_nbest=4)
    texts = answers(tmp_path / "nbest")
    assert [texts[clip.utterance_id] for clip in first_clips(corpus)] == [one.text for one in expected]
    with pytest.raises(EvaluationError, match="--ctc-nbest and --no-guard"):
        open_provider("tinyaudio", ProviderOptions(model=str(folder), ctc_nbest=4, guard=False))


def test_a_projector_without_a_head_is_refused(checkpoint: Path) -> None:
    with pytest.raises(EvaluationError, match=r"has no CTC head; expected a run with train.ctc_steps"):
        open_provider("projector", ProviderOptions(model=str(checkpoint), device="cpu"))
    with pytest.raises(EvaluationError, match="does not take --num-beams"):
        open_provider("projector", ProviderOptions(model=str(checkpoint), num_beams=4))


def test_an_encoder_without_a_head_is_refused(encoder_folder: Path) -> None:
    with pytest.raises(EvaluationError, match="has no CTC head"):
        open_provider("ctc", ProviderOptions(model=str(encoder_folder)))


def test_a_checkpoint_with_whisper_has_no_head_to_score(tmp_path: Path) -> None:
    folder = save_encoder("whisper", tmp_path / "whisper")
    with pytest.raises(EvaluationError, match="has no CTC head, as no whisper model has"):
        open_provider("ctc", ProviderOptions(model=str(folder)))


@pytest.mark.parametrize("name", ["w2v_bert", "wavlm"])
def test_heads_of_other_families_answer_as_transformers_does(name: str, corpus: Path, tmp_path: Path) -> None:
    folder, clips = save_ctc(name, tmp_path / name), first_clips(corpus)
    provider = open_provider("ctc", ProviderOptions(model=str(folder), device="cpu", batch_size=3))
    found = {answer.utterance_id: answer.pred_text for answer in provider.transcribe(clips)}
    model, extractor = AutoModelForCTC.from_pretrained(folder).eval(), AutoFeatureExtractor.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for clip in clips:
        inputs = extractor([clip.samples], sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            ids = model(**inputs).logits.argmax(-1)[0].tolist()
        if name == "w2v_bert":  # it also computes half a frame at the end, and masks it
            ids = ids[: int(inputs["attention_mask"].sum())]
        text = tokenizer.decode(ids)
        for token in tokenizer.all_special_tokens:
            text = text.replace(token, "")
        assert found[clip.utterance_id] == " ".join(text.split())
    encoder, head = load_encoder_with_head(str(folder))
    assert head is not None
    assert weights_digest(encoder) == weights_digest(load_encoder(str(folder)))


def test_any_hub_model_runs_through_the_stock_pipeline_and_agrees_with_our_control(
    corpus: Path, ctc_folder: Path
) -> None:
    clips = first_clips(corpus)
    options = ProviderOptions(model=str(ctc_folder), device="cpu", batch_size=1)
    ours, theirs = (
        {answer.utterance_id: answer.pred_text for answer in open_provider(name, options).transcribe(clips)}
        for name in ("ctc", "hf")
    )
    assert len(theirs) == 4
    for name, text in theirs.items():
        assert text is not None
        for token in ("<pad>", "<s>", "</s>", "<unk>"):
            text = text.replace(token, "")
        assert " ".join(text.split()) == ours[name]


@pytest.fixture(scope="session")
def whisper_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Whisper of the real class: multilingual, windows of 30 s, timestamps in steps of 0.02 s."""
    folder = tmp_path_factory.mktemp("whisper")
    start = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>"]
    start += ["<|startofprev|>", "<|nospeech|>", "<|notimestamps|>", *(f"<|{i / 50:.2f}|>" for i in range(1501))]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    base.pre_tokenizer, base.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = WhisperTokenizerFast(tokenizer_object=base, unk_token="<|endoftext|>", bos_token="<|endoftext|>",
                                     eos_token="<|endoftext|>", pad_token="<|endoftext|>")  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": start[:9]})
    tokenizer.add_tokens(start[9:])
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in start}
    eos = ids["<|endoftext|>"]
    config = WhisperConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=80,
        pad_token_id=eos, bos_token_id=eos, eos_token_id=eos, decoder_start_token_id=ids["<|startoftranscript|>"],
        max_target_positions=64,
    )  # fmt: skip
    torch.manual_seed(6)
    model = WhisperForConditionalGeneration(config)
    settings = {
        "is_multilingual": True,
        "lang_to_id": {name: ids[name] for name in ("<|en|>", "<|de|>")},
        "task_to_id": {name: ids[f"<|{name}|>"] for name in ("translate", "transcribe")},
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "max_initial_timestamp_index": 50,
        "_from_model_config": False,
    }
    for name, value in settings.items():  # `update` would drop what plain generation configurations lack
        setattr(model.generation_config, name, value)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


def test_whisper_is_given_the_language_and_takes_clips_beyond_its_window(
    whisper_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[dict[str, Any]] = []
    generate = WhisperForConditionalGeneration.generate

    def listen(self: Any, *inputs: Any, **options: Any) -> Any:
        told.append(options)
        return generate(self, *inputs, **options)

    monkeypatch.setattr(WhisperForConditionalGeneration, "generate", listen)
    rng = np.random.default_rng(2)
    clips = [
        Clip(
            utterance=Utterance(utterance_id=str(seconds), source_id=""),
            samples=(0.1 * rng.standard_normal(16_000 * seconds)).astype(np.float32),
        )
        for seconds in (2, 3, 34)
    ]
    provider = open_provider("hf", ProviderOptions(model=str(whisper_folder), device="cpu", max_new_tokens=8))
    answers = {answer.utterance_id: answer for answer in provider.transcribe(clips)}
    assert {name: answer.error for name, answer in answers.items()} == {"2": None, "3": None, "34": None}
    assert [options.get("return_timestamps", False) for options in told] == [True, False]
    assert {(options["language"], options["task"]) for options in told} == {("en", "transcribe")}
    assert provider.identity()["decoding"] == {"language": "en", "task": "transcribe", "max_new_tokens": 8}


def test_an_encoder_with_group_norm_answers_the_same_in_any_batch(
    corpus: Path, tmp_path: Path, ctc_folder: Path
) -> None:
    folder = tmp_path / "group"
    shutil.copytree(ctc_folder, folder, ignore=shutil.ignore_patterns("eval"))
    torch.manual_seed(5)
    HubertForCTC(
        tiny_hubert_config(vocab_size=32, feat_extract_norm="group", do_stable_layer_norm=False)
    ).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=False).save_pretrained(folder)
    clips = first_clips(corpus)
    texts = []
    for batch_size in (1, 4):
        provider = open_provider("hf", ProviderOptions(model=str(folder), device="cpu", batch_size=batch_size))
        texts.append({answer.utterance_id: answer.pred_text for answer in provider.transcribe(clips)})
    assert texts[0] == texts[1]


def test_a_provider_of_another_name_is_refused() -> None:
    with pytest.raises(EvaluationError, match="no provider 'deepgram'; expected one of tinyaudio, ctc, projector, hf"):
        open_provider("deepgram", ProviderOptions())


def test_a_provider_refuses_options_that_it_would_ignore(ctc_folder: Path) -> None:
    with pytest.raises(
        EvaluationError, match="provider 'ctc' does not take --num-beams; it takes --revision, --device"
    ):
        open_provider("ctc", ProviderOptions(model=str(ctc_folder), num_beams=4))
    with pytest.raises(EvaluationError, match="provider 'hf' does not take --no-guard"):
        open_provider("hf", ProviderOptions(model=str(ctc_folder), guard=False))
    with pytest.raises(EvaluationError, match="provider 'assemblyai' does not take --batch-size"):
        open_provider("assemblyai", ProviderOptions(api_key="x", batch_size=2))
    with pytest.raises(EvaluationError, match="provider 'tinyaudio' does not take --api-key, --concurrency"):
        open_provider("tinyaudio", ProviderOptions(api_key="x", concurrency=2))
