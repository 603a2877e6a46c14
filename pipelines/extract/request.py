"""Requests: what a store is asked to hold, kept in the store so that repeating the request costs nothing.

Two requests are the same if their `content` is equal. Then a finished store answers at once, and an unfinished one
resumes with the plan that it has. A branch name is resolved to a commit once, when the store is created: the store
keeps the revisions that the recipe gave, and a recipe with the same revisions gets the same commits.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from huggingface_hub import hf_hub_download

from cache import Calibration, FeatureStore, find_faults
from cache.errors import CacheError
from cache.plan import plan_digest
from pipelines.corpora import Corpus, open_corpus
from pipelines.corpora.hub import is_commit
from pipelines.errors import CorpusError, FetchError, RunError, one_line
from pipelines.extract.plan import Plan, corpus_fingerprint
from pipelines.extract.report import ExtractReport
from pipelines.files import write_text
from pipelines.recipes import Recipe
from pipelines.recipes.recipe import model_name
from pipelines.retry import retry_hub

REQUEST, RECIPE = "request.json", "recipe.toml"  # inside the store
_ENCODER_FILES = ("*.json", "*.safetensors", "*.bin")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A recipe at fixed commits, its corpus, and splits of it."""

    recipe: Recipe
    corpus: Corpus
    splits: tuple[str, ...]
    revisions: dict[str, Any]  # as the recipe gave them

    @classmethod
    def of(cls, recipe: Recipe, store: Path, splits: Sequence[str] = ()) -> Self:
        """Make the request of a recipe.

        Args:
            store: path; if a store is there, its commits are taken for the same revisions.
            splits: those of the store by default.

        Raises:
            CorpusError: a data set or model cannot be found. FetchError: the hub cannot be reached.
        """
        fixed = fix_revisions(recipe, store)
        chosen = tuple(splits or _read(store).get("splits", ()))
        return cls(recipe=fixed, corpus=open_corpus(fixed.corpus), splits=chosen, revisions=_revisions(recipe))

    def content(self) -> dict[str, Any]:
        """Describe everything that decides what the store will hold, without loading the encoder."""
        encoder, folder = self.recipe.encoder, Path(self.recipe.encoder.id)
        calibration = given_calibration(self.recipe)
        return {
            "corpus": corpus_fingerprint(self.recipe, self.corpus, self.splits),
            "encoder": {
                "id": model_name(encoder.id),
                "revision": None if folder.is_dir() else encoder.revision,
                "files": digest_model_files(folder) if folder.is_dir() else None,
                **encoder.model_dump(include={"precision", "compile"}),
                **({} if encoder.context is None else {"context": encoder.context}),
            },
            "store": {
                **self.recipe.store.model_dump(exclude={"calibration"}),
                "calibration": None if calibration is None else calibration.id,
            },
        }

    def recorded_plan(self, store: Path) -> Plan | None:
        """Read the plan of a store with the same request; None if there is none, or it is damaged."""
        if _read(store).get("content") != self.content():
            return None
        try:
            opened = FeatureStore.open(store)
            table = opened.plan()
            if plan_digest(table) != opened.header.plan_id:
                return None
        except (CacheError, OSError, ValueError, KeyError):
            return None
        return Plan(table=table, splits=self.splits, rows_per_shard=self.recipe.store.rows_per_shard)

    def save(self, store: Path) -> None:
        """Keep the request and the resolved recipe in a store, unless it has the same request already.

        A store that was first requested by branch name and now by commit keeps the branch name.
        """
        document = {"content": self.content(), "splits": list(self.splits), "revisions": self.revisions}
        recorded = _read(store)
        if not (store / RECIPE).exists() or any(recorded.get(key) != document[key] for key in ("content", "splits")):
            write_text(store / RECIPE, self.recipe.to_toml())
            write_text(store / REQUEST, json.dumps(document, indent=1, sort_keys=True) + "\n")


