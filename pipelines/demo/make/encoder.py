"""The bundled encoder: a small HuBERT with a character CTC head, trained from scratch on synthetic speech.

Invariants: training contains no sentence of dev, test and test_unseen and no unseen voice; everything is a pure
function of a seed, the inputs and the installed libraries. Knows nothing of the decoder or the projector.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import HubertConfig, HubertForCTC, Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor
from transformers.audio_utils import mel_filter_bank
from transformers.models.hubert.modeling_hubert import HubertFeatureEncoder

from pipelines.demo.make.training import TrainingPlan, save_weights, update
from tinyaudio.model.audio import HOP_LENGTH, SAMPLING_RATE, WINDOW_LENGTH, Samples, num_frames

NUM_MEL_BANDS = 40
# How much later than its letter the shipped head marks it: the median over the dev split of where it marks the first
# letter of a word, less where espeak-ng says that the word begins (`word_times`); measured by a test, for each encoder.
CTC_OFFSET_S = 0.018
# HuBERT's 32 symbols, lower case; 0 is the CTC blank, | the space.
CTC_SYMBOLS = ("<pad>", "<s>", "</s>", "<unk>", "|", *"abcdefghijklmnopqrstuvwxyz'")
WORD_LOSS_WEIGHT = 1.0  # of one word against one letter: both losses are means over their symbols
NOISE_LENGTH = 1 << 19  # samples of one noise strip, from which pieces are cut: making noise each time was too slow
ENCODER_PLAN = TrainingPlan(steps=5_000, batch_size=16, learning_rate=3e-3, warmup_steps=150)


def encoder_config() -> HubertConfig:
    """Return HuBERT-large's layout (layer norm in the convolutions, stable layer norm) made small."""
    return HubertConfig(
        vocab_size=len(CTC_SYMBOLS),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        conv_dim=(16, 32, 48, 64, 96, 128, 128),
        conv_bias=True,
        feat_extract_norm="layer",
        feat_extract_activation="relu",  # GELU took a third of the training time of the convolutions
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=32,
        num_conv_pos_embedding_groups=8,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        ctc_offset_s=CTC_OFFSET_S,
        apply_spec_augment=False,  # at this size and training time every regulariser costs more than it brings
    )


def feature_extractor() -> Wav2Vec2FeatureExtractor:
    """Return HuBERT-large's feature extractor: every utterance to zero mean and unit variance."""
    return Wav2Vec2FeatureExtractor(
        feature_size=1, sampling_rate=SAMPLING_RATE, padding_value=0.0, do_normalize=True, return_attention_mask=True
    )


@lru_cache(maxsize=1)
def _noise_strips() -> tuple[Samples, ...]:
    """Make unit-power noise, from white to brown."""
    rng = np.random.default_rng(0)
    strips = []
    for exponent in np.linspace(0.0, 1.0, 8):
        spectrum = np.fft.rfft(rng.standard_normal(NOISE_LENGTH))
        spectrum /= np.maximum(np.arange(len(spectrum)), NOISE_LENGTH / 200) ** exponent
        noise = np.fft.irfft(spectrum, NOISE_LENGTH)
        strips.append((noise / noise.std()).astype(np.float32))
    return tuple(strips)


def _random_noise(rng: np.random.Generator, length: int) -> Samples:
    """Return (length,) samples of about unit power from a random strip."""
    strips = _noise_strips()
    start = int(rng.integers(NOISE_LENGTH - length))
    return strips[int(rng.integers(len(strips)))][start : start + length]


