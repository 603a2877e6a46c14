"""Stage one: run the frozen encoder over a corpus once and store its features, shard by shard; resume after a kill.

This module decides what is to be done: the plan, the encoder, the store, the shards. `shard_pipeline` does it. Every
utterance is stored, or quarantined with a reason. Knows nothing of projectors or text models.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cache import FeatureStore, store_repair
from cache.create import compare_fields
from cache.errors import CacheError, StoreMismatchError
from cache.files import exclusive
from pipelines.encoders import LoadedEncoder, open_encoder, pick_device
from pipelines.errors import TooManyBadError
from pipelines.extract.calibration import calibrate
from pipelines.extract.plan import Plan, audio_fingerprint, corpus_fingerprint, forget_scans, plan_corpus
from pipelines.extract.report import ExtractReport, Quarantine, faults_of_plan, listed, planned_out
from pipelines.extract.request import Request, finished, given_calibration
from pipelines.extract.shard_pipeline import Progress, ShardPipeline
from pipelines.processes import Place, wait_for_all
from pipelines.recipes import Recipe

TOLERATED_BAD = 10  # utterances; a fraction of a small corpus would stop at the first
_log = logging.getLogger("tinyaudio")


def extract(
    recipe: Recipe,
    store_path: Path,
    *,
    splits: Sequence[str],
    part: tuple[int, int] = (0, 1),
    group: Place = Place(),  # noqa: B008 (frozen)
    max_bad: float | None = None,
    device: str = "auto",
    on_progress: Progress | None = None,
) -> ExtractReport:
    """Run stage one, resume it, or find that it is finished.

    Args:
        store_path: created if absent, resumed if it is the same extraction, and repaired if it is damaged.
        part: (i, N): write only every N-th shard, from the i-th.
        group: this process among those of torchrun. They divide the part, then help each other with the rest.
        max_bad: fraction of the corpus's rows that may be bad, exactly; None takes the recipe's `extract.max_bad` and
            always tolerates ten, but not all rows. Rows that the recipe filters out by duration do not count.
        on_progress: called after every encoder batch.

    Raises:
        CorpusError, MissingModelError: something that the recipe names does not exist.
        StoreMismatchError: the store has another recipe.
        TooManyBadError: more utterances than tolerated could not be stored, counted over all processes.
        DiskFullError: the disk was full for as long as the recipe waits. FetchError: the network failed.
    """
    started = time.monotonic()

    # 1. The first process plans and creates the store; the others join it.
    if group.rank == 0:
        report = finished(recipe, store_path, splits[0] if len(splits) == 1 else None)
        if report is None:
            extraction = prepare(recipe, store_path, splits=splits, max_bad=max_bad, device=device)
        wait_for_all()
        if report is not None:
            return report
    else:
        wait_for_all()
        if not FeatureStore.open(store_path).pending_shards():
            return read_report(ExtractReport(store=str(store_path)))
        extraction = join(recipe, store_path, max_bad=max_bad, device=device)

    # 2. Make this process's shards, then those that others have not begun.
    extraction.check_bad()
    store, mine = extraction.store, extraction.store.pending_shards(group.part(*part))
    with extraction.pipeline(on_progress) as pipeline:
        pipeline.run(mine)
        if group.world > 1:
            pipeline.run([shard for shard in store.pending_shards(part) if shard not in mine])

    # 3. Seal the store if it is complete.
    extraction.check_bad()
    if not store.pending_shards():
        store.seal()
    extraction.report.seconds = time.monotonic() - started
    return read_report(extraction.report)


@dataclass
class Extraction:
    """Stage one, ready to make any of its shards."""

    request: Request
    encoder: LoadedEncoder
    store: FeatureStore
    report: ExtractReport
    max_bad: float | None  # None: the recipe's, and always ten
    _quarantine: Quarantine = field(init=False)

    def __post_init__(self) -> None:
        self._quarantine = Quarantine(self.store)

    def pipeline(self, on_progress: Progress | None = None) -> ShardPipeline:
        """Make the pipeline that shards pass through."""
        recipe, corpus = self.request.recipe, self.request.corpus
        return ShardPipeline(
            recipe, corpus, self.encoder, self.store, self.report, on_progress=on_progress, check=self.check_bad
        )

    def check_bad(self) -> None:
        """Count the bad utterances of the plan and of all writers of the store.

        Raises:
            TooManyBadError: there are more than is tolerated.
        """
        self.report.quarantined = self._quarantine.count()
        faults = faults_of_plan(self.report.planned_out)
        reasons = self.report.quarantined + faults
        num_filtered = sum(self.report.planned_out.values()) - sum(faults.values())
        num_bad, num_rows = sum(reasons.values()), self.store.header.num_planned - num_filtered
        limit = self.request.recipe.extract.max_bad if self.max_bad is None else self.max_bad
        num_tolerated = min(TOLERATED_BAD, num_rows - 1) if self.max_bad is None else 0  # never all of them
        if num_bad > max(limit * num_rows, num_tolerated):
            raise TooManyBadError(
                f"{num_bad} of {num_rows} utterances are bad so far{listed(dict(reasons.most_common(5)))}; expected at "
                f"most {100 * limit:g} %. See {self.report.store}/quarantine, or pass a larger --max-bad to continue"
            )


def prepare(
    recipe: Recipe, store_path: Path, *, splits: Sequence[str], max_bad: float | None = None, device: str = "auto"
) -> Extraction:
    """Plan, load the encoder, create or open the store, and undo damage; errors as `extract`.

    Several processes may do this at the same time: the first plans and creates the store, the others find it.
    """
    where = pick_device(device)
    store_path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with preparing(store_path):
        request = Request.of(recipe, store_path, splits)
        plan = planned(request, store_path)
    recipe, corpus = request.recipe, request.corpus
    encoder = open_encoder(recipe.encoder, where, recipe.corpus.fetch_patience_s)
    with preparing(store_path):
        calibration = None
        if recipe.store.encoding != "float16":
            calibration = given_calibration(recipe)
            if calibration is None:
                with contextlib.suppress(CacheError):  # no store yet, or a damaged calibration: measure it
                    calibration = FeatureStore.open(store_path).calibration
            calibration = calibration or calibrate(recipe, corpus, plan, encoder)
        store = FeatureStore.create(
            store_path,
            plan=plan.table,
            dim=encoder.model.config.hidden_size,
            fingerprint={
                "encoder": encoder.fingerprint,
                "audio": audio_fingerprint(encoder.family),
                "corpus": corpus_fingerprint(recipe, corpus, plan.splits),
            },
            encoding=recipe.store.encoding,
            rows_per_shard=recipe.store.rows_per_shard,
            calibration=calibration,
        )
        request.save(store_path)
        forget_scans(store_path)
        report = ExtractReport(store=str(store_path), shards_total=store.num_shards, planned_out=plan.rejected())
        lost = {fault.shard for fault in store_repair(store) if fault.shard is not None and fault.is_lost}
        report.shards_repaired = len(lost)
    if report.shards_repaired:
        _log.warning("%d damaged shards of %s will be made again", report.shards_repaired, store_path)
    return Extraction(request, encoder, store, report, max_bad)


def planned(request: Request, store_path: Path) -> Plan:
    """Read the plan of a store with the same request, or make one; errors as `plan_corpus`."""
    for split in request.splits:
        request.corpus.require(split)
    plan = request.recorded_plan(store_path)
    return plan or plan_corpus(request.recipe, request.corpus, request.splits, store_path)


def join(recipe: Recipe, store_path: Path, *, max_bad: float | None = None, device: str = "auto") -> Extraction:
    """Load the encoder for a store that another process has just prepared, without planning or checking it again.

    Raises:
        StoreMismatchError: the encoder here is another one, or computes in another precision.
    """
    request, store = Request.of(recipe, store_path), FeatureStore.open(store_path)
    section = request.recipe.encoder
    encoder = open_encoder(section, pick_device(device), request.recipe.corpus.fetch_patience_s)
    if differences := compare_fields(store.fingerprint["encoder"], encoder.fingerprint):
        raise StoreMismatchError(store_path, differences)
    report = ExtractReport(store=str(store_path), shards_total=store.num_shards, planned_out=planned_out(store))
    return Extraction(request, encoder, store, report, max_bad)


def read_report(report: ExtractReport) -> ExtractReport:
    """Update a report with what all processes have stored."""
    report.read_totals(FeatureStore.open(Path(report.store)))
    return report


@contextlib.contextmanager
def preparing(store_path: Path) -> Iterator[None]:
    """Hold a lock file beside a store that may not exist yet, and remove the file at the end.

    A process that waited for a file that has been removed since takes the next one, so that only one is in here.
    """
    path = store_path.absolute().parent / f".{store_path.name}.preparing"
    while True:
        with exclusive(path) as held:
            try:
                if not os.path.samestat(path.stat(), os.fstat(held)):
                    continue
            except FileNotFoundError:
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