def _read(store: Path) -> dict[str, Any]:
    """Read the request of a store; {} if it has none, which only costs time."""
    try:
        document = json.loads((store / REQUEST).read_text())
        return document if {"content", "splits", "revisions"} <= document.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def finished(recipe: Recipe, store: Path, split: str | None = None) -> ExtractReport | None:
    """Report on a store that holds all of a request, sealed and undamaged; None if there is anything to do.

    The hub is asked nothing: at a fixed commit its data cannot have changed. Local files are compared.

    Args:
        split: the only one requested; None requests train, and dev if the corpus has it.

    Raises:
        CorpusError: no such local corpus or split.
    """
    if not (store / "SEALED.json").exists() or not (recorded := _read(store)):
        return None
    request = Request.of(recipe, store)
    splits, train, dev = list(request.splits), recipe.corpus.train_split, recipe.corpus.dev_split
    if recipe.corpus.name is None:
        is_requested = splits == wanted_splits(recipe, request.corpus, split)[0]
    else:
        is_requested = splits == [split] if split is not None else splits in ([train], [train, dev])
    if not is_requested or recorded["content"] != request.content():
        return None
    try:
        opened = FeatureStore.open(store)
        if next(find_faults(opened, deep=None), None) is not None:
            return None
        report = ExtractReport(store=str(store))
        report.read_totals(opened)
    except CacheError:
        return None
    return report


def wanted_splits(recipe: Recipe, corpus: Corpus, split: str | None = None) -> tuple[list[str], list[str]]:
    """Return the splits to extract (the given one, or train and dev), and a warning if stage two cannot measure.

    Raises:
        CorpusError: a split does not exist.
    """
    if split is not None:
        corpus.require(split)
        return [split], []
    splits, warnings = [recipe.corpus.train_split], []
    corpus.require(splits[0])
    if recipe.corpus.dev_split is not None:
        try:
            corpus.require(recipe.corpus.dev_split)
            splits.append(recipe.corpus.dev_split)
        except CorpusError as error:
            warnings.append(f"{error}. Stage two will train without dev WER; set corpus.dev_split to name another")
    return splits, warnings


def fix_revisions(recipe: Recipe, store: Path) -> Recipe:
    """Replace branch names by commits: those of a store with the same revisions, else what the hub names at present.

    Raises:
        CorpusError: a data set or model cannot be found. FetchError: the hub cannot be reached.
    """
    recorded = _read(store)
    content = recorded["content"] if recorded.get("revisions") == _revisions(recipe) else None
    corpus, encoder = recipe.corpus, recipe.encoder
    if corpus.name is not None and not is_commit(corpus.revision):
        if content is not None:
            provenance = next(iter(content["corpus"]["splits"].values()))
        else:
            provenance = open_corpus(corpus).provenance(corpus.train_split)
        corpus = corpus.model_copy(update={"revision": provenance["revision"]})
    if not Path(encoder.id).is_dir() and not is_commit(encoder.revision):
        if content is not None:
            commit = content["encoder"]["revision"]
        else:
            commit = _model_commit(encoder.id, encoder.revision, corpus.fetch_patience_s)
        encoder = encoder.model_copy(update={"revision": commit})
    return recipe.model_copy(update={"corpus": corpus, "encoder": encoder})


def _revisions(recipe: Recipe) -> dict[str, Any]:
    """Return the revisions that a recipe gives, with what they are revisions of."""
    return {
        "corpus": [recipe.corpus.name, recipe.corpus.revision],
        "encoder": [model_name(recipe.encoder.id), recipe.encoder.revision],
    }


def _model_commit(model_id: str, revision: str | None, timeout_s: float) -> str | None:
    """Ask for the commit that a model's revision names at present; offline, that of the hub client's cached copy."""
    try:
        path = retry_hub(
            lambda: hf_hub_download(model_id, "config.json", revision=revision), f"model {model_id!r}", timeout_s
        )
    except FetchError:
        raise
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"model {model_id!r} (revision {revision or 'main'!r}) cannot be found: {one_line(error)}. Check "
            "encoder.id, the network and HF_TOKEN, or set encoder.id to a local folder"
        ) from error
    commit = Path(path).parent.name
    return commit if is_commit(commit) else revision


def digest_model_files(folder: Path) -> str:
    """Compute the SHA-256 over names and contents of a local model's configuration and weights."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _ENCODER_FILES for path in folder.glob(pattern)}):
        with path.open("rb") as stream:
            digest.update(f"{path.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def given_calibration(recipe: Recipe) -> Calibration | None:
    """Read the calibration that a recipe takes from another store; None if it is to be measured.

    Raises:
        StoreNotFoundError: no such store. RunError: the store has no calibration.
    """
    if recipe.store.calibration is None:
        return None
    calibration = FeatureStore.open(recipe.store.calibration).calibration
    if calibration is None:
        raise RunError(
            f"store {recipe.store.calibration!r} is float16 and has no calibration. Set store.calibration to an int8, "
            "int4 or int3 store, or omit it to measure a new calibration"
        )
    return calibration
