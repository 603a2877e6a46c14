"""Publish a run: make a folder with the model, its card, its evaluations and samples, and upload it to the hub.

    <run>/publish/config.json, model.safetensors, *.py, ...   the model, ready to load
    <run>/publish/README.md                                    the card
    <run>/publish/evaluations/<name>/summary.json, report.md   the source of the card's numbers
    <run>/publish/samples.jsonl                                references and outputs, drawn with a fixed seed
    <run>/publish/recipe.toml                                  how the model was made

Only evaluations of these very weights are published; one of an earlier checkpoint is an error. No file names the
machine that made it.
"""

import json
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file

from pipelines.errors import PublishError, one_line
from pipelines.evaluate.predictions import read_predictions
from pipelines.evaluate.report.report import set_name
from pipelines.evaluate.summary import Summary, load_summary, save_summary
from pipelines.files import write_text
from pipelines.publish.card import decoding, make_card
from pipelines.recipes import Recipe, load_recipe
from tinyaudio.model.configuration_tinyaudio import TinyAudioConfig
from tinyaudio.model.frozen import is_hub_id, weights_digest
from tinyaudio.model.projectors import build_projector

CONFIG, WEIGHTS = "config.json", "model.safetensors"
NUM_SAMPLES = 5  # of each set
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name
# The files of a checkpoint that are published; run.json, metrics and optimizer states are not.
_PUBLISHED = f"{CONFIG} generation_config.json processor_config.json preprocessor_config.json tokenizer*.json"
_PUBLISHED += " special_tokens_map.json vocab.json merges.txt *.jinja *.safetensors *.py"


