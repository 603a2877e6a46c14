"""Evaluation sets: which utterances of a split are scored, and their audio at 16 kHz.

A sample of N is random rather than the head of the split, and does not depend on the order of files: utterances are
ranked by a hash of seed and id, so a smaller sample is part of a larger one. Ids are unique: a second "x" becomes
"x#2", and a row without an id is named after its place. The number of renamed ids is part of the set's identity.
"""

import hashlib
import io
import tomllib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import soundfile

from pipelines.corpora import Corpus, open_corpus
from pipelines.corpora.sources import source_of
from pipelines.errors import EvaluationError
from pipelines.evaluate.predictions import Prediction, WordScore
from pipelines.recipes import load_recipe
from pipelines.recipes.recipe import CorpusSection, recipe_names
from tinyaudio.model.audio import SAMPLING_RATE, Samples, load_audio
from tinyaudio.model.errors import AudioError
from tinyaudio.model.transcript import DraftCounts

NAMED = Path(__file__).parent / "eval_sets.toml"
WINDOW_S = 1_200.0  # seconds of audio held in memory at once: 77 MB of float32 samples


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One utterance to be scored, without its audio; `duration_s` is None if the corpus does not state it."""

    utterance_id: str
    source_id: str
    duration_s: float | None = None
    transcript: str | None = None
    speaker: str | None = None
    sex: str | None = None
    source: str | None = None

    def fail(self, error: str) -> Prediction:
        """Return the prediction of an utterance that no system was asked for."""
        return _predict(self, text=None, time_s=0.0, error=error)


@dataclass(frozen=True, kw_only=True, eq=False)
class Clip:
    """One utterance with its audio, as every provider gets it."""

    utterance: Utterance  # a provider reads its id only; the rest becomes part of the prediction
    samples: Samples  # (S,) float32, 16 kHz mono
    warnings: tuple[str, ...] = ()  # of the recording itself, such as `input_truncated`; part of the prediction

    @property
    def utterance_id(self) -> str:
        return self.utterance.utterance_id

    @property
    def duration_s(self) -> float:
        return len(self.samples) / SAMPLING_RATE

    def to_wav(self) -> bytes:
        """Encode as 16 kHz mono 16-bit WAV, which every remote provider is sent."""
        stream = io.BytesIO()
        soundfile.write(stream, self.samples, SAMPLING_RATE, format="WAV", subtype="PCM_16")
        return stream.getvalue()

    def answer(
        self,
        text: str | None,
        *,
        time_s: float = 0.0,
        error: str | None = None,
        warnings: tuple[str, ...] = (),
        words: tuple[WordScore, ...] | None = None,
        provider_id: str | None = None,
        drafts: DraftCounts | None = None,
    ) -> Prediction:
        """Make the prediction of this clip; either `text` or `error` is None, the others are as in `Prediction`."""
        utterance = replace(self.utterance, duration_s=self.duration_s)
        all_warnings = tuple(dict.fromkeys((*self.warnings, *warnings)))
        counts = {}
        if drafts is not None:
            names = ("num_passes", "num_tokens", "num_accepted")
            counts = {name: getattr(drafts, name) for name in names}
        return _predict(
            utterance, text, time_s, error=error, warnings=all_warnings, words=words, provider_id=provider_id, **counts
        )


def _predict(utterance: Utterance, text: str | None, time_s: float, **details: Any) -> Prediction:
    return Prediction(
        audio_filepath=utterance.source_id,
        duration=round(utterance.duration_s or 0.0, 4),
        time=round(time_s, 6),
        text=utterance.transcript or "",
        pred_text=text,
        utterance_id=utterance.utterance_id,
        speaker=utterance.speaker,
        sex=utterance.sex,
        source=utterance.source,
        **details,
    )


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """A split, or a random part of it."""

    section: CorpusSection
    split: str
    max_samples: int | None
    seed: int
    source: str | None
    corpus: Corpus
    utterances: tuple[Utterance, ...]
    num_renamed: int = 0  # in the whole split

    @property
    def name(self) -> str:
        """Name the set for a folder: "demo-test", with size and seed of a sample."""
        parts = [corpus_name(self.section).split("/")[-1], self.section.config, self.split, self.source]
        if self.max_samples is not None:
            parts.append(f"{self.max_samples}-seed{self.seed}")
        text = "-".join(part for part in parts if part)
        return "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in text)

    def identity(self) -> dict[str, Any]:
        """Return what is scored: the corpus, the split and how it is sampled."""
        return {
            "corpus": corpus_name(self.section),
            "config": self.section.config,
            "provenance": self.corpus.provenance(self.split),
            "split": self.split,
            "source": self.source,
            "max_samples": self.max_samples,
            "seed": self.seed if self.max_samples is not None else None,
            **({"renamed_ids": self.num_renamed} if self.num_renamed else {}),
        }

    def environment(self) -> dict[str, Any]:
        """Return the versions of what decodes and resamples the recordings."""
        return {name: version(name) for name in ("soundfile", "soxr", "av")}

    def load(self, ids: Collection[str]) -> Iterator[tuple[list[Clip], list[Prediction]]]:
        """Decode utterances, about `WINDOW_S` seconds of audio at a time: clips, and predictions of what failed."""
        chosen = set(ids)
        for window in _windows([one for one in self.utterances if one.utterance_id in chosen]):
            by_place: dict[str, list[Utterance]] = {}
            for one in window:
                by_place.setdefault(one.source_id, []).append(one)
            clips, failures = [], []
            for place, encoded in self.corpus.read_audio(by_place):
                for one in by_place[place]:
                    if one.transcript is None:
                        failures.append(one.fail("no reference transcript in the corpus"))
                        continue
                    warnings: list[str] = []
                    try:
                        samples = load_audio(encoded, on_warning=warnings.append)
                        clips.append(Clip(utterance=one, samples=samples, warnings=tuple(warnings)))
                    except AudioError as error:
                        failures.append(one.fail(str(error)))
            yield clips, failures


def _windows(utterances: Iterable[Utterance]) -> Iterator[list[Utterance]]:
    """Cut a list into parts of about `WINDOW_S` seconds."""
    window: list[Utterance] = []
    held_s = 0.0
    for one in utterances:
        window.append(one)
        held_s += one.duration_s or 0.0
        if held_s >= WINDOW_S:
            yield window
            window, held_s = [], 0.0
    if window:
        yield window


def corpus_name(section: CorpusSection) -> str:
    """Name a corpus by its hub id, the recipe that ships it, or its folder's own name, never by a full path."""
    if section.name is not None:
        return section.name
    folder = Path(str(section.path)).expanduser().resolve()
    return _shipped_corpora().get(folder, folder.name)


