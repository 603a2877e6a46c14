"""Runs: one execution of stage two is one folder, and that folder is a loadable model.

runs/<name>/recipe.toml        the resolved recipe; itself a recipe
runs/<name>/run.json           store, its fingerprint, overrides, commits of the frozen parts, whether it is finished
runs/<name>/metrics.jsonl      one JSON object per logged step
runs/<name>/log.txt            references and hypotheses at every evaluation
runs/<name>/not_finite.txt     of a run that ended on a loss or a weight that was not finite: its utterances
runs/<name>/tensorboard/       the metrics for TensorBoard
runs/<name>/checkpoints/       what --resume continues from
runs/<name>/eval/              evaluations
runs/<name>/config.json, model.safetensors, ...    the newest model
runs/<name>/.lock              locked while a process trains here; names the process
runs/latest                    link to the newest run
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cache.create import compare_fields
from pipelines.errors import RunError
from pipelines.files import replacing, write_text
from pipelines.recipes import Recipe, load_recipe

RUNS = Path("runs")
LATEST, LOG, LOCK = "latest", "log.txt", ".lock"
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # of the file system
SECTIONS = {"corpus", "encoder", "decoder", "store", "projector", "train"}  # of a recipe, those that concern a run
# Settings of [train] that may change when a run resumes: they affect how often it reports, not what it computes.
_FREE_TO_CHANGE = {"log_every", "eval_every", "eval_utterances", "save_every", "keep_checkpoints", "report_to"}
_MODEL_FILES = ("*.json", "*.safetensors", "*.py", "*.jinja", "*.txt", "*.model")


def run_folder(name: str | None, recipe_name: str) -> Path:
    """Resolve --run: a path if it has a slash, else a name under runs/; by default recipe and time."""
    if name is None:
        return RUNS / f"{recipe_name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(name) if "/" in name else RUNS / name


class Run:
    """One run's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def state(self) -> dict[str, Any]:
        """The content of run.json; empty if there is none."""
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

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from training here; creates the folder, and removes it if no run began.

        The kernel holds the lock for this process alone: it ends with the process, however that ends, and no child
        inherits it. A file system without locks is left as it is.

        Raises:
            RunError: another process trains here, with its number, its machine and since when.
        """
        is_new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / LOCK
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise self._in_use(os.read(descriptor, 4096)) from error
            me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(me).encode(), 0)
            try:
                yield
            finally:
                if not self.state:  # no run began
                    path.unlink(missing_ok=True)
                    if is_new and not any(self.folder.iterdir()):
                        self.folder.rmdir()
        finally:
            os.close(descriptor)

    def _in_use(self, content: bytes) -> RunError:
        who = "another process"
        with contextlib.suppress(ValueError, KeyError, TypeError):  # it has just begun to write it
            holder = json.loads(content)
            who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        return RunError(
            f"{str(self.folder)!r} is in use: {who} trains here. Wait for it or stop it, or use another --run"
        )

    def check_free(self) -> None:
        """Check that a run may begin here.

        Raises:
            RunError: the folder contains a run already, or something else.
        """
        found = [path.name for path in self.folder.iterdir()] if self.folder.exists() else []
        # A recipe, a log and hidden temporary files are what a kill during `begin` leaves.
        if any(name not in ("recipe.toml", LOG) and not name.startswith(".") for name in found):
            if self.state:
                raise RunError(f"{str(self.folder)!r} contains an unfinished run. Add --resume, or use another --run")
            raise RunError(f"{str(self.folder)!r} is not a run; expected a new or empty folder. Use another --run")

    def begin(self, recipe: Recipe, state: dict[str, Any]) -> None:
        """Create the folder with recipe.toml and run.json, and link runs/latest to it; errors as `check_free`."""
        self.check_free()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "recipe.toml", recipe.to_toml())
        self.update({"began": time.strftime("%Y-%m-%dT%H:%M:%S"), **state})
        link = self.folder.parent / LATEST
        if self.folder.parent.resolve() == RUNS.resolve() and (link.is_symlink() or not link.exists()):
            with replacing(link) as temporary:
                temporary.symlink_to(self.folder.name)

    def check_resumable(self, recipe: Recipe, fingerprint_id: str) -> None:
        """Check that a run would resume with the settings and the store it began with.

        Raises:
            RunError: no run here, or settings that differ, with both values.
        """
        if not self.state:
            raise RunError(f"{str(self.folder)!r} is not a run; expected a folder with run.json")
        changed = {}
        for key, values in compare_fields(self.recipe.model_dump(), recipe.model_dump()).items():
            section, _, name = key.partition(".")
            if section == "corpus":  # the other settings of this section are in the store's fingerprint
                is_free = name not in ("train_split", "dev_split")
            else:
                is_free = section not in SECTIONS or (section == "train" and name in _FREE_TO_CHANGE)
            if not is_free:
                changed[key] = values
        if self.state["store_fingerprint"] != fingerprint_id:
            changed["store fingerprint"] = (self.state["store_fingerprint"][:12], fingerprint_id[:12])
        if changed:
            listed = ", ".join(f"{key} was {old!r} and is {new!r}" for key, (old, new) in changed.items())
            raise RunError(
                f"{str(self.folder)!r} began with other settings: {listed}. Repeat its --set, or use a new --run"
            )

    def update(self, state: dict[str, Any]) -> None:
        """Merge into run.json."""
        write_text(self.folder / "run.json", json.dumps({**self.state, **state}, indent=2) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl; a last line cut off by a kill is ignored."""
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
        """Drop the metrics after a step: the run resumes there and writes them again."""
        kept = [json.dumps(entry) + "\n" for entry in self.metrics() if entry["step"] <= step]
        write_text(self.folder / "metrics.jsonl", "".join(kept))

    def log(self, text: str) -> None:
        """Append to log.txt."""
        with (self.folder / LOG).open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def adopt_model(self, checkpoint: Path) -> None:
        """Copy a checkpoint's model files into the run folder, each one atomically, the weights last."""
        files = [path for pattern in _MODEL_FILES for path in checkpoint.glob(pattern)]
        files = [path for path in files if not path.name.startswith(("trainer_", "training_", "progress"))]
        for path in sorted(files, key=lambda path: path.suffix == ".safetensors"):
            with replacing(self.folder / path.name) as temporary:
                shutil.copyfile(path, temporary)
