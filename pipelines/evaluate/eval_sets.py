"""Evaluation sets: which utterances of a split are scored, and their audio at 16 kHz.

A sample of N is random and not the head, and stays the same whatever the order of files: utterances are ranked by a
hash of seed and id. A smaller sample is part of a larger one. Ids are unique: a second "x" becomes "x#2", and a row
without an id goes by its place; how many were renamed is part of the set's identity.
"""

import hashlib
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipelines.corpora import Corpus, open_corpus
from pipelines.corpora.sources import source_of
from pipelines.errors import EvaluationError
from pipelines.evaluate.providers.base import Clip
from pipelines.recipes import load_recipe
from pipelines.recipes.recipe import CorpusSection, recipe_names
from tinyaudio.model.audio import load_audio
from tinyaudio.model.errors import AudioError

NAMED = Path(__file__).parent / "eval_sets.toml"
WINDOW_S = 1_200.0  # seconds of audio held in memory at once: 77 MB of float32 samples


@dataclass(frozen=True, kw_only=True)
class Utterance:
    """One utterance to be scored, without its audio; `duration_s` is None if the corpus could not tell it."""

    utterance_id: str
    source_id: str
    duration_s: float | None
    transcript: str | None
    speaker: str | None
    sex: str | None
    source: str | None


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """A split, or a random part of it."""

    section: CorpusSection
    split: str
    max_samples: int | None
    seed: int
    source: str | None
    corpus: Corpus | None  # None where clips do not come from a corpus
    utterances: tuple[Utterance, ...]
    split_size: int  # utterances in the whole split
    num_renamed: int = 0  # of the whole split

    @property
    def corpus_name(self) -> str:
        return corpus_name(self.section)

    @property
    def name(self) -> str:
        """Name the set as folders do: "demo-test", with the sample's size and seed if it is one."""
        parts = [self.corpus_name.split("/")[-1], self.section.config, self.split, self.source]
        if self.max_samples is not None:
            parts.append(f"{self.max_samples}-seed{self.seed}")
        return "-".join(_file_name(part) for part in parts if part)

    def identity(self) -> dict[str, Any]:
        """Return what was scored: the corpus, the split and how it was sampled."""
        assert self.corpus is not None
        return self._identity({"provenance": self.corpus.provenance(self.split)})

    def _identity(self, origin: dict[str, Any]) -> dict[str, Any]:
        return {
            "corpus": self.corpus_name,
            "config": self.section.config,
            **origin,
            "split": self.split,
            "source": self.source,
            "max_samples": self.max_samples,
            "seed": self.seed if self.max_samples is not None else None,
            **({"renamed_ids": self.num_renamed} if self.num_renamed else {}),
        }

    def environment(self) -> dict[str, Any]:
        """Return what decodes and resamples the recordings."""
        return {name: version(name) for name in ("soundfile", "soxr", "av")}

    def load(self, wanted: Iterable[str]) -> Iterator["Window"]:
        """Decode utterances, in windows of about `WINDOW_S` seconds; what cannot be decoded comes as its error."""
        assert self.corpus is not None
        chosen = set(wanted)
        for window in windows([one for one in self.utterances if one.utterance_id in chosen]):
            by_place: dict[str, list[Utterance]] = {}
            for one in window:
                by_place.setdefault(one.source_id, []).append(one)
            read = self.corpus.read_audio(by_place)
            yield [(one, _decode(one, encoded)) for place, encoded in read for one in by_place[place]]


Window = list[tuple[Utterance, Clip | AudioError]]


def corpus_name(section: CorpusSection) -> str:
    """Name a corpus: its hub id, the recipe that it ships with, or its folder's own name; where it lies is not said."""
    if section.name is not None:
        return section.name
    folder = Path(str(section.path)).expanduser().resolve()
    return _shipped_corpora().get(folder, folder.name)


@cache
def _shipped_corpora() -> dict[Path, str]:
    sections = {name: load_recipe(name).corpus for name in recipe_names()}
    return {Path(section.path).resolve(): name for name, section in sections.items() if section.path is not None}


def named_sections() -> dict[str, CorpusSection]:
    """Return the test sets that go by a name, see eval_sets.toml."""
    return {name: CorpusSection.model_validate(table) for name, table in tomllib.loads(NAMED.read_text()).items()}


def open_eval_set(
    section: CorpusSection, *, split: str, max_samples: int | None = None, seed: int = 0, source: str | None = None
) -> EvalSet:
    """List what is to be scored.

    Args:
        section: the corpus.
        split: its split.
        max_samples: score a random sample of this many; None scores all.
        seed: of the sample.
        source: score only utterances of this source, such as "voxpopuli".

    Raises:
        CorpusError: no such corpus or split.
        EvaluationError: nothing to score.
    """
    corpus = open_corpus(section)
    rows = corpus.scan(split).to_pylist()
    names, num_renamed = unique_names([row["utterance_id"] or f"{split}/{row['source_id']}" for row in rows])
    everything = [_utterance(row, name, section) for row, name in zip(rows, names, strict=True)]
    return EvalSet(
        section=section,
        split=split,
        max_samples=max_samples,
        seed=seed,
        source=source,
        corpus=corpus,
        utterances=choose(everything, split, max_samples, seed, source),
        split_size=len(everything),
        num_renamed=num_renamed + sum(not row["utterance_id"] for row in rows),
    )


def unique_names(names: Iterable[str]) -> tuple[list[str], int]:
    """Give the second bearer of a name the suffix "#2", and so on; returns the names and how many were changed."""
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


def choose(
    everything: list[Utterance], split: str, max_samples: int | None, seed: int, source: str | None
) -> tuple[Utterance, ...]:
    """Pick a source and a random sample, in the order of the corpus; errors as `open_eval_set`."""
    chosen = [one for one in everything if source is None or one.source == source]
    if not chosen:
        sources = sorted({one.source for one in everything if one.source})
        hint = f"; sources there: {', '.join(sources) or 'none stated'}" if source else ""
        raise EvaluationError(f"split {split!r} holds no utterance{f' of source {source!r}' if source else ''}{hint}")
    if max_samples is not None:
        kept = set(sorted((one.utterance_id for one in chosen), key=lambda name: _rank(name, seed))[:max_samples])
        chosen = [one for one in chosen if one.utterance_id in kept]
    return tuple(chosen)


def _utterance(row: dict[str, Any], name: str, section: CorpusSection) -> Utterance:
    source = row["source"] or source_of(section.name or str(section.path), row["utterance_id"] or "")
    return Utterance(**{**row, "utterance_id": name, "source": source})


def _rank(utterance_id: str, seed: int) -> str:
    return hashlib.sha256(f"{seed} {utterance_id}".encode()).hexdigest()


def _file_name(text: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "._" else "-" for letter in text)


def windows(utterances: list[Utterance]) -> Iterator[list[Utterance]]:
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


def _decode(utterance: Utterance, encoded: bytes) -> Clip | AudioError:
    try:
        return Clip(utterance_id=utterance.utterance_id, samples=load_audio(encoded))
    except AudioError as error:
        return error