@cache
def _shipped_corpora() -> dict[Path, str]:
    sections = {name: load_recipe(name).corpus for name in recipe_names()}
    return {Path(section.path).resolve(): name for name, section in sections.items() if section.path is not None}


def named_sections() -> dict[str, CorpusSection]:
    """Return the test sets of eval_sets.toml by name."""
    return {name: CorpusSection.model_validate(table) for name, table in tomllib.loads(NAMED.read_text()).items()}


def open_eval_set(
    section: CorpusSection, *, split: str, max_samples: int | None = None, seed: int = 0, source: str | None = None
) -> EvalSet:
    """List what is to be scored.

    Args:
        max_samples: score a random sample of this many; None scores all.
        source: score only utterances of this source, such as "voxpopuli".

    Raises:
        CorpusError: no such corpus or split.
        EvaluationError: nothing to score.
    """
    corpus = open_corpus(section)
    rows = corpus.scan(split).to_pylist()
    names, num_renamed = unique_names([row["utterance_id"] or f"{split}/{row['source_id']}" for row in rows])
    chosen = []
    for row, name in zip(rows, names, strict=True):
        stated = row["source"] or source_of(section.name or str(section.path), row["utterance_id"] or "")
        chosen.append(Utterance(**{**row, "utterance_id": name, "source": stated}))
    sources = sorted({one.source for one in chosen if one.source})
    if source is not None:
        chosen = [one for one in chosen if one.source == source]
    if not chosen:
        hint = f" of source {source!r}; its sources: {', '.join(sources) or 'none stated'}" if source else ""
        raise EvaluationError(f"split {split!r} has no utterance{hint}")
    if max_samples is not None:
        ranks = {one.utterance_id: hashlib.sha256(f"{seed} {one.utterance_id}".encode()).digest() for one in chosen}
        kept = set(sorted(ranks, key=ranks.__getitem__)[:max_samples])
        chosen = [one for one in chosen if one.utterance_id in kept]
    return EvalSet(
        section=section,
        split=split,
        max_samples=max_samples,
        seed=seed,
        source=source,
        corpus=corpus,
        utterances=tuple(chosen),
        num_renamed=num_renamed + sum(not row["utterance_id"] for row in rows),
    )


def unique_names(names: Iterable[str]) -> tuple[list[str], int]:
    """Give a repeated name the suffix "#2", "#3", ...; return the names and how many were changed."""
    seen: set[str] = set()
    made = []
    num_changed = 0
    for name in names:
        unique, number = name, 1
        while unique in seen:
            number += 1
            unique = f"{name}#{number}"
        num_changed += number > 1
        seen.add(unique)
        made.append(unique)
    return made, num_changed
