"""Publish a run: a folder with model, card, evaluations, samples and checksums; then the hub, unless it is a rehearsal.

    <run>/publish/config.json, model.safetensors, *.py, ...   the model, loadable as it is
    <run>/publish/README.md                                    the card
    <run>/publish/evaluations/<name>/summary.json, report.md   what the card's numbers come from
    <run>/publish/samples.jsonl                                references and outputs, chosen by a fixed seed
    <run>/publish/recipe.toml                                  how it was made
    <run>/publish/SHA256SUMS                                   `sha256sum -c` checks the rest

Only evaluations of these very weights are published; one of an earlier checkpoint is refused. Nothing names the machine
it was made on.
"""

import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard

from pipelines.errors import PublishError
from pipelines.evaluate.predictions import read_predictions
from pipelines.evaluate.report.report import set_name
from pipelines.evaluate.summary import Summary, load_summary, save_summary
from pipelines.files import write_text
from pipelines.publish.card import CardFacts, make_card, one_of_each, set_key
from pipelines.publish.facts import CONFIG, Energy, ModelFacts, public_name, read_model, read_training
from pipelines.recipes import Recipe, load_recipe
from tinyaudio.model.frozen import is_hub_id

NUM_SAMPLES = 5  # of each set
# What a checkpoint's folder may hold for others; run.json, metrics and optimizer states stay at home.
_PUBLISHED = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer*.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
    "*.safetensors",
    "*.py",
)


