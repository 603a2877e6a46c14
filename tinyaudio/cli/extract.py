"""The command `extract`: stage one. Part of the roof."""

import json as json_module
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyaudio.cli.options import DeviceOption, JsonOption, RecipeOption, SetOption, StoreOption, default_store, say

LOG_EVERY_S = 60.0  # between lines of progress where stderr is not a terminal
PLAN_PATIENCE_S = 60.0  # seconds to keep trying for an answer of the hub: somebody waits for the plan
_PLAN_HELP = "Say what would be done, and stop. A hub data set's list is kept beside the store, for the extraction."
_UNSEALED = (
    "{store} is not complete: living processes elsewhere are writing the shards that are missing. Type the same again "
    "when they are done; training wants a sealed store"
)


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("extract")(extract)


def _parse_part(part: str) -> tuple[int, int]:
    index, slash, total = part.partition("/")
    if slash and index.isdigit() and total.isdigit() and int(index) < int(total):
        return int(index), int(total)
    raise typer.BadParameter(f"{part!r}; expected i/N with i from 0 to N-1, such as 0/4", param_hint="--shard")


def extract(
    recipe: RecipeOption = "demo",
    store: StoreOption = None,
    split: Annotated[str | None, typer.Option("--split", help="Only this split; default train and dev.")] = None,
    set_: SetOption = None,
    plan: Annotated[bool, typer.Option("--plan", help=_PLAN_HELP)] = False,
    shard: Annotated[str, typer.Option("--shard", help="i/N: only every N-th shard from the i-th on.")] = "0/1",
    max_bad: Annotated[
        float | None,
        typer.Option(
            "--max-bad",
            min=0.0,
            max=1.0,
            help="Share of rows that may be bad, exactly: audio that fails, no text or far too much, duplicate ids; "
            "not what the recipe filters out by length.  [default: the recipe's extract.max_bad, and ten]",
        ),
    ] = None,
    ray: Annotated[
        int, typer.Option("--ray", min=0, help="Ray actors, one GPU each where there are any; 0: this process.")
    ] = 0,
    device: DeviceOption = "auto",
    json: JsonOption = False,
) -> None:
    """Stage one: run the frozen encoder once over a corpus and store its features.

    Typed again it goes on where it stopped; typed after damage it repairs exactly the damaged shards.
    """
    from pipelines.extract.request import finished
    from pipelines.processes import place
    from pipelines.recipes import load_recipe

    part = _parse_part(shard)
    loaded = load_recipe(recipe, set_ or [])
    path = store or default_store(loaded.name, split)
    if plan:
        _plan(loaded, path, split, device, part, json)
        return
    here = place()
    report: Any = finished(loaded, path, split) if here.world == 1 else None
    if report is not None:
        say(f"{path} is complete; nothing to do")
    else:
        report = _work(loaded, path, split, part, max_bad, ray, device)
    if here.rank:
        return
    print(report)
    if json:
        print(json_module.dumps(report.to_dict()))
    if not report.is_complete and part == (0, 1):
        say("error: " + _UNSEALED.format(store=path))
        raise typer.Exit(1)


def _work(
    recipe: Any, path: Path, split: str | None, part: tuple[int, int], max_bad: float | None, ray: int, device: str
) -> Any:
    """Extract, and give the report."""
    from pipelines.processes import place, use_all_cores, wait_for_all

    splits = _splits(recipe, path, split)
    if ray:
        from pipelines.extract.ray_cluster import ray_extract

        return ray_extract(recipe, path, splits=splits, part=part, num_actors=ray, max_bad=max_bad, device=device)
    from pipelines.extract.stage import extract as stage_one
    from pipelines.extract.stage import read_report

    here = place()
    if here.world > 1:
        use_all_cores()
    with _ProgressBar(is_shown=here.rank == 0) as bar:
        report = stage_one(
            recipe, path, splits=splits, part=part, group=here, max_bad=max_bad, device=device, on_progress=bar
        )
    wait_for_all()
    return read_report(report)


def _splits(recipe: Any, path: Path, split: str | None) -> list[str]:
    from pipelines.corpora import open_corpus
    from pipelines.extract.request import pinned, wanted_splits

    splits, warnings = wanted_splits(recipe, open_corpus(pinned(recipe, path).corpus), split)
    for warning in warnings:
        say(f"warning: {warning}")
    return splits


def _plan(recipe: Any, path: Path, split: str | None, device: str, part: tuple[int, int], json: bool) -> None:
    from pipelines.corpora import open_corpus
    from pipelines.extract.forecast import forecast
    from pipelines.extract.request import pinned
    from pipelines.extract.stage import planned

    patience_s = min(recipe.corpus.fetch_patience_s, PLAN_PATIENCE_S)
    corpus_section = recipe.corpus.model_copy(update={"fetch_patience_s": patience_s})
    fixed = pinned(recipe.model_copy(update={"corpus": corpus_section}), path)
    corpus = open_corpus(fixed.corpus)
    found = forecast(fixed, corpus, planned(fixed, corpus, _splits(fixed, path, split), path), path, device, part)
    print(found)
    if json:
        print(json_module.dumps(found.to_dict()))


class _ProgressBar:
    """Audio hours done, on stderr: a bar in a terminal, else a line now and then."""

    def __init__(self, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._begun: float | None = None  # when the first batch was done: what came before says nothing of the speed
        self._said = self._first_s = self._done_s = 0.0

    def __enter__(self) -> "_ProgressBar":
        from tqdm import tqdm

        form = "{desc} {percentage:3.0f}% |{bar}| {n:.2f}/{total:.2f} h [{elapsed}<{remaining}{postfix}]"
        is_hidden = not (self._is_shown and sys.stderr.isatty())
        self._bar = tqdm(total=0, file=sys.stderr, disable=is_hidden, bar_format=form, desc="extract")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, audio_s: float, state: dict[str, Any]) -> None:
        now = time.monotonic()
        self._done_s += audio_s
        if self._begun is None:
            self._begun = self._said = now
            self._first_s = audio_s
            self._bar.reset()
        speed = (self._done_s - self._first_s) / max(now - self._begun, 1e-9)
        words = (
            f"{speed:,.1f}x real time, {state['written_bytes'] / 1e9:.2f} GB, shard {state['shard']}, "
            f"{state['bad']} quarantined"
        )
        self._bar.total = state["total_s"] / 3600
        self._bar.set_postfix_str(words, refresh=False)
        self._bar.update(audio_s / 3600)
        if self._is_shown and self._bar.disable and now - self._said > LOG_EVERY_S:
            self._said = now
            left = max(state["total_s"] - self._done_s, 0) / max(speed, 1e-9)
            done = f"{self._done_s / 3600:.2f} of {state['total_s'] / 3600:.2f} h"
            say(f"extract: {done}, {words}, {left / 60:.0f} min left")
