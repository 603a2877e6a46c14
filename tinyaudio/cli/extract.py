"""The `extract` command: stage one."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyaudio.cli.console import ProgressBar, print_report, say
from tinyaudio.cli.options import DeviceOption, JsonOption, RecipeOption, SetOption, StoreOption, default_store

LOG_EVERY_S = 60.0  # between progress messages if stderr is not a terminal
PLAN_TIMEOUT_S = 60.0  # retries of the hub for --plan, whose user is waiting; an extraction waits as the recipe says


def _parse_part(part: str) -> tuple[int, int]:
    index, slash, total = part.partition("/")
    if slash and index.isdigit() and total.isdigit() and int(index) < int(total):
        return int(index), int(total)
    raise typer.BadParameter(f"{part!r}; expected i/N with i from 0 to N-1, such as 0/4", param_hint="--shard")


def extract(
    recipe: RecipeOption = "demo",
    store: StoreOption = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Extract only this split.  [default: train and dev]")
    ] = None,
    set_: SetOption = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Print what would be done, and exit. The file list of a hub data set is kept for the extraction.",
        ),
    ] = False,
    shard: Annotated[
        str, typer.Option("--shard", help="i/N: write only the i-th of N runs of neighbouring shards.")
    ] = "0/1",
    max_bad: Annotated[
        float | None,
        typer.Option(
            "--max-bad",
            min=0.0,
            max=1.0,
            help="Maximum fraction of unusable rows (undecodable audio, missing or overlong text, duplicate ids) "
            "before extraction stops. Rows filtered by duration do not count.  [default: the recipe's extract.max_bad; "
            "the first 10 are always tolerated, but not all rows]",
        ),
    ] = None,
    ray: Annotated[
        int, typer.Option("--ray", min=0, help="Number of Ray actors, one per GPU; 0 extracts in this process.")
    ] = 0,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Stage one: run the frozen encoder once over a corpus and store its features.

    If it is interrupted, run the same command again to resume. On a damaged store, the same command repairs exactly
    the damaged shards.
    """
    from pipelines.extract.request import finished
    from pipelines.processes import place, use_all_cores, wait_for_all
    from pipelines.recipes import load_recipe

    part = _parse_part(shard)
    loaded = load_recipe(recipe, set_ or [])
    path = store or default_store(loaded.name, split)
    if plan:
        from pipelines.extract.forecast import forecast
        from pipelines.extract.stage import planned

        timeout_s = min(loaded.corpus.fetch_patience_s, PLAN_TIMEOUT_S)
        section = loaded.corpus.model_copy(update={"fetch_patience_s": timeout_s})
        request = _request(loaded.model_copy(update={"corpus": section}), path, split)
        report: Any = forecast(request.recipe, request.corpus, planned(request, path), path, device, part)
        print_report(report, json)
        return
    here = place()
    report = finished(loaded, path, split) if here.world == 1 else None
    if report is not None:
        say(f"{path} is complete; nothing to do")
    else:
        splits = _request(loaded, path, split).splits
        chosen: dict[str, Any] = {"splits": splits, "part": part, "max_bad": max_bad, "device": device}
        if ray:
            from pipelines.extract.ray_cluster import ray_extract

            report = ray_extract(loaded, path, **chosen, num_actors=ray)
        else:
            from pipelines.extract.stage import extract as stage_one
            from pipelines.extract.stage import read_report

            if here.world > 1:
                use_all_cores()
            with ProgressBar("extract", unit="h", is_shown=here.rank == 0) as bar:
                on_progress = _Progress(bar, is_logged=here.rank == 0 and not bar.is_drawn)
                report = stage_one(loaded, path, **chosen, group=here, on_progress=on_progress)
            wait_for_all()
            report = read_report(report)
    if here.rank:
        return
    print_report(report, json)
    if not report.is_complete and part == (0, 1):
        say(
            f"error: {path} is incomplete: other processes are still writing the remaining shards. Run this command "
            "again when they finish; training needs a complete store."
        )
        raise typer.Exit(1)


def _request(recipe: Any, store: Path, split: str | None) -> Any:
    """Resolve a recipe and choose its splits, with a warning for a missing one."""
    from pipelines.extract.request import Request, wanted_splits

    request = Request.of(recipe, store)
    splits, warnings = wanted_splits(request.recipe, request.corpus, split)
    for warning in warnings:
        say(f"warning: {warning}")
    return replace(request, splits=tuple(splits))


class _Progress:
    """Hours of audio done, after every batch: on the bar, or else as a message once a minute."""

    def __init__(self, bar: ProgressBar, is_logged: bool) -> None:
        self._bar, self._is_logged = bar, is_logged
        self._started_at = self._logged_at = 0.0
        self._first_s = self._done_s = 0.0

    def __call__(self, audio_s: float, state: dict[str, Any]) -> None:
        now = time.monotonic()
        self._done_s += audio_s
        if not self._first_s:  # the first batch includes warming up, which says nothing about the speed
            self._first_s, self._started_at, self._logged_at = audio_s, now, now
            self._bar.restart()
        speed = (self._done_s - self._first_s) / max(now - self._started_at, 1e-9)
        note = (
            f"{speed:,.1f}x real time, {state['written_bytes'] / 1e9:.2f} GB, shard {state['shard']}, "
            f"{state['bad']} quarantined"
        )
        done_h, total_h = self._done_s / 3600, state["total_s"] / 3600
        self._bar.update(round(done_h, 2), round(total_h, 2), note)
        if self._is_logged and now - self._logged_at > LOG_EVERY_S:
            self._logged_at = now
            left_s = max(state["total_s"] - self._done_s, 0) / max(speed, 1e-9)
            say(f"extract: {done_h:.2f} of {total_h:.2f} h, {note}, {left_s / 60:.0f} min left")