@dataclass(frozen=True, kw_only=True)
class Publication:
    """A folder ready for the hub, and its address there; None after a dry run."""

    folder: Path
    files: tuple[str, ...]
    url: str | None


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The model of a run: its configuration, and the size and digest of its projector, from the weights."""

    config: TinyAudioConfig
    num_parameters: int
    projector_digest: str


def publish(
    run: Path,
    repo_id: str,
    *,
    dry_run: bool,
    private: bool = False,
    encoder_id: str | None = None,
    decoder_id: str | None = None,
    power_watts: float | None = None,
    grams_per_kwh: float | None = None,
    token: str | None = None,
) -> Publication:
    """Make the folder and its card, and upload it.

    Args:
        dry_run: make the folder and stop.
        encoder_id, decoder_id: published ids of the frozen parts, if the run used local copies.
        power_watts, grams_per_kwh: for the energy on the card; without them none is given.
        token: of the hub; None uses the stored one or HF_TOKEN.

    Raises:
        PublishError: no model, an evaluation of other weights, a local part, or a failed upload.
    """
    if not REPOSITORY.fullmatch(repo_id):
        raise PublishError(f"expected a repository as owner/name, found {repo_id!r}")
    model = read_model(run)
    config = model.config
    config.encoder_id = _public_name(encoder_id or config.encoder_id)
    config.decoder_id = _public_name(decoder_id or config.decoder_id)
    local = [part for part in (config.encoder_id, config.decoder_id) if not is_hub_id(part)]
    if local and not dry_run:
        raise PublishError(
            f"expected published frozen parts, found local folders ({', '.join(local)}), which others cannot load. "
            "Name published copies with --encoder-id and --decoder-id, or use --dry-run"
        )

    summaries = _evaluations(run)
    ours = {name: one for name, one in summaries.items() if one.settings.provider == "tinyaudio"}
    for name, one in ours.items():
        found = one.settings.model.get("projector_digest")
        if found != model.projector_digest:
            raise PublishError(
                f"the evaluation {name!r} is of other weights ({str(found)[:12]}) than this model "
                f"({model.projector_digest[:12]}). Evaluate again, or delete {str(run / 'eval' / name)!r}"
            )

    folder = run / "publish"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in sorted({path for pattern in _PUBLISHED.split() for path in run.glob(pattern)}):
        shutil.copyfile(path, folder / path.name)
    settings: dict[str, Any] = json.loads((run / CONFIG).read_text())
    settings |= {"encoder_id": config.encoder_id, "decoder_id": config.decoder_id}
    settings.pop("_name_or_path", None)
    write_text(folder / CONFIG, json.dumps(settings, indent=2, sort_keys=True) + "\n")
    recipe = load_recipe(str(run / "recipe.toml")) if (run / "recipe.toml").is_file() else None
    if recipe is not None:
        _anonymous(recipe).save(folder / "recipe.toml")
    for name, one in summaries.items():
        target = folder / "evaluations" / name
        target.mkdir(parents=True)
        save_summary(target / "summary.json", one)
        shutil.copyfile(run / "eval" / name / "report.md", target / "report.md")
    samples = _samples(run, ours)
    write_text(folder / "samples.jsonl", "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in samples))
    state = run / "run.json"
    card = make_card(
        repo_id,
        config=config,
        num_parameters=model.num_parameters,
        recipe=recipe,
        report=json.loads(state.read_text()).get("report", {}) if state.is_file() else {},
        evaluations=list(ours.values()),
        controls=[one for name, one in summaries.items() if name not in ours],
        samples=samples,
        power_watts=power_watts,
        grams_per_kwh=grams_per_kwh,
    )
    write_text(folder / "README.md", str(card))

    files = tuple(sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
    if dry_run:
        return Publication(folder=folder, files=files, url=None)
    api = HfApi(token=token)
    try:
        ModelCard.load(folder / "README.md").validate()
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Publish with tinyaudio")
    except (OSError, ValueError) as error:
        raise PublishError(
            f"the upload to {repo_id!r} failed: {one_line(error)}. {str(folder)!r} is complete; run this command again"
        ) from error
    return Publication(folder=folder, files=files, url=str(url))


def read_model(run: Path) -> Checkpoint:
    """Read a checkpoint folder; a PublishError if there is none, or if its weights do not fit its configuration."""
    missing = [name for name in (CONFIG, WEIGHTS) if not (run / name).is_file()]
    if missing:
        raise PublishError(f"expected the folder of a finished run; {str(run)!r} lacks {', '.join(missing)}")
    config = TinyAudioConfig.from_dict(json.loads((run / CONFIG).read_text()))
    projector = build_projector(
        config.projector_kind, config.encoder_dim, config.decoder_dim, config.stack_factor, config.projector_hidden_size
    )
    prefix = "projector."  # a CTC head may be beside it
    stored = load_file(run / WEIGHTS)
    weights = {key.removeprefix(prefix): tensor for key, tensor in stored.items() if key.startswith(prefix)}
    try:
        projector.load_state_dict(weights)
    except RuntimeError as error:
        raise PublishError(f"{str(run / WEIGHTS)!r} does not fit {CONFIG}: {one_line(error)}") from error
    num_parameters = sum(parameter.numel() for parameter in projector.parameters())
    return Checkpoint(config=config, num_parameters=num_parameters, projector_digest=weights_digest(projector))


def _evaluations(run: Path) -> dict[str, Summary]:
    """Read one evaluation of each set, system and decoding: the largest, and the newest of those. Ordered by name."""
    paths = sorted((run / "eval").glob("*/summary.json"), key=lambda path: path.stat().st_mtime_ns)
    found = sorted(((path.parent.name, load_summary(path)) for path in paths), key=lambda pair: _num_scored(pair[1]))
    kept = {}
    for name, one in found:
        system = "ours" if one.settings.provider == "tinyaudio" else one.name  # a renamed run is the same model
        kept[_set_key(one), system, decoding(one)] = (name, one)
    return dict(sorted(kept.values()))


def _set_key(summary: Summary) -> tuple[Any, ...]:
    """Return what identifies a set: the digest of its files if known, since a folder may be renamed; else its name."""
    scored = summary.settings.scored
    origin = (scored.get("provenance") or {}).get("files_digest") or summary.settings.corpus_name
    return (origin, *(scored.get(name) for name in ("config", "split", "source")))


def _num_scored(summary: Summary) -> int:
    return summary.headline.word_errors.utterances


def _samples(run: Path, evaluations: dict[str, Summary]) -> list[dict[str, str]]:
    """Draw references and outputs of each set, from its largest evaluation."""
    largest: dict[tuple[Any, ...], str] = {}
    for name, summary in sorted(evaluations.items(), key=lambda pair: -_num_scored(pair[1])):
        largest.setdefault(_set_key(summary), name)
    samples = []
    for name in sorted(largest.values()):
        predictions = read_predictions(run / "eval" / name / "predictions.jsonl")
        answered = sorted((one for one in predictions if not one.is_failed), key=lambda one: one.utterance_id)
        chosen = random.Random(0).sample(answered, min(NUM_SAMPLES, len(answered)))
        label = set_name(evaluations[name])
        samples += [{"set": label, "reference": one.text, "output": str(one.pred_text)} for one in chosen]
    return samples


def _anonymous(recipe: Recipe) -> Recipe:
    """Return a recipe without the folders of this machine."""
    corpus = recipe.corpus
    if corpus.path is not None:
        corpus = corpus.model_copy(update={"path": _public_name(corpus.path)})
    encoder = recipe.encoder.model_copy(update={"id": _public_name(recipe.encoder.id)})
    decoder = recipe.decoder.model_copy(update={"id": _public_name(recipe.decoder.id)})
    return recipe.model_copy(update={"corpus": corpus, "encoder": encoder, "decoder": decoder})


def _public_name(name: str) -> str:
    """Return a hub id as it is, and only the last part of a folder's path."""
    return name if is_hub_id(name) else Path(name).name
