"""Runs: one execution of stage two is one folder, and that folder is a loadable model.

runs/<name>/recipe.toml        the resolved recipe; itself a recipe
runs/<name>/run.json           store, its fingerprint, commits of the frozen parts, whether it is finished
runs/<name>/metrics.jsonl      one JSON object per logged step
runs/<name>/not_finite.txt     of a run that ended on a loss or a weight that was not finite: its utterances
runs/<name>/tensorboard/       the same for TensorBoard
runs/<name>/checkpoints/       what --resume goes on from
runs/<name>/eval/              evaluations
runs/<name>/config.json, model.safetensors, ...    the newest model
runs/latest                    link to the newest run
"""

import contextlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from pipelines.errors import RunError
from pipelines.files import write_text
from pipelines.recipes import Recipe, load_recipe
from pipelines.recipes.recipe import differing_keys

RUNS = Path("runs")
LATEST = "latest"
# What may differ when a run goes on: where things lie and how often we look, never what is computed.
_FREE_TO_CHANGE = {
    "train.log_every",
    "train.eval_every",
    "train.eval_utterances",
    "train.save_every",
    "train.keep_checkpoints",
    "train.report_to",
}
_CORPUS_COUNTS = {"corpus.train_split", "corpus.dev_split"}  # the rest of its section is in the store's fingerprint
_MODEL_FILES = ("*.json", "*.safetensors", "*.py", "*.jinja", "*.txt", "*.model")


def run_folder(name: str | None, recipe_name: str) -> Path:
    """Resolve --run: a path if it has a slash, else a name under runs/; a new name from recipe and time if absent."""
    if name is None:
        return RUNS / f"{recipe_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(name) if "/" in name else RUNS / name


class Run:
    """One run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def state(self) -> dict[str, Any]:
        """The content of run.json; empty for a folder that is no run."""
        path = self.folder / "run.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    @property
    def is_finished(self) -> bool:
        return bool(self.state.get("is_finished"))

    @property
    def recipe(self) -> Recipe:
        return load_recipe(str(self.folder / "recipe.toml"))

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def begin(self, recipe: Recipe, state: dict[str, Any]) -> None:
        """Make the folder and say what will be done in it; errors as `check_free`."""
        self.check_free()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "recipe.toml", recipe.to_toml())
        self.update({"began": time.strftime("%Y-%m-%dT%H:%M:%S"), **state})
        self.point_latest_here()

    def check_free(self) -> None:
        """Find out whether a run may begin here.

        Raises:
            RunError: the folder holds a run already, or something else.
        """
        found = [path.name for path in self.folder.iterdir()] if self.folder.exists() else []
        # A recipe and half-written hidden files are what a kill during these lines leaves.
        if any(name != "recipe.toml" and not name.startswith(".") for name in found):
            if self.state:
                raise RunError(
                    f"{str(self.folder)!r} holds an unfinished run; add --resume to go on, or name another --run"
                )
            raise RunError(
                f"{str(self.folder)!r} is not empty and holds no run; expected a new folder. Name another --run"
            )

    def check_resumable(self, recipe: Recipe, fingerprint_id: str) -> None:
        """Refuse to go on with anything else than what was begun.

        Raises:
            RunError: no run here, or keys that differ, named with both values.
        """
        if not self.state:
            raise RunError(f"{str(self.folder)!r} holds no run to resume; expected a folder with run.json")
        sections = ("corpus", "encoder", "decoder", "store", "projector", "train")
        drift = {k: v for k, v in differing_keys(self.recipe, recipe, sections).items() if _counts(k)}
        if self.state["store_fingerprint"] != fingerprint_id:
            drift["store fingerprint"] = (self.state["store_fingerprint"][:12], fingerprint_id[:12])
        if drift:
            listed = ", ".join(f"{key} was {old!r} and is {new!r}" for key, (old, new) in drift.items())
            raise RunError(
                f"{str(self.folder)!r} was begun with another recipe: {listed}; restore it or start a new --run"
            )

    def metrics(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl; a last line torn by a kill does not count."""
        entries = []
        path = self.folder / "metrics.jsonl"
        for line in path.read_text().splitlines() if path.is_file() else []:
            with contextlib.suppress(json.JSONDecodeError):
                entries.append(dict(json.loads(line)))
        return entries

    def add_metrics(self, entry: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with (self.folder / "metrics.jsonl").open("a") as lines:
            lines.write(json.dumps(entry) + "\n")

    def rewind_metrics(self, step: int) -> None:
        """Drop what was written after a step: the run goes on from there and will write it again."""
        kept = [json.dumps(entry) + "\n" for entry in self.metrics() if entry["step"] <= step]
        write_text(self.folder / "metrics.jsonl", "".join(kept))

    @staticmethod
    def progress(path: Path) -> dict[str, Any]:
        """Read what a run had gone through at a checkpoint."""
        return dict(json.loads(path.read_text()))

    def update(self, state: dict[str, Any]) -> None:
        """Merge into run.json, replacing the file as a whole."""
        write_text(self.folder / "run.json", json.dumps({**self.state, **state}, indent=2) + "\n")

    def point_latest_here(self) -> None:
        """Make runs/latest a link to this run, if it lies in runs/."""
        link = self.folder.parent / LATEST
        if self.folder.parent.resolve() != RUNS.resolve() or (link.exists() and not link.is_symlink()):
            return
        temporary = link.with_name(f".{LATEST}.{os.getpid()}")
        temporary.symlink_to(self.folder.name)
        temporary.replace(link)

    def adopt_model(self, checkpoint: Path) -> None:
        """Copy a checkpoint's model files into the run folder, weights last, each one replaced as a whole."""
        files = [path for pattern in _MODEL_FILES for path in checkpoint.glob(pattern)]
        files = [path for path in files if not path.name.startswith(("trainer_", "training_", "progress"))]
        for path in sorted(files, key=lambda p: p.suffix == ".safetensors"):
            temporary = self.folder / f".{path.name}.tmp"
            shutil.copyfile(path, temporary)
            temporary.replace(self.folder / path.name)


def _counts(key: str) -> bool:
    """Say whether a setting may not differ when a run goes on."""
    return key in _CORPUS_COUNTS if key.startswith("corpus.") else key not in _FREE_TO_CHANGE
