"""Stage one: corpus -> frozen encoder -> feature store, shard by shard, continuing where it stopped.

Here it is decided what is to be done: the plan, the encoder, the store, which shards. `shard_line` does it. Every
utterance ends up stored or in quarantine with a reason. Knows nothing of projectors or text models.
"""

import contextlib
import logging
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cache import FeatureStore, store_repair
from cache.create import compare_fields
from cache.errors import CacheError, StoreMismatchError
from cache.files import exclusive
from pipelines.corpora import Corpus, open_corpus
from pipelines.encoders import LoadedEncoder, open_encoder, pick_device
from pipelines.errors import DiskError, TooManyBadError
from pipelines.extract.calibration import calibrate, given_calibration, recorded_calibration
from pipelines.extract.disk import is_disk_full, wait_for_room
from pipelines.extract.encode import cut_batches
from pipelines.extract.kept_scans import forget_scans
from pipelines.extract.plan import Plan, audio_fingerprint, corpus_fingerprint, plan_corpus
from pipelines.extract.report import ExtractReport, Quarantine, faults_of_plan, listed, planned_out
from pipelines.extract.request import finished, pinned, recorded_plan, request_of, save_request, wanted_splits
from pipelines.extract.shard_pipeline import Progress, ShardLine
from pipelines.processes import Place, wait_for_all
from pipelines.recipes import Recipe
from pipelines.retry import resume

__all__ = [
    "ExtractReport",
    "Extraction",
    "Progress",
    "cut_batches",
    "extract",
    "join",
    "planned",
    "prepare",
    "read_report",
    "wanted_splits",
]

TOLERATED_BAD = 10  # utterances; below that a share of a small corpus says nothing
_log = logging.getLogger("tinyaudio")


@dataclass
class Extraction:
    """Stage one, ready to work on any of its shards."""

    recipe: Recipe
    corpus: Corpus
    encoder: LoadedEncoder
    store: FeatureStore
    report: ExtractReport
    max_bad: float | None  # given explicitly; None: the recipe's, tolerantly
    _quarantine: Quarantine = field(init=False)

    def __post_init__(self) -> None:
        self._quarantine = Quarantine(self.store)

    def line(self, on_progress: Progress | None = None) -> ShardLine:
        """Make the line that shards go through."""
        return ShardLine(
            self.recipe,
            self.corpus,
            self.encoder,
            self.store,
            self.report,
            on_progress=on_progress,
            check=self.check_bad,
        )

    def run(self, shards: Sequence[int], on_progress: Progress | None = None) -> None:
        """Work through shards; where the disk fills up under way, wait for room and go on. Errors as `extract`."""
        self.check_bad()
        full_since, left = math.inf, list(shards)
        while left:
            try:
                with self.line(on_progress) as line:
                    line.run(left)
                return
            except OSError as error:
                before, pending, now = len(left), set(self.store.pending_shards()), time.monotonic()
                left = [shard for shard in left if shard in pending]
                full_since = now if len(left) < before else min(full_since, now)
                left_s = self.recipe.extract.disk_patience_s - (now - full_since)
                if not is_disk_full(error) or left_s <= 0:
                    raise
                resume()
                wait_for_room(str(error), left_s)

    def check_bad(self) -> None:
        """Count what the plan and all writers of the store found bad.

        Raises:
            TooManyBadError: more than is tolerated.
        """
        self.report.quarantined = self._quarantine.count()
        reasons = self.report.quarantined + faults_of_plan(self.report.planned_out)
        filtered = sum(self.report.planned_out.values()) - sum(faults_of_plan(self.report.planned_out).values())
        bad, share, num_rows = sum(reasons.values()), self.max_bad, self.store.header.num_planned - filtered
        limit = self.recipe.extract.max_bad if share is None else share
        if bad > max(limit * num_rows, TOLERATED_BAD if share is None else 0):
            raise TooManyBadError(
                f"{bad} of {num_rows} utterances are bad so far{listed(dict(reasons.most_common(5)))}; expected at "
                f"most {100 * limit:g} %; look at {self.report.store}/quarantine, or give a larger --max-bad to go on"
            )


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
    """Run stage one, or go on with it, or see that it is finished.

    Args:
        store_path: made if absent; continued if it is the same extraction; repaired where it is damaged.
        part: (i, N): write only every N-th shard from the i-th on.
        group: this process among those of torchrun; they divide the part, then help each other with what is left.
        max_bad: share of the corpus's rows that may be bad, to the row; None takes the recipe's `extract.max_bad` and
            never minds the first ten. Rows that the recipe filters out by their length count neither way.
        on_progress: called after every encoder batch.

    Raises:
        CorpusError, MissingModelError: something the recipe names is not there.
        StoreMismatchError: a store of another recipe lies there.
        TooManyBadError: more than the tolerated share of the utterances could not be stored, by whomever.
        DiskError: the disk is full, or nearly, for longer than the recipe waits. FetchError: the network stayed away.
    """
    started = time.monotonic()
    with _one_line_for_a_full_disk():
        if group.rank:
            wait_for_all()
            if not FeatureStore.open(store_path).pending_shards():
                return read_report(ExtractReport(store=str(store_path)))
            extraction = join(recipe, store_path, max_bad=max_bad, device=device)
        else:
            done = finished(recipe, store_path, splits[0] if len(splits) == 1 else None)
            if done is None:
                extraction = prepare(recipe, store_path, splits=splits, max_bad=max_bad, device=device)
            wait_for_all()
            if done is not None:
                return done
        store, report = extraction.store, extraction.report
        mine = store.pending_shards(group.part(*part))
        extraction.run(mine, on_progress)
        if group.world > 1:
            extraction.run([shard for shard in store.pending_shards(part) if shard not in mine], on_progress)
        extraction.check_bad()
        if not store.pending_shards():
            store.seal()
    report.seconds = time.monotonic() - started
    return read_report(report)


