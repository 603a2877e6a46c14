"""Stage one on a Ray cluster: one actor per GPU, shards as they come, lost actors and machines replaced by Ray.

Needs the optional extra `ray`, and one file system that all machines see. The content is that of one process: an actor
writes whole shards of the same plan, claims keep two from one shard, and a shard that died with its machine is begun
again by whoever gets it next. The driver only waits: store and encoder are the workers', whose device they are for.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cache import FeatureStore, store_repair
from pipelines.errors import PipelineError
from pipelines.extract.report import ExtractReport
from pipelines.extract.stage import join, prepare, read_report
from pipelines.processes import use_all_cores
from pipelines.recipes import Recipe

SHARDS_PER_CALL = 4  # so that an actor decodes the next shard while it encodes one
DEVICES = ("auto", "cpu", "cuda")


class ShardActor:
    """An encoder that stays loaded, and decoding workers that stay alive, while shards come."""

    def __init__(self, recipe: Recipe, store: str, max_bad: float | None, device: str) -> None:
        use_all_cores()
        self._extraction = join(recipe, Path(store), max_bad=max_bad, device=device)
        self._line = self._extraction.line().__enter__()  # the decoding workers end with this process

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write the shards of a batch that nobody has written yet."""
        pending, report = set(self._extraction.store.pending_shards()), self._extraction.report
        before = replace(report)
        self._extraction.check_bad()
        self._line.run([int(shard) for shard in batch["shard"] if int(shard) in pending])
        return {
            "written": [report.shards_written - before.shards_written],
            "hours": [report.hours_now - before.hours_now],
        }


def _prepare(recipe: Recipe, store: str, splits: Sequence[str], max_bad: float | None, device: str) -> ExtractReport:
    """Make the store, where the device is that it is made for."""
    use_all_cores()
    return prepare(recipe, Path(store), splits=splits, max_bad=max_bad, device=device).report


def ray_extract(
    recipe: Recipe,
    store_path: Path,
    *,
    splits: Sequence[str],
    part: tuple[int, int] = (0, 1),
    num_actors: int,
    max_bad: float | None = None,
    device: str = "auto",
) -> ExtractReport:
    """Extract with `num_actors` actors; each takes a GPU if the cluster has any. Errors as `extract`.

    Args:
        device: "cpu" takes no GPU even if there are some, "cuda" waits for them.

    Raises:
        PipelineError: Ray is not installed, a device by number, or what failed in an actor.
    """
    try:
        import ray
    except ImportError as error:
        raise PipelineError("Ray is not installed; pip install 'tinyaudio[ray]', or leave --ray away") from error
    if device not in DEVICES:
        raise PipelineError(f"--device {device!r} with --ray; Ray hands out the GPUs: expected {', '.join(DEVICES)}")
    ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False, logging_level="warning")
    has_gpu = device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
    num_gpus, here = int(has_gpu), "cuda" if has_gpu else "cpu"
    path = store_path.absolute()
    try:
        making = ray.remote(num_gpus=num_gpus)(_prepare)
        report: ExtractReport = ray.get(making.remote(recipe, str(path), tuple(splits), max_bad, here))
        store = FeatureStore.open(path)
        shards = store.pending_shards(part)
        results = ray.data.from_items([{"shard": shard} for shard in shards]).map_batches(
            ShardActor,
            batch_size=SHARDS_PER_CALL if len(shards) >= 2 * SHARDS_PER_CALL * num_actors else 1,
            concurrency=num_actors,
            num_gpus=num_gpus,
            fn_constructor_args=(recipe, str(path), max_bad, here),
        )
        done = results.take_all() if shards else []
    except ray.exceptions.RayError as error:
        raise PipelineError(_cause(error)) from error
    store_repair(store)
    if not store.pending_shards():
        store.seal()
    report.store = str(store_path)
    report.shards_written = sum(int(row["written"]) for row in done)
    report.hours_now = sum(float(row["hours"]) for row in done)
    return read_report(report)


def _cause(error: BaseException) -> str:
    """Find what was raised in the actor; of that Ray keeps no more than the traceback's text, among its own."""
    named = re.findall(r"^\s*([\w.]*(?:Error|Exception)): (.+)$", str(error), re.MULTILINE)
    ours = [(kind, text) for kind, text in named if not kind.startswith("ray.")]
    if not ours:
        return f"Ray: {' '.join(str(error).split())[:200]}"
    kind, text = ours[-1]
    return text if kind.startswith(("pipelines.", "cache.", "tinyaudio.")) else f"{kind}: {text}"
