"""What an extraction was asked for, kept beside its store, so that asking the same again costs nothing.

A branch name is resolved to a commit once, when the store is made: recipe and fingerprint carry the commit from then
on, and so does every request, wherever the branch points by then.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

from cache import FeatureStore, find_faults
from cache.errors import CacheError
from cache.plan import plan_digest
from pipelines.corpora import Corpus, open_corpus
from pipelines.corpora.hub import is_commit
from pipelines.encoders import encoder_name, is_local
from pipelines.errors import CorpusError, FetchError
from pipelines.extract.calibration import calibration_id
from pipelines.extract.plan import Plan, corpus_fingerprint
from pipelines.extract.report import ExtractReport
from pipelines.recipes import Recipe
from pipelines.retry import retry_hub

REQUEST, RECIPE = "request.json", "recipe.toml"  # inside the store
_ENCODER_FILES = ("*.json", "*.safetensors", "*.bin")


# ------------------------------------------------------------------------------------------- splits and revisions


def wanted_splits(recipe: Recipe, corpus: Corpus, split: str | None = None) -> tuple[list[str], list[str]]:
    """Decide which splits to extract: the one asked for, or train and dev.

    Returns:
        The splits, and warnings: a corpus without the dev split still trains, only unmeasured.

    Raises:
        CorpusError: a split that is not there.
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
            warnings.append(f"{error}; stage two will train without dev WER (corpus.dev_split names another one)")
    return splits, warnings


def pinned(recipe: Recipe, store: Path) -> Recipe:
    """Replace branch names by commits: those of the store if it was asked for the same, else what the hub says now.

    Raises:
        CorpusError: a data set or model that cannot be found. FetchError: no way to the hub.
    """
    recorded = _read(store)
    is_same = recorded.get("revisions") == _revisions(recipe)
    corpus, encoder = recipe.corpus, recipe.encoder
    if corpus.name is not None and not is_commit(corpus.revision):
        commit = recorded["pinned"]["corpus"] if is_same else _dataset_commit(recipe)
        corpus = corpus.model_copy(update={"revision": commit})
    if not is_local(encoder.id) and not is_commit(encoder.revision):
        asked = encoder.id, encoder.revision, corpus.fetch_patience_s
        commit = recorded["pinned"]["encoder"] if is_same else _model_commit(*asked)
        encoder = encoder.model_copy(update={"revision": commit})
    return recipe.model_copy(update={"corpus": corpus, "encoder": encoder})


def _revisions(recipe: Recipe) -> dict[str, Any]:
    """What the recipe itself says of revisions, and of what."""
    return {
        "corpus": [recipe.corpus.name, recipe.corpus.revision],
        "encoder": [encoder_name(recipe.encoder.id), recipe.encoder.revision],
    }


def _dataset_commit(recipe: Recipe) -> str | None:
    revision: str | None = open_corpus(recipe.corpus).provenance(recipe.corpus.train_split)["revision"]
    return revision


def _model_commit(model_id: str, revision: str | None, patience_s: float) -> str | None:
    """Ask for the commit that a model's revision means now; offline, that of the copy in the hub client's cache."""
    try:
        path = retry_hub(
            lambda: hf_hub_download(model_id, "config.json", revision=revision),
            f"model {model_id!r}",
            patience_s,
        )
    except FetchError:
        raise
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CorpusError(
            f"model {model_id!r} (revision {revision or 'main'!r}) cannot be found: {reason}; check encoder.id, the "
            "network and HF_TOKEN, or set encoder.id to a local folder"
        ) from error
    commit = Path(path).parent.name
    return commit if is_commit(commit) else revision


# ------------------------------------------------------------------------------------------- asking again


def request_of(recipe: Recipe, corpus: Corpus, splits: Sequence[str]) -> dict[str, Any]:
    """Spell everything that decides what the store will hold, without loading the encoder."""
    return {
        "corpus": corpus_fingerprint(recipe, corpus, splits),
        "encoder": {
            "id": encoder_name(recipe.encoder.id),
            "revision": None if is_local(recipe.encoder.id) else recipe.encoder.revision,
            "files": digest_model_files(Path(recipe.encoder.id)) if is_local(recipe.encoder.id) else None,
            **recipe.encoder.model_dump(include={"precision", "compile"}),
        },
        "store": {**recipe.store.model_dump(exclude={"calibration"}), "calibration": calibration_id(recipe)},
    }


def digest_model_files(folder: Path) -> str:
    """Compute the SHA-256 over names and contents of a local model's configuration and weights."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _ENCODER_FILES for path in folder.glob(pattern)}):
        with path.open("rb") as stream:
            digest.update(f"{path.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def save_request(store: Path, asked: Recipe, recipe: Recipe, splits: Sequence[str], request: dict[str, Any]) -> None:
    """Keep a request and the resolved recipe beside a store.

    Args:
        asked: the recipe as it came. recipe: the same, pinned.
    """
    document = {
        "request": request,
        "splits": list(splits),
        "revisions": _revisions(asked),
        "pinned": {"corpus": recipe.corpus.revision, "encoder": recipe.encoder.revision},
    }
    recorded = _read(store)
    if (store / RECIPE).exists() and all(recorded.get(key) == document[key] for key in ("request", "splits", "pinned")):
        return  # also when it was asked for by commit this time and by branch name before
    temporary = store / f".{REQUEST}.{os.getpid()}"
    recipe.save(temporary)
    temporary.replace(store / RECIPE)
    temporary.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n")
    temporary.replace(store / REQUEST)


def _read(store: Path) -> dict[str, Any]:
    """Read what a store was asked for; nothing if it does not say, which only costs time."""
    try:
        document = json.loads((store / REQUEST).read_text())
        return document if {"request", "splits", "revisions", "pinned"} <= document.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def recorded_plan(store: Path, request: dict[str, Any], splits: Sequence[str], rows_per_shard: int) -> Plan | None:
    """Read the plan of a store that was asked for the same; None if there is none, or a damaged one."""
    if _read(store).get("request") != request:
        return None
    try:
        opened = FeatureStore.open(store)
        table = opened.plan()
        is_sound = plan_digest(table) == opened.header.plan_id
    except (CacheError, OSError, ValueError, KeyError):
        return None
    return Plan(table=table, splits=tuple(splits), rows_per_shard=rows_per_shard) if is_sound else None


def finished(recipe: Recipe, store: Path, split: str | None = None) -> ExtractReport | None:
    """Answer for a store that holds all that is asked for, sealed and sound; None if there is anything to do.

    Raises:
        CorpusError: no such corpus or split.
    """
    recorded = _read(store)
    if not (store / "SEALED.json").exists() or not recorded:
        return None
    recipe = pinned(recipe, store)
    corpus, splits = open_corpus(recipe.corpus), recorded["splits"]
    if recipe.corpus.name is None:
        splits, _ = wanted_splits(recipe, corpus, split)
    elif splits not in _answers(recipe, split):  # at a fixed commit the data are what they were: no need to ask the hub
        return None
    if recorded["request"] != request_of(recipe, corpus, splits):
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


def _answers(recipe: Recipe, split: str | None) -> list[list[str]]:
    """List the splits that would do: the one asked for, or train, with dev if the corpus has it."""
    train, dev = recipe.corpus.train_split, recipe.corpus.dev_split
    return [[split]] if split is not None else [[train], *([[train, dev]] if dev is not None else [])]
