"""Stage one on a Ray cluster: one actor per GPU, shards as they come, lost actors and machines replaced by Ray.

Needs the optional extra `ray`, and one file system that all machines see. The content is that of one process: an actor
writes whole shards of the same plan, claims keep two from one shard, and a shard that died with its machine is begun
again by whoever gets it next.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.errors import PipelineError
from pipelines.extract import Extraction, extract, prepare
from pipelines.extract_report import ExtractReport
from pipelines.recipes import Recipe, load_recipe
from pipelines.torchrun import use_all_cores

SHARDS_PER_CALL = 4  # so that an actor decodes the next shard while it encodes one


class ShardActor:
    """An encoder that stays loaded while shards come."""

    def __init__(self, recipe: str, store: str, splits: Sequence[str], max_bad: float | None) -> None:
        use_all_cores()
        self._extraction: Extraction = prepare(load_recipe(recipe), Path(store), splits=splits, max_bad=max_bad)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write the shards of a batch that nobody has written yet."""
        store = self._extraction.store
        pending = set(store.pending_shards())
        before = replace(self._extraction.report)
        self._extraction.run([int(shard) for shard in batch["shard"] if int(shard) in pending])
        report = self._extraction.report
        written, hours = report.shards_written - before.shards_written, report.hours_now - before.hours_now
        return {"written": [written], "hours": [hours]}


def ray_extract(
    recipe: Recipe,
    store_path: Path,
    *,
    splits: Sequence[str],
    part: tuple[int, int] = (0, 1),
    num_actors: int,
    max_bad: float | None = None,
) -> ExtractReport:
    """Extract with `num_actors` actors; each takes a GPU if the cluster has any. Errors as `extract`.

    Raises:
        PipelineError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise PipelineError("Ray is not installed; pip install 'tinyaudio[ray]', or leave --ray away") from error
    extraction = prepare(recipe, store_path, splits=splits, max_bad=max_bad, device="cpu")
    store, shards = extraction.store, extraction.store.pending_shards(part)
    ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False, logging_level="warning")
    saved = store_path.absolute() / "recipe.toml"
    num_gpus = 1 if ray.cluster_resources().get("GPU", 0) else 0
    results = ray.data.from_items([{"shard": shard} for shard in shards]).map_batches(
        ShardActor,
        batch_size=SHARDS_PER_CALL if len(shards) >= 2 * SHARDS_PER_CALL * num_actors else 1,
        concurrency=num_actors,
        num_gpus=num_gpus,
        fn_constructor_args=(str(saved), str(store_path.absolute()), tuple(splits), max_bad),
    )
    done = results.take_all() if shards else []
    report = extract(recipe, store_path, splits=splits, part=part, max_bad=max_bad, device="cpu")
    report.shards_written += sum(int(row["written"]) for row in done)
    report.hours_now += sum(float(row["hours"]) for row in done)
    report.shards_total = store.num_shards
    return report
