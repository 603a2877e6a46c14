"""Make the shipped stand-ins of `pipelines/demo/`: a synthetic corpus, a small HuBERT, a small SmolLM3.

    python -m pipelines.demo.make --out pipelines/demo --examples pipelines/space/examples

Needs espeak-ng and nothing else: no network, no other data. Everything follows from the seed and from the
installed versions of espeak-ng, libopus and torch; see `pipelines/demo/README.md`.
"""

import argparse
import random
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import jiwer
import numpy as np
import torch

from pipelines.demo.make.corpus import (
    SpokenUtterance,
    encode_opus,
    known_variants,
    make_corpus,
    make_sentence,
    random_voice,
    split_sentences,
    synthesise,
    write_corpus,
)
from pipelines.demo.make.decoder import save_decoder, train_decoder, train_tokenizer
from pipelines.demo.make.encoder import ctc_transcripts, save_encoder, train_encoder
from tinyaudio.model.audio import SAMPLING_RATE, Samples

NUM_DECODER_SENTENCES = 30_000
NUM_EXTRA_UTTERANCES = 6_000
"""Speech that only the encoder's training hears: new sentences, known timbres, never written to disk."""

EXAMPLE_PAUSE_S = 0.7

NUM_THREADS = 1
"""For each stand-in: the order of floating-point sums depends on it, and a second thread gains a sixth only."""


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Prints progress lines with the seconds since the start."""

    started_s: float

    def __call__(self, line: str) -> None:
        """Print one line."""
        print(f"[{time.monotonic() - self.started_s:6.0f} s] {line}", flush=True)


def training_sentences(seed: int, name: str, count: int) -> list[str]:
    """Draw `count` sentences of the grammar, repeats allowed, none of them of dev, test or test_unseen."""
    held_out = {s for split, rows in split_sentences(seed).items() if split != "train" for s in rows}
    rng = random.Random(f"{name}-{seed}")
    sentences: list[str] = []
    while len(sentences) < count:
        sentence = make_sentence(rng)
        if sentence not in held_out:
            sentences.append(sentence)
    return sentences


def extra_speech(seed: int) -> list[tuple[str, Samples]]:
    """Speak further sentences with known timbres at random accents, pitches and speeds."""
    rng = random.Random(f"extra-voices-{seed}")
    sentences = training_sentences(seed, "extra", NUM_EXTRA_UTTERANCES)
    voices = [random_voice(rng, known_variants()) for _ in sentences]
    with ThreadPoolExecutor() as pool:
        return list(zip(sentences, pool.map(synthesise, sentences, voices), strict=True))


def corpus_summary(split: str, utterances: Sequence[SpokenUtterance]) -> str:
    """Return one line on a split."""
    durations_s = sorted(u.duration_s for u in utterances)
    voices = len({u.voice.name for u in utterances})
    median_s = durations_s[len(durations_s) // 2]
    return f"{split}: {len(utterances)} utterances, {voices} voices, {sum(durations_s):.0f} s, median {median_s:.2f} s"


def make_decoder(out: Path, seed: int, log: Clock) -> None:
    """Train and write the stand-in decoder with its tokenizer."""
    torch.set_num_threads(NUM_THREADS)
    sentences = training_sentences(seed, "text", NUM_DECODER_SENTENCES)
    tokenizer = train_tokenizer(sentences)
    save_decoder(train_decoder(tokenizer, sentences, seed, log), tokenizer, out / "decoder")


def make_encoder(out: Path, seed: int, log: Clock, corpus: dict[str, list[SpokenUtterance]]) -> None:
    """Train and write the stand-in encoder; print the WER of its CTC head, a control without projector."""
    torch.set_num_threads(NUM_THREADS)
    speech = [(u.transcript, u.samples) for u in corpus["train"]] + extra_speech(seed)
    log(f"encoder training on {len(speech)} utterances")
    model = train_encoder(speech, seed, log)
    save_encoder(model, out / "encoder")
    for split in ("dev", "test", "test_unseen"):
        hypotheses = ctc_transcripts(model, [u.samples for u in corpus[split]])
        log(f"CTC control {split}: WER {jiwer.wer([u.transcript for u in corpus[split]], hypotheses):.2%}")


def write_examples(folder: Path, corpus: dict[str, list[SpokenUtterance]]) -> None:
    """Write the recordings that the page and the Space offer: a sentence, a voice never heard, five with pauses."""
    folder.mkdir(parents=True, exist_ok=True)
    pause = np.zeros(int(EXAMPLE_PAUSE_S * SAMPLING_RATE), dtype=np.float32)
    five = [part for u in corpus["test"][1:6] for part in (u.samples, pause)]
    (folder / "one-sentence.opus").write_bytes(corpus["test"][0].opus)
    (folder / "voice-never-heard.opus").write_bytes(corpus["test_unseen"][0].opus)
    (folder / "five-sentences.opus").write_bytes(encode_opus(np.concatenate(five[:-1]), "five-sentences"))


def make_demo_assets(out: Path, seed: int, examples: Path | None = None) -> None:
    """Make the demo's corpus, encoder and decoder from nothing but espeak-ng and a seed.

    Args:
        out: folder to write corpus/, encoder/ and decoder/ into.
        seed: every random choice follows from it.
        examples: folder for a few of its recordings; None for none.
    """
    log = Clock(started_s=time.monotonic())
    corpus = make_corpus(seed)
    write_corpus(out / "corpus", corpus)
    if examples is not None:
        write_examples(examples, corpus)
    for split, utterances in corpus.items():
        log(corpus_summary(split, utterances))
    with ProcessPoolExecutor(1, get_context("spawn")) as beside:
        decoder = beside.submit(make_decoder, out, seed, log)
        make_encoder(out, seed, log, corpus)
        decoder.result()
    size_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    log(f"{out}: {size_bytes / 1e6:.2f} MB")


def main() -> None:
    """Read the command line and make the assets."""
    arguments = argparse.ArgumentParser(description="Make the bundled stand-ins again; needs espeak-ng.")
    arguments.add_argument(
        "--out", type=Path, required=True, help="folder to write corpus/, encoder/ and decoder/ into"
    )
    arguments.add_argument("--seed", type=int, default=0, help="every random choice follows from it")
    arguments.add_argument("--examples", type=Path, help="folder for the recordings that the page offers")
    given = arguments.parse_args()
    make_demo_assets(given.out, given.seed, given.examples)