def _colour(rng: np.random.Generator, samples: Samples) -> Samples:
    """Apply a random smooth equaliser; sometimes a telephone's band limit, sometimes a small room."""
    size = -(-(len(samples) + 3_200) // 4_096) * 4_096  # a length that the FFT likes
    spectrum = np.fft.rfft(samples, size)
    hertz = np.linspace(0, SAMPLING_RATE / 2, len(spectrum))
    decibels = np.interp(hertz, [0, 300, 800, 1_800, 3_500, 8_000], rng.normal(0, 3, 6))
    if rng.random() < 0.3:
        decibels -= np.clip((hertz - rng.uniform(3_300, 4_000)) / 200, 0, 1) * 60
    if rng.random() < 0.25:
        tail = rng.standard_normal(3_200) * np.exp(-np.arange(3_200) / rng.uniform(200, 900))
        tail[0] = 0
        tail *= rng.uniform(0.1, 0.7) / (np.sqrt((tail**2).sum()) + 1e-9)
        tail[0] = 1
        spectrum *= np.fft.rfft(tail, size)
    coloured = np.fft.irfft(spectrum * 10 ** (decibels / 20), size)
    return np.asarray(coloured[: len(samples)], dtype=np.float32)


def augment(rng: np.random.Generator, samples: Samples) -> Samples:
    """Disturb speech as microphones, rooms, codecs and editors do; (S,) to (S',) float32."""
    if rng.random() < 0.6:
        count = int(len(samples) * rng.uniform(0.9, 1.11))
        places = np.linspace(0, len(samples) - 1, count)
        samples = np.interp(places, np.arange(len(samples)), samples).astype(np.float32)
    if rng.random() < 0.4:
        samples = _colour(rng, samples)
    if rng.random() < 0.3:
        lead, tail = (int(rng.exponential(0.25) * SAMPLING_RATE) for _ in range(2))
        samples = np.pad(samples, (min(lead, 16_000), min(tail, 16_000)))
    if rng.random() < 0.5:
        power = float(np.sqrt((samples**2).mean()))
        samples = samples + _random_noise(rng, len(samples)) * power * 10 ** (-rng.uniform(10, 45) / 20)
    return samples.astype(np.float32)


def _wordless(rng: np.random.Generator) -> Samples:
    """Return digital silence, or noise without speech."""
    length = int(rng.uniform(0.2, 4.0) * SAMPLING_RATE)
    if rng.random() < 0.2:
        return np.zeros(length, dtype=np.float32)
    noise = _random_noise(rng, length)
    swell = np.interp(np.arange(length), np.linspace(0, length, 8), rng.uniform(0.2, 1.0, 8))
    return (noise * swell).astype(np.float32)


def _training_utterance(
    rng: np.random.Generator, corpus: Sequence[tuple[str, Samples]], index: int, disturb: bool
) -> tuple[str, Samples]:
    """Return one utterance: unchanged, or disturbed, sometimes two in a row, sometimes without speech."""
    if not disturb:
        return corpus[index]
    draw = rng.random()
    if draw < 0.03:
        return "", _wordless(rng)
    transcript, samples = corpus[index]
    if draw < 0.06:
        other, more = corpus[int(rng.integers(len(corpus)))]
        gap = np.zeros(int(rng.uniform(0.1, 0.8) * SAMPLING_RATE), dtype=np.float32)
        return f"{transcript} {other}", augment(rng, np.concatenate([samples, gap, more]))
    return transcript, augment(rng, samples)


def encoder_batches(
    corpus: Sequence[tuple[str, Samples]], plan: TrainingPlan, seed: int
) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Yield batches of similar lengths for ever: transcripts, (B, S) samples, (B, S) mask.

    The first pass over the corpus is undisturbed: CTC finds the alignment much sooner.
    """
    rng = np.random.default_rng(seed)
    extract = feature_extractor()
    for epoch in itertools.count():
        order = rng.permutation(len(corpus))
        pool_size = plan.batch_size * 16
        for start in range(0, len(order) - pool_size + 1, pool_size):
            pool = [_training_utterance(rng, corpus, int(i), epoch > 0) for i in order[start : start + pool_size]]
            pool.sort(key=lambda pair: len(pair[1]))
            for first in rng.permutation(16) * plan.batch_size:
                texts, waves = zip(*pool[first : first + plan.batch_size], strict=True)
                batch = extract(list(waves), sampling_rate=SAMPLING_RATE, padding=True, return_tensors="pt")
                yield list(texts), batch["input_values"], batch["attention_mask"]


class MelTeacher(nn.Module):
    """A linear prediction of log-mel bands from the convolutions, which gives them an early direction."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, NUM_MEL_BANDS)
        bank = mel_filter_bank(WINDOW_LENGTH // 2 + 1, NUM_MEL_BANDS, 60.0, 7_600.0, SAMPLING_RATE)
        self.register_buffer("bank", torch.tensor(bank, dtype=torch.float32))
        self.register_buffer("window", torch.hann_window(WINDOW_LENGTH))

    def forward(self, samples: Tensor, convolved: Tensor, frame_mask: Tensor) -> Tensor:
        """Return the mean squared error over valid frames.

        Args:
            samples: (B, S).
            convolved: (B, C, T), output of the convolutions.
            frame_mask: (B, T), True where a frame is valid.
        """
        window, bank = cast(Tensor, self.window), cast(Tensor, self.bank)
        spectrum = torch.stft(
            samples, WINDOW_LENGTH, HOP_LENGTH, WINDOW_LENGTH, window, center=False, return_complex=True
        )
        mel = torch.log(spectrum.abs().pow(2).transpose(1, 2) @ bank + 1e-3)
        error = (self.head(convolved.transpose(1, 2)) - mel / 3.0).pow(2).mean(-1)
        return cast(Tensor, error[frame_mask].mean())


def _ctc_loss(logits: Tensor, lengths: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
    """Return the mean CTC loss for each symbol; an utterance without symbols counts its frames instead.

    Args:
        logits: (B, T, V).
        lengths: (B,), valid frames.
        targets: B sequences of symbol ids; 0 is the blank.
    """
    counts = torch.tensor([len(row) for row in targets])
    symbols = torch.tensor([symbol for row in targets for symbol in row])
    log_probs = functional.log_softmax(logits.float(), -1).transpose(0, 1)
    losses = functional.ctc_loss(log_probs, symbols, lengths, counts, blank=0, reduction="none", zero_infinity=True)
    return (losses / torch.where(counts > 0, counts, lengths)).mean()


class CtcHeads:
    """Two CTC heads: one for characters, which is kept, and one for whole words, which is not.

    With characters alone, a frame would encode a letter or two. The projector sees a tenth of a second at a time, so
    the frames must also encode their word, as those of a large encoder do.
    """

    def __init__(self, model: HubertForCTC, transcripts: Sequence[str]) -> None:
        words = sorted({word for transcript in transcripts for word in transcript.split()})
        self.character_ids = {" " if s == "|" else s: i for i, s in enumerate(CTC_SYMBOLS)}
        self.word_ids = {word: i for i, word in enumerate(words, 1)}
        self.characters = model.lm_head
        self.words = nn.Linear(model.config.hidden_size, len(words) + 1)

    def loss(self, hidden: Tensor, lengths: Tensor, transcripts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the character and the word loss of (B, T, D) hidden states with (B,) valid frames."""
        characters = [[self.character_ids[c] for c in transcript] for transcript in transcripts]
        words = [[self.word_ids[w] for w in transcript.split()] for transcript in transcripts]
        return (
            _ctc_loss(self.characters(hidden), lengths, characters),
            _ctc_loss(self.words(hidden), lengths, words),
        )


def convolve(encoder: HubertFeatureEncoder, samples: Tensor) -> Tensor:
    """Compute what `encoder` computes, as matrix products with channels last, in 0.6 of the time on a CPU.

    Args:
        encoder: layer-normed convolutions with ReLU.
        samples: (B, S).

    Returns:
        (B, C, T), equal to `encoder(samples)` up to rounding.
    """
    hidden = samples[:, :, None]
    layers: Any = encoder.conv_layers
    for layer in layers:
        kernel, stride = layer.conv.weight.shape[-1], layer.conv.stride[0]
        num_frames = (hidden.shape[1] - kernel) // stride + 1
        num_blocks = -(-kernel // stride)
        length = (num_frames - 1 + num_blocks) * stride
        hidden = functional.pad(hidden, (0, 0, 0, max(0, length - hidden.shape[1])))[:, :length]
        blocks = hidden.reshape(len(hidden), num_frames - 1 + num_blocks, -1)
        weight = functional.pad(layer.conv.weight.permute(2, 1, 0), (0, 0, 0, 0, 0, num_blocks * stride - kernel))
        weight = weight.reshape(num_blocks, blocks.shape[-1], -1)
        hidden = layer.conv.bias
        for i in range(num_blocks):
            hidden = hidden + blocks[:, i : i + num_frames] @ weight[i]
        norm = layer.layer_norm
        hidden = functional.relu(functional.layer_norm(hidden, (hidden.shape[-1],), norm.weight, norm.bias, norm.eps))
    return hidden.transpose(1, 2)


def _frames(mask: Tensor) -> Tensor:
    """Count the frames of (B, S) masked samples: (B,) int64."""
    return torch.tensor([num_frames(int(length)) for length in mask.sum(-1)])


def train_encoder(corpus: Sequence[tuple[str, Samples]], seed: int, plan: TrainingPlan = ENCODER_PLAN) -> HubertForCTC:
    """Train the small HuBERT on (transcript, samples) pairs; return it in eval mode, float32.

    Loss: CTC of characters and of words, plus the mel teacher while it fades over the first half.
    """
    torch.manual_seed(seed)
    model = HubertForCTC(encoder_config())
    model.train()
    teacher = MelTeacher(model.config.conv_dim[-1])
    convolutions: Any = model.hubert.feature_extractor
    convolved: list[Tensor] = []

    def fast_forward(samples: Tensor) -> Tensor:
        convolved[:] = [convolve(convolutions, samples)]
        return convolved[0]

    convolutions.forward = fast_forward
    heads = CtcHeads(model, [transcript for transcript, _ in corpus])
    parameters = [*model.parameters(), *teacher.parameters(), *heads.words.parameters()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01)
    batches = encoder_batches(corpus, plan, seed)
    for step in range(plan.steps):
        transcripts, samples, mask = next(batches)
        hidden = model.hubert(samples, attention_mask=mask).last_hidden_state
        lengths = _frames(mask)
        characters, words = heads.loss(hidden, lengths, transcripts)
        fade = max(0.0, 1.0 - 2.0 * step / plan.steps)
        frame_mask = torch.arange(hidden.shape[1])[None] < lengths[:, None]
        mel = teacher(samples, convolved[0], frame_mask) if fade else torch.zeros(())
        update(optimizer, parameters, characters + WORD_LOSS_WEIGHT * words + fade * mel, plan.rate(step))
        if step % 100 == 0:
            parts = f"characters {characters.item():.3f} words {words.item():.3f} mel {mel.item():.3f}"
            print(f"encoder step {step}/{plan.steps} {parts}", flush=True)
    del convolutions.forward
    model.train(False)
    return model


@torch.no_grad()
def ctc_transcripts(model: HubertForCTC, waves: Sequence[Samples], batch_size: int = 32) -> list[str]:
    """Transcribe with the CTC head alone, greedily: the control without projector and language model."""
    extract, order = feature_extractor(), sorted(range(len(waves)), key=lambda i: len(waves[i]))
    texts = [""] * len(waves)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = extract([waves[i] for i in rows], sampling_rate=SAMPLING_RATE, padding=True, return_tensors="pt")
        best = model(batch["input_values"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
        lengths = _frames(batch["attention_mask"])
        for i, ids, length in zip(rows, best, lengths, strict=True):
            symbols = torch.unique_consecutive(ids[:length]).tolist()
            texts[i] = "".join(CTC_SYMBOLS[s] for s in symbols if s).replace("|", " ").strip()
    return texts


def save_encoder(model: HubertForCTC, folder: Path) -> None:
    """Write weights, feature extractor and CTC tokenizer as one transformers folder."""
    save_weights(model, folder)
    feature_extractor().save_pretrained(folder)
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({symbol: i for i, symbol in enumerate(CTC_SYMBOLS)}))
    Wav2Vec2CTCTokenizer(str(vocabulary), do_lower_case=True).save_pretrained(folder)
