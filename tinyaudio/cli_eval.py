"""The `eval` command."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer


def add_to(app: typer.Typer) -> None:
    """Add the commands of this module to the command line."""
    app.command("eval")(evaluate_command)


def evaluate_command(
    model: Annotated[
        str | None,
        typer.Argument(help="Run or checkpoint folder, or hub id.  [default: $TINYAUDIO_MODEL, else runs/latest]"),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe name or file.  [default: the run's own, else demo]")
    ] = None,
    corpus: Annotated[str | None, typer.Option(help="Corpus folder or hub data set.  [default: the recipe's]")] = None,
    split: Annotated[str | None, typer.Option(help="Split to score.  [default: the recipe's test split]")] = None,
    max_samples: Annotated[
        int | None, typer.Option(min=1, help="Score a random sample of this many utterances.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    source: Annotated[str | None, typer.Option(help="Score only utterances of this source.")] = None,
    provider: Annotated[str, typer.Option(help="System under evaluation.")] = "tinyaudio",
    num_beams: Annotated[int | None, typer.Option(min=1, help="Beams.  [default: the model's own]")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Utterances decoded together.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    output: Annotated[
        Path | None, typer.Option(help="Folder of the evaluation.  [default: RUN/eval/CORPUS-SPLIT]")
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try utterances again that failed before.")
    ] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Override a recipe key: section.key=value.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object on the last line.")] = False,
) -> None:
    """Score a model on a split: word error rate from raw audio. Killed and typed again, it goes on."""
    from pipelines.eval_sets import open_eval_set
    from pipelines.evaluate import evaluate
    from pipelines.providers import ProviderOptions, open_provider

    name = model or os.environ.get("TINYAUDIO_MODEL") or "runs/latest"
    section = _section(name, recipe, corpus, settings or [])
    eval_set = open_eval_set(
        section, split=split or section.test_split, max_samples=max_samples, seed=seed, source=source
    )
    folder = output or _default_output(name, provider, eval_set.name, num_beams)
    options = ProviderOptions(model=name, device=device, batch_size=batch_size, num_beams=num_beams, output=folder)
    done = evaluate(
        open_provider(provider, options), eval_set, folder, retry_failed=retry_failed, on_progress=_show_progress
    )
    print(f"{eval_set.name}: {done.word_errors}")
    print(f"written to {folder}", file=sys.stderr)
    if as_json:
        print(json.dumps({**done.word_errors.to_dict(), "output": str(folder)}))


def _section(model: str, recipe: str | None, corpus: str | None, settings: list[str]) -> Any:
    from pipelines.recipes import load_recipe

    saved = Path(model) / "recipe.toml"
    beside = Path(model).parent / "recipe.toml"  # a checkpoint inside a run
    own = next((str(path) for path in (saved, beside) if path.is_file()), "demo")
    if corpus is not None:
        settings = [*settings, f"corpus.{'path' if Path(corpus).is_dir() else 'name'}={json.dumps(corpus)}"]
    return load_recipe(recipe or own, settings).corpus


def _default_output(model: str, provider: str, set_name: str, num_beams: int | None) -> Path:
    parts = [set_name, None if provider == "tinyaudio" else provider, num_beams and f"beams{num_beams}"]
    name = "-".join(str(part) for part in parts if part)
    return (Path(model) if Path(model).is_dir() else Path("evaluations") / model.replace("/", "--")) / "eval" / name


def _show_progress(done: int, total: int) -> None:
    if sys.stderr.isatty() or done == total or done % 100 == 0:
        print(f"\r{done}/{total} utterances", end="\n" if done == total else "", file=sys.stderr, flush=True)
