"""Make what `pipelines/demo/` ships: a synthetic corpus, a small HuBERT, a small SmolLM3.

    python -m pipelines.demo.make --out pipelines/demo --examples pipelines/space/examples

Needs espeak-ng, but no network and no other data. Everything follows from the seed and from the installed versions of
espeak-ng, libopus and torch; see `pipelines/demo/README.md`.
"""

import argparse
import random
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
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
from tinyaudio.model.audio import SAMPLING_RATE

NUM_DECODER_SENTENCES = 30_000
NUM_EXTRA_UTTERANCES = 6_000  # new sentences and known timbres, for the encoder's training alone; not written to disk
EXAMPLE_PAUSE_S = 0.7
NUM_THREADS = 1  # for each model: the order of floating-point sums depends on it, and a second one gains only a sixth


def training_sentences(seed: int, name: str, count: int) -> list[str]:
    """Draw `count` sentences of the grammar, repeats allowed, none of them from dev, test or test_unseen."""
    held_out = {s for split, rows in split_sentences(seed).items() if split != "train" for s in rows}
    rng = random.Random(f"{name}-{seed}")
    sentences: list[str] = []
    while len(sentences) < count:
        sentence = make_sentence(rng)
        if sentence not in held_out:
            sentences.append(sentence)
    return sentences


def make_decoder(out: Path, seed: int) -> None:
    """Train and write the decoder with its tokenizer."""
    torch.set_num_threads(NUM_THREADS)
    sentences = training_sentences(seed, "text", NUM_DECODER_SENTENCES)
    tokenizer = train_tokenizer(sentences)
    save_decoder(train_decoder(tokenizer, sentences, seed), tokenizer, out / "decoder")


def make_encoder(out: Path, seed: int, corpus: dict[str, list[SpokenUtterance]]) -> None:
    """Train and write the encoder; print the WER of its CTC head, a control without projector."""
    torch.set_num_threads(NUM_THREADS)
    rng = random.Random(f"extra-voices-{seed}")
    sentences = training_sentences(seed, "extra", NUM_EXTRA_UTTERANCES)
    voices = [random_voice(rng, known_variants()) for _ in sentences]
    with ThreadPoolExecutor() as pool:
        extra = list(zip(sentences, pool.map(synthesise, sentences, voices), strict=True))
    model = train_encoder([(u.transcript, u.samples) for u in corpus["train"]] + extra, seed)
    save_encoder(model, out / "encoder")
    for split in ("dev", "test", "test_unseen"):
        hypotheses = ctc_transcripts(model, [u.samples for u in corpus[split]])
        print(f"CTC control {split}: WER {jiwer.wer([u.transcript for u in corpus[split]], hypotheses):.2%}")


def write_examples(folder: Path, corpus: dict[str, list[SpokenUtterance]]) -> None:
    """Write the recordings that the web page offers: a sentence, an unseen voice, five sentences with pauses."""
    folder.mkdir(parents=True, exist_ok=True)
    pause = np.zeros(int(EXAMPLE_PAUSE_S * SAMPLING_RATE), dtype=np.float32)
    five = [part for u in corpus["test"][1:6] for part in (u.samples, pause)]
    (folder / "one-sentence.opus").write_bytes(corpus["test"][0].opus)
    (folder / "voice-never-heard.opus").write_bytes(corpus["test_unseen"][0].opus)
    (folder / "five-sentences.opus").write_bytes(encode_opus(np.concatenate(five[:-1]), "five-sentences"))


def make_demo_assets(out: Path, seed: int, examples: Path | None = None) -> None:
    """Make the demo's corpus, encoder and decoder from nothing but espeak-ng and a seed."""
    corpus = make_corpus(seed)
    write_corpus(out / "corpus", corpus)
    if examples is not None:
        write_examples(examples, corpus)
    for split, utterances in corpus.items():
        print(f"{split}: {len(utterances)} utterances, {sum(u.duration_s for u in utterances):.0f} s", flush=True)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        decoder = pool.submit(make_decoder, out, seed)
        make_encoder(out, seed, corpus)
        decoder.result()


def main() -> None:
    """Read the command line and make the assets."""
    parser = argparse.ArgumentParser(description="Make the bundled corpus and models again; needs espeak-ng.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write corpus/, encoder/ and decoder/ into")
    parser.add_argument("--seed", type=int, default=0, help="every random choice follows from it")
    parser.add_argument("--examples", type=Path, help="folder for the recordings that the web page offers")
    given = parser.parse_args()
    make_demo_assets(given.out, given.seed, given.examples)