def read_report(report: ExtractReport) -> ExtractReport:
    """Bring a report up to what the store holds by now, whoever wrote it."""
    report.read_totals(FeatureStore.open(Path(report.store)))
    return report


@contextlib.contextmanager
def _one_line_for_a_full_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if isinstance(error, CacheError) or not is_disk_full(error):
            raise
        raise DiskError(f"{error.strerror}: {error.filename!r}; make room and type the same again") from error


# ------------------------------------------------------------------------------------------- before the first shard


def prepare(
    recipe: Recipe, store_path: Path, *, splits: Sequence[str], max_bad: float | None = None, device: str = "auto"
) -> Extraction:
    """Plan, load the encoder, make or open the store, and take back what is damaged of it; errors as `extract`.

    Several processes may do this at once: the first plans and makes the store, the others then find that done.
    """
    where = pick_device(device)
    store_path.absolute().parent.mkdir(parents=True, exist_ok=True)
    with _preparing(store_path):
        fixed = pinned(recipe, store_path)
        corpus = open_corpus(fixed.corpus)
        plan = planned(fixed, corpus, splits, store_path)
    encoder = open_encoder(fixed.encoder, where, fixed.corpus.fetch_patience_s)
    with _preparing(store_path):
        store = _open_store(fixed, store_path, corpus, plan, encoder)
        save_request(store_path, recipe, fixed, splits, request_of(fixed, corpus, splits))
        forget_scans(store_path)
        report = ExtractReport(store=str(store_path), shards_total=store.num_shards, planned_out=plan.rejected())
        lost = {fault.shard for fault in store_repair(store) if fault.shard is not None and fault.is_lost}
        report.shards_repaired = len(lost)
    if report.shards_repaired:
        _log.warning("%d damaged shards of %s are made again", report.shards_repaired, store_path)
    return Extraction(fixed, corpus, encoder, store, report, max_bad)


def join(recipe: Recipe, store_path: Path, *, max_bad: float | None = None, device: str = "auto") -> Extraction:
    """Load the encoder for a store that another process has just prepared, without planning or checking it again.

    Raises:
        StoreMismatchError: the encoder is another one here, or computes in another precision.
    """
    fixed = pinned(recipe, store_path)
    store = FeatureStore.open(store_path)
    encoder = open_encoder(fixed.encoder, pick_device(device), fixed.corpus.fetch_patience_s)
    if differences := compare_fields(store.fingerprint["encoder"], encoder.fingerprint):
        raise StoreMismatchError(store_path, differences)
    report = ExtractReport(store=str(store_path), shards_total=store.num_shards, planned_out=planned_out(store))
    return Extraction(fixed, open_corpus(fixed.corpus), encoder, store, report, max_bad)


def planned(recipe: Recipe, corpus: Corpus, splits: Sequence[str], store_path: Path) -> Plan:
    """Read the plan that the store at this path has, or make one; errors as `plan_corpus`.

    Args:
        recipe: with pinned revisions.
    """
    for split in splits:
        corpus.require(split)
    plan = recorded_plan(store_path, request_of(recipe, corpus, splits), splits, recipe.store.rows_per_shard)
    return plan or plan_corpus(recipe, corpus, splits, store_path)


@contextlib.contextmanager
def _preparing(store_path: Path) -> Iterator[None]:
    """Hold a lock beside the store, which may not be there yet, and take the file away at the end.

    Whoever has waited for a file that is gone by then tries again with the next one, so that one at a time is in here.
    """
    path = store_path.absolute().parent / f".{store_path.name}.preparing"
    while True:
        with exclusive(path) as held:
            if not _is_at(path, held):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _open_store(recipe: Recipe, path: Path, corpus: Corpus, plan: Plan, encoder: LoadedEncoder) -> FeatureStore:
    fingerprint = {
        "encoder": encoder.fingerprint,
        "audio": audio_fingerprint(),
        "corpus": corpus_fingerprint(recipe, corpus, plan.splits),
    }
    calibration = None
    if recipe.store.encoding == "int8":
        calibration = given_calibration(recipe) or recorded_calibration(path)
        calibration = calibration or calibrate(recipe, corpus, plan, encoder)
    return FeatureStore.create(
        path,
        plan=plan.table,
        dim=encoder.model.config.hidden_size,
        fingerprint=fingerprint,
        encoding=recipe.store.encoding,
        rows_per_shard=recipe.store.rows_per_shard,
        calibration=calibration,
    )
