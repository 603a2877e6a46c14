"""Tiny random models of the real classes, tones, and folders that the tests share. No network, no GPU."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # two busy-waiting pools on two cores run five times slower

import numpy as np
import pytest
import torch
from bundled import DEMO, utterances
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    HubertConfig,
    HubertForCTC,
    HubertModel,
    Pipeline,
    PreTrainedTokenizerFast,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    pipeline,
)

from tinyaudio.cli import main
from tinyaudio.model.configuration_tinyaudio import TinyAudioConfig
from tinyaudio.model.encoder import load_encoder_with_head, load_feature_extractor
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration
from tinyaudio.model.processing_tinyaudio import TinyAudioProcessor
from tinyaudio.model.prompt import prompt_ids
from tinyaudio.transcribe import Transcriber

# Started in the background of a shell, a suite ignores SIGINT, and so would every command that a test interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

ENCODER_DIM, DECODER_DIM = 32, 48


def tiny_hubert_config(**changes: object) -> HubertConfig:
    """A HuBERT of real kernels and strides (so real frame counts) and toy widths."""
    settings = {
        "hidden_size": ENCODER_DIM,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "conv_dim": (8,) * 7,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "conv_bias": True,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
        "mask_time_prob": 0.5,
        "hidden_dropout": 0.3,
    }
    return HubertConfig(**{**settings, **changes})


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end_of_text|>", "<|finetune_right_pad_id|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["Speech:\nTranscript: the cat sat on the mat", "a dog and a cat"] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end_of_text|>", pad_token="<|finetune_right_pad_id|>", padding_side="right"
    )


@pytest.fixture(scope="session")
def feature_extractor() -> Wav2Vec2FeatureExtractor:
    return Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory, feature_extractor: Wav2Vec2FeatureExtractor) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    HubertModel(tiny_hubert_config()).save_pretrained(folder)
    feature_extractor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def ctc_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random HuBERT with a head of letters, as fine-tuned ones are."""
    folder = tmp_path_factory.mktemp("ctc")
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz'"]
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    torch.manual_seed(4)
    HubertForCTC(tiny_hubert_config(vocab_size=len(letters))).save_pretrained(folder)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    Wav2Vec2Processor(extractor, Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))).save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(1)
    config = SmolLM3Config(
        hidden_size=DECODER_DIM,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    SmolLM3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config(encoder_folder: Path, decoder_folder: Path, tokenizer: PreTrainedTokenizerFast) -> TinyAudioConfig:
    prefix, suffix = prompt_ids(tokenizer)
    return TinyAudioConfig(
        encoder_id=str(encoder_folder),
        encoder_dim=ENCODER_DIM,
        decoder_id=str(decoder_folder),
        decoder_dim=DECODER_DIM,
        decoder_dtype="float32",
        projector_hidden_size=40,
        prompt_prefix_ids=prefix,
        prompt_suffix_ids=suffix,
        eos_token_id=0,
        pad_token_id=1,
    )


@pytest.fixture
def model(config: TinyAudioConfig) -> TinyAudioForConditionalGeneration:
    torch.manual_seed(2)
    built = TinyAudioForConditionalGeneration(config)
    built.load_frozen_parts()
    return built.eval()


@pytest.fixture
def processor(feature_extractor: Wav2Vec2FeatureExtractor, tokenizer: PreTrainedTokenizerFast) -> TinyAudioProcessor:
    return TinyAudioProcessor(feature_extractor, tokenizer)


@pytest.fixture
def checkpoint(model: TinyAudioForConditionalGeneration, processor: TinyAudioProcessor, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def transcriber(model: TinyAudioForConditionalGeneration, processor: TinyAudioProcessor) -> Transcriber:
    """The tiny model, with windows of four seconds."""
    model.config.window_s = 4.0
    return Transcriber(model, processor, name="tiny")


@pytest.fixture(scope="session")
def spoken() -> list[tuple[np.ndarray, str]]:
    """Twenty bundled test utterances: (samples at 16 kHz, transcript). All of them contain speech."""
    return [(samples, text) for _, text, samples in utterances("test", 20)]


def with_pauses(recordings: Iterable[np.ndarray], pause_s: float = 0.75) -> np.ndarray:
    """Join recordings, with silence after each."""
    pause = np.zeros(int(pause_s * 16_000), np.float32)
    return np.concatenate([part for samples in recordings for part in (samples, pause)])


@pytest.fixture
def talk(tmp_path: Path, spoken: list[tuple[np.ndarray, str]]) -> Path:
    """The first of `spoken` as a WAV file."""
    import soundfile

    path = tmp_path / "talk.wav"
    soundfile.write(path, spoken[0][0], 16_000, subtype="FLOAT")
    return path


@pytest.fixture
def noise() -> "NoiseMaker":
    return NoiseMaker(seed=0)


class NoiseMaker:
    """Seeded recordings: the n-th call always gives the same samples."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def __call__(self, duration_s: float, sampling_rate: int = 16_000) -> np.ndarray:
        return (0.1 * self._rng.standard_normal(int(duration_s * sampling_rate))).astype(np.float32)


WORDS = ["the cat sat", "a dog", "on the mat", "the cat and a dog", "a mat", "the dog sat on the cat"]


def write_folder_corpus(root: Path, noise: NoiseMaker, sizes: dict[str, int]) -> Path:
    """An audiofolder corpus of noise with transcripts: `<split>/metadata.csv` and WAV files."""
    import csv

    import soundfile

    for split, size in sizes.items():
        folder = root / split
        folder.mkdir(parents=True)
        with (folder / "metadata.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["file_name", "text"])
            for i in range(size):
                soundfile.write(folder / f"{i:03}.wav", noise(0.3 + 0.13 * (i % 11)), 16_000)
                rows.writerow([f"{i:03}.wav", WORDS[i % len(WORDS)]])
    return root


@pytest.fixture
def corpus_folder(tmp_path: Path, noise: NoiseMaker) -> Path:
    return write_folder_corpus(tmp_path / "corpus", noise, {"train": 40, "dev": 8, "test": 6})


@pytest.fixture
def recipe_file(tmp_path: Path, corpus_folder: Path, encoder_folder: Path, decoder_folder: Path) -> Path:
    return write_recipe(tmp_path / "tiny.toml", corpus_folder, encoder_folder, decoder_folder)


@pytest.fixture
def store(recipe_file: Path, tmp_path: Path) -> Path:
    """The finished store of `recipe_file`: 48 utterances in 3 shards of float16."""
    from extractions import stage_one

    stage_one(recipe_file, tmp_path / "store")
    return tmp_path / "store"


def write_recipe(path: Path, corpus_folder: Path, encoder_folder: Path, decoder_folder: Path) -> Path:
    """A recipe over the tiny parts: 1,024 frames a shard (20 s), 6 steps."""
    path.write_text(
        f"""
        [corpus]
        path = "{corpus_folder}"
        no_speech = 0
        [encoder]
        id = "{encoder_folder}"
        [decoder]
        id = "{decoder_folder}"
        dtype = "float32"
        [store]
        rows_per_shard = 1024
        [extract]
        batch_s = 10.0
        disk_margin_gb = 0.0
        [projector]
        hidden_size = 24
        [train]
        steps = 6
        learning_rate = 1e-3
        warmup_steps = 2
        batch_tokens = 300
        log_every = 2
        eval_every = 4
        eval_utterances = 5
        save_every = 2
        """
    )
    return path


@pytest.fixture
def tinyaudio(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command as a process in `tmp_path` would, but in this one, where the imports are done."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["tinyaudio", *map(str, arguments)])
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        return subprocess.CompletedProcess(sys.argv, int(stop.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def asr(checkpoint: Path) -> Pipeline:
    """transformers' pipeline with the tiny model."""
    return pipeline("automatic-speech-recognition", model=str(checkpoint), trust_remote_code=True)


@pytest.fixture
def with_head(model: TinyAudioForConditionalGeneration, ctc_folder: Path) -> TinyAudioForConditionalGeneration:
    """The tiny model with an encoder that has a CTC head of letters."""
    encoder, head = load_encoder_with_head(str(ctc_folder))
    model.attach(encoder=encoder, ctc_head=head)
    model.config.encoder_id = str(ctc_folder)
    return model


@pytest.fixture(scope="session")
def bundled_encoder():
    """The demo's encoder, its CTC head and its feature extractor."""
    encoder, head = load_encoder_with_head(str(DEMO / "encoder"))
    return encoder, head, load_feature_extractor(str(DEMO / "encoder"))
