"""Stage one on a Ray cluster: one actor per GPU; Ray hands out shards and replaces lost actors and machines.

Needs the optional extra `ray`, and a file system that all machines share. The store is the one that a single process
makes: an actor writes whole shards of the same plan, a claim keeps two actors from one shard, and a shard lost with its
machine is made by the next actor that gets it. The driver only waits; the workers open store and encoder, for their
own device.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cache import FeatureStore, store_repair
from pipelines.errors import PipelineError, one_line
from pipelines.extract.report import ExtractReport
from pipelines.extract.stage import join, prepare, read_report
from pipelines.processes import use_all_cores
from pipelines.recipes import Recipe

SHARDS_PER_CALL = 32  # neighbours, of which an actor fetches no row group twice, and decodes the next while it encodes
DEVICES = ("auto", "cpu", "cuda")


class ShardActor:
    """An encoder and decoding workers that serve all shards of one actor."""

    def __init__(self, recipe: Recipe, store: str, max_bad: float | None, device: str) -> None:
        use_all_cores()
        self._extraction = join(recipe, Path(store), max_bad=max_bad, device=device)
        self._pipeline = self._extraction.pipeline().__enter__()  # the decoding workers end with this process

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write the shards of a batch that are still pending."""
        pending, report = set(self._extraction.store.pending_shards()), self._extraction.report
        before = replace(report)
        self._extraction.check_bad()
        self._pipeline.run([int(shard) for shard in batch["shard"] if int(shard) in pending])
        return {
            "written": [report.shards_written - before.shards_written],
            "hours": [report.hours_now - before.hours_now],
        }


def _prepare(recipe: Recipe, store: str, splits: Sequence[str], max_bad: float | None, device: str) -> ExtractReport:
    """Create the store on a worker, which has the device."""
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
        device: "cpu" takes no GPU even if there are some; "cuda" waits for them.

    Raises:
        PipelineError: Ray is not installed, the device has a number, or an actor failed.
    """
    try:
        import ray
    except ImportError as error:
        raise PipelineError("Ray is not installed. Run pip install 'tinyaudio[ray]', or omit --ray") from error
    if device not in DEVICES:
        raise PipelineError(
            f"--device: expected {', '.join(DEVICES)} with --ray, found {device!r}. Ray assigns the GPUs"
        )
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
            batch_size=min(SHARDS_PER_CALL, max(1, len(shards) // (2 * num_actors))),
            concurrency=num_actors,
            num_gpus=num_gpus,
            fn_constructor_args=(recipe, str(path), max_bad, here),
        )
        done = results.take_all() if shards else []
    except ray.exceptions.RayError as error:
        # Ray keeps the traceback of an actor as text: the last line that names an error of other modules is the cause.
        named = re.findall(r"^\s*([\w.]*(?:Error|Exception)): (.+)$", str(error), re.MULTILINE)
        causes = [(kind, text) for kind, text in named if not kind.startswith("ray.")]
        kind, text = causes[-1] if causes else ("Ray", one_line(error))
        is_ours = kind.startswith(("pipelines.", "cache.", "tinyaudio."))
        raise PipelineError(text if is_ours else f"{kind}: {text}") from error
    store_repair(store)
    if not store.pending_shards():
        store.seal()
    report.store = str(store_path)
    report.shards_written = sum(int(row["written"]) for row in done)
    report.hours_now = sum(float(row["hours"]) for row in done)
    return read_report(report)