@dataclass(frozen=True, kw_only=True)
class Publication:
    """A folder ready for the hub, and where it went (None: a rehearsal)."""

    folder: Path
    files: tuple[str, ...]
    url: str | None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Where others find the frozen parts, if the run used local copies of published ones."""

    encoder_id: str | None = None
    decoder_id: str | None = None


def publish(
    run: Path,
    repo_id: str,
    *,
    dry_run: bool,
    private: bool = False,
    parts: Parts = Parts(),
    power_watts: float | None = None,
    grams_per_kwh: float | None = None,
    token: str | None = None,
) -> Publication:
    """Make the folder, check its card, and upload it.

    Args:
        run: folder of a finished run.
        repo_id: "owner/name".
        dry_run: make the folder and stop.
        private: make the repository private, if it is new.
        parts: published ids of the frozen parts.
        power_watts, grams_per_kwh: for the energy on the card; without them none is stated.
        token: of the hub; None takes the stored one or HF_TOKEN.

    Raises:
        PublishError: no model, an evaluation of other weights, a local part, or a hub that refuses.
    """
    if not is_hub_id(repo_id):
        raise PublishError(f"repository {repo_id!r}; expected owner/name")
    model = _with_parts(read_model(run), parts)
    if not dry_run:
        _check_parts(model)
    folder = run / "publish"
    facts = _facts(run, repo_id, model, power_watts, grams_per_kwh)
    _stage(run, folder, model, facts)
    files = tuple(_checksum(folder))
    url = None if dry_run else _upload(folder, repo_id, private, token)
    return Publication(folder=folder, files=files, url=url)


def _with_parts(model: ModelFacts, parts: Parts) -> ModelFacts:
    changes = {key: value for key, value in vars(parts).items() if value is not None}
    return ModelFacts(**{**vars(model), **changes})


def _check_parts(model: ModelFacts) -> None:
    local = [part for part in (model.encoder_id, model.decoder_id) if not is_hub_id(part)]
    if local:
        raise PublishError(
            f"the model's frozen parts are local folders ({', '.join(map(public_name, local))}); others could not "
            "load it. Name published copies with --encoder-id and --decoder-id, or rehearse with --dry-run"
        )


def _facts(
    run: Path, repo_id: str, model: ModelFacts, power_watts: float | None, grams_per_kwh: float | None
) -> CardFacts:
    training, summaries = read_training(run), _evaluations(run)
    ours = {name: one for name, one in summaries.items() if one.settings.provider == "tinyaudio"}
    for summary in ours.values():
        _check_weights(summary, model)
    energy = None
    if power_watts is not None and training.seconds is not None:
        energy = Energy(seconds=training.seconds, power_watts=power_watts, grams_per_kwh=grams_per_kwh)
    return CardFacts(
        repo_id=repo_id,
        model=model,
        training=training,
        recipe=_recipe(run),
        evaluations=list(ours.values()),
        controls=[summary for summary in summaries.values() if summary.settings.provider != "tinyaudio"],
        samples=[sample for name in _one_of_each_set(ours) for sample in _samples(run, name, ours[name])],
        energy=energy,
    )


def _evaluations(run: Path) -> dict[str, Summary]:
    """Read the evaluations worth a row each, in the order of their names."""
    paths = sorted((run / "eval").glob("*/summary.json"), key=lambda path: (path.stat().st_mtime_ns, path))
    kept = one_of_each({path.parent.name: load_summary(path) for path in paths})
    return {name: kept[name] for name in sorted(kept)}


def _one_of_each_set(evaluations: dict[str, Summary]) -> list[str]:
    """Name the largest evaluation of each set, of those the first: the same sentences are shown once."""
    largest = sorted(evaluations, key=lambda name: -evaluations[name].headline.word_errors.utterances)
    first = {set_key(evaluations[name]): name for name in reversed(largest)}
    return sorted(first.values())


def _check_weights(summary: Summary, model: ModelFacts) -> None:
    found = summary.settings.model.get("projector_digest")
    if found != model.projector_digest:
        raise PublishError(
            f"the evaluation on {set_name(summary)} is of other weights ({str(found)[:12]}) than this model's "
            f"({model.projector_digest[:12]}); evaluate again, or delete that folder"
        )


def _recipe(run: Path) -> Recipe | None:
    path = run / "recipe.toml"
    return load_recipe(str(path)) if path.is_file() else None


def _samples(run: Path, name: str, summary: Summary) -> list[tuple[str, str, str]]:
    path = run / "eval" / name / "predictions.jsonl"
    answered = [one for one in read_predictions(path) if one.pred_text is not None]
    chosen = random.Random(0).sample(
        sorted(answered, key=lambda one: one.utterance_id), min(NUM_SAMPLES, len(answered))
    )
    return [(set_name(summary), one.text, str(one.pred_text)) for one in chosen]


def _stage(run: Path, folder: Path, model: ModelFacts, facts: CardFacts) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for pattern in _PUBLISHED:
        for path in sorted(run.glob(pattern)):
            shutil.copyfile(path, folder / path.name)
    _rewrite_config(folder / CONFIG, model)
    if facts.recipe is not None:
        _anonymous(facts.recipe).save(folder / "recipe.toml")
    for name, summary in _evaluations(run).items():
        target = folder / "evaluations" / name
        target.mkdir(parents=True)
        save_summary(target / "summary.json", summary)
        shutil.copyfile(run / "eval" / name / "report.md", target / "report.md")
    lines = [{"set": name, "reference": reference, "output": output} for name, reference, output in facts.samples]
    write_text(folder / "samples.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    card = make_card(facts)
    check_card(card)
    write_text(folder / "README.md", str(card))


def _rewrite_config(path: Path, model: ModelFacts) -> None:
    """Name the parts as others find them; a local folder goes by its name alone."""
    settings: dict[str, Any] = json.loads(path.read_text())
    settings |= {"encoder_id": public_name(model.encoder_id), "decoder_id": public_name(model.decoder_id)}
    settings.pop("_name_or_path", None)
    write_text(path, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _anonymous(recipe: Recipe) -> Recipe:
    """Leave out where things lie on this machine."""
    corpus = recipe.corpus
    if corpus.path is not None:
        corpus = corpus.model_copy(update={"path": public_name(corpus.path)})
    parts = {name: getattr(recipe, name) for name in ("encoder", "decoder")}
    parts = {name: part.model_copy(update={"id": public_name(part.id)}) for name, part in parts.items()}
    return recipe.model_copy(update={"corpus": corpus, **parts})


def check_card(card: ModelCard) -> None:
    """Check a card without the hub: its front matter reads back as what it says.

    Raises:
        PublishError: front matter that huggingface_hub cannot read, or fields that it lost.
    """
    again = ModelCard(str(card))
    lost = {key for key, value in card.data.to_dict().items() if again.data.to_dict().get(key) != value}
    if lost or not again.text.strip():
        raise PublishError(f"the card's front matter does not read back: {', '.join(sorted(lost)) or 'no text'}")


def _checksum(folder: Path) -> Sequence[str]:
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in files]
    write_text(folder / "SHA256SUMS", "".join(lines))
    return [*files, "SHA256SUMS"]


def _upload(folder: Path, repo_id: str, private: bool, token: str | None) -> str:
    api = HfApi(token=token)
    try:
        ModelCard.load(folder / "README.md").validate()
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Publish with tinyaudio")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise PublishError(
            f"the hub did not take {repo_id!r}: {reason}; the folder {str(folder)!r} is ready, type the same again"
        ) from error
    return str(url)
