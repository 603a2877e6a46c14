"""The `eval` command. Part of the command line."""

import json as json_module
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyaudio.cli.console import usage

ModelArgument = Annotated[
    str | None,
    typer.Argument(help="Run or checkpoint folder, or hub id; default $TINYAUDIO_MODEL, else runs/latest. For a paid "
                        "provider: its speech model, or the run to score beside."),
]  # fmt: skip
PAID = ("assemblyai",)  # their models are no folders; a run says only what to score, and where the result goes


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("eval")(evaluate)


def say(line: str) -> None:
    """Print a message for people."""
    print(line, file=sys.stderr, flush=True)


def _rate(text: str) -> float:
    """Parse "5%" or "0.05"; a number above 1 without the sign is somebody's 5 %."""
    number = text.strip().removesuffix("%")
    try:
        value = float(number) / (100 if number != text.strip() else 1)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no rate; expected 5% or 0.05") from None
    if value < 0 or (value > 1 and number == text.strip()):
        raise typer.BadParameter(f"{text!r} is {100 * value:g} %; expected a fraction such as 0.05, or {number}%")
    return value


def evaluate(
    model: ModelArgument = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe name or file; default the model's own.")] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Folder, hub data set, or a name of eval_sets.toml; default the recipe's.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split to score; default the recipe's test split.")] = None,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Score a random sample of this many.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    source: Annotated[str | None, typer.Option(help="Score utterances of this source only.")] = None,
    from_store: Annotated[
        Path | None, typer.Option(help="Take features from this feature store instead of raw audio; no guard.")
    ] = None,
    provider: Annotated[str, typer.Option(help="tinyaudio, ctc, hf or assemblyai.")] = "tinyaudio",
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag of a hub model.")] = None,
    num_beams: Annotated[int | None, typer.Option(min=1, help="Beams; default the model's own.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens; default the model's own.")] = None,
    length_penalty: Annotated[float | None, typer.Option(help="Of beam search; default the model's own.")] = None,
    guard: Annotated[bool, typer.Option(help="Decode as transcribe does, or ask the model alone.")] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Utterances decoded together.")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    api_key: Annotated[str | None, typer.Option(help="Key of a paid provider; default its variable.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Jobs of a paid provider in flight.")] = 5,
    yes: Annotated[bool, typer.Option("--yes", help="Pay without being asked.")] = False,
    output: Annotated[Path | None, typer.Option(help="Folder; default RUN/eval/CORPUS-SPLIT.")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Try again what failed before.")] = False,
    normalizer: Annotated[str, typer.Option(help="Of the headline: recipe, whisper, basic or none.")] = "recipe",
    merge_compounds: Annotated[bool, typer.Option("--merge-compounds", help='"note book" is "notebook".')] = False,
    rescore: Annotated[
        Path | None, typer.Option(help="Score this evaluation folder or predictions file again; no model.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Another evaluation (its folder or predictions), or another run.")
    ] = None,
    fail_over: Annotated[
        float | None, typer.Option(parser=_rate, metavar="RATE", help="Exit 1 if the WER is above this: 5% or 0.05.")
    ] = None,
    set_: Annotated[list[str], typer.Option("--set", help="Override one setting: section.key=value.")] = [],  # noqa: B006
    json: Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")] = False,
) -> None:
    """Score a system on a split: word errors with intervals, breakdowns and a report. Killed, it goes on.

    Exits 1 if any utterance has no answer.
    """
    from pipelines.evaluate.providers.base import ProviderOptions
    from pipelines.evaluate.stage import Scoring, evaluation_name

    if length_penalty is not None and not math.isfinite(length_penalty):
        usage(f"--length-penalty {length_penalty:g}: expected a number")
    if rescore is not None:
        chosen: dict[str, Any] = {
            "MODEL": model,
            "--corpus": corpus,
            "--recipe": recipe,
            "--split": split,
            "--source": source,
        }
        chosen |= {"--max-samples": max_samples, "--from-store": from_store}
        _refuse([name for name, value in chosen.items() if value is not None], "--rescore scores what was answered")
        scoring = Scoring(normalizer=normalizer, merge_compounds=merge_compounds, compare_with=compare)
        _rescore(rescore, output, scoring, fail_over, json)
        return
    request = _Request(model, provider, revision, recipe, corpus, set_)
    eval_set = request.eval_set(split, max_samples, seed, source, from_store)
    options = ProviderOptions(
        model=request.model,
        revision=revision,
        device=device,
        batch_size=batch_size,
        num_beams=num_beams,
        max_new_tokens=max_new_tokens,
        length_penalty=length_penalty,
        guard=guard and from_store is None,
        api_key=api_key,
        concurrency=concurrency,
    )
    folder = output or request.folder / evaluation_name(provider, eval_set, options)
    options = replace(options, output=folder)
    same = evaluation_name("tinyaudio", eval_set, options)
    other = compare if compare is None or _is_evaluation(compare) else compare / "eval" / same
    scoring = Scoring(normalizer=normalizer, merge_compounds=merge_compounds, compare_with=other)
    summary = _run(request, options, eval_set, folder, scoring, retry_failed, yes)
    _finish(summary, f"predictions, summary.json, report.md and report.html: {folder}", folder, fail_over, json)


def _refuse(ignored: list[str], why: str) -> None:
    if ignored:
        raise typer.BadParameter(f"{why}; leave out {', '.join(ignored)}")


def _rescore(source: Path, output: Path | None, scoring: Any, fail_over: float | None, json: bool) -> None:
    from pipelines.evaluate.stage import score_again

    is_ours = source.name == "predictions.jsonl"
    folder = output or (source.parent if is_ours else source if source.is_dir() else source.with_suffix(""))
    summary = score_again(source, folder, scoring)
    _finish(summary, f"summary.json, report.md and report.html: {folder}", folder, fail_over, json)


class _Request:
    """What is to be evaluated, with the defaults filled in.

    `model` is what the provider gets; `folder` is where evaluations of it go; `section` is what is scored.
    """

    def __init__(
        self,
        model: str | None,
        provider: str,
        revision: str | None,
        recipe: str | None,
        corpus: str | None,
        settings: list[str],
    ) -> None:
        from pipelines.errors import EvaluationError
        from pipelines.recipes import load_recipe

        model = _default_model() if model is None and provider in ("tinyaudio", "ctc") else model
        is_folder = model is not None and Path(model).is_dir()
        self.provider = provider
        self.model = None if provider in PAID and is_folder else model
        self.folder = Path(str(model)) / "eval" if is_folder else Path("evaluations") / _file_name(model or provider)
        self.own = _recipe_beside(Path(str(model))) if is_folder else None
        if model is not None and not is_folder and provider == "tinyaudio":
            self.own = _recipe_on_hub(model, revision)
        if corpus is None and recipe is None and self.own is None:
            where = "" if model is None or is_folder else " (no folder here, and nothing fetched from the hub)"
            raise EvaluationError(
                f"{model or provider!r} brings no recipe.toml{where}; say what to score with --corpus or --recipe"
            )
        base = load_recipe(recipe or self.own or "demo")
        table = None if corpus is None else _corpus_table(corpus, base.corpus)
        self.section = load_recipe(recipe or self.own or "demo", settings, corpus=table).corpus

    @property
    def trained_on(self) -> str | None:
        from pipelines.evaluate.eval_sets import corpus_name
        from pipelines.recipes import load_recipe

        if self.own is None or self.provider != "tinyaudio":
            return None
        return corpus_name(load_recipe(self.own).corpus)

    def eval_set(
        self, split: str | None, max_samples: int | None, seed: int, source: str | None, store: Path | None
    ) -> Any:
        from pipelines.errors import EvaluationError
        from pipelines.evaluate.eval_sets import open_eval_set
        from pipelines.evaluate.stored_sets import open_stored_set

        chosen: dict[str, Any] = {"split": split or self.section.test_split, "max_samples": max_samples, "seed": seed}
        if store is None:
            return open_eval_set(self.section, **chosen, source=source)
        if self.provider != "tinyaudio":
            raise EvaluationError(f"provider {self.provider!r} cannot use stored features; leave --from-store out")
        return open_stored_set(store, self.section, **chosen, source=source)


def _default_model() -> str:
    from tinyaudio.transcribe import default_model

    return default_model()


def _recipe_beside(folder: Path) -> str | None:
    """Find the recipe of a run, also from one of its checkpoints."""
    beside = [folder / "recipe.toml", folder.parent / "recipe.toml", folder.parent.parent / "recipe.toml"]
    return next((str(path) for path in beside if path.is_file()), None)


def _recipe_on_hub(model: str, revision: str | None) -> str | None:
    """Fetch the recipe that `publish` puts beside a model; None for a model without one."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        return hf_hub_download(model, "recipe.toml", revision=revision)
    except (EntryNotFoundError, LocalEntryNotFoundError, HFValidationError, OSError):
        return None  # a model that is not there at all is reported when it is loaded


def _file_name(model: str) -> str:
    return model.strip("/").replace("/", "--")


def _corpus_table(corpus: str, base: Any) -> dict[str, Any]:
    """Make a corpus section of --corpus: a folder, a name of eval_sets.toml, or a data set of the hub."""
    from pipelines.errors import EvaluationError
    from pipelines.evaluate.eval_sets import named_sections

    table: dict[str, Any] = base.model_dump(exclude_none=True)
    named = named_sections()
    if Path(corpus).is_dir():
        return {key: value for key, value in table.items() if key not in ("name", "config", "revision")} | {
            "path": corpus
        }
    if corpus in named:
        made: dict[str, Any] = named[corpus].model_dump(exclude_none=True)
        return made
    if corpus.count("/") == 1 and not corpus.startswith((".", "/", "~")):
        if corpus == base.name:
            return table
        # columns, splits and revision are those of another set; the text policy is what the model was trained on
        return {"name": corpus, **{key: value for key, value in table.items() if key.startswith("text_")}}
    raise EvaluationError(f"no corpus {corpus!r}; expected a folder, a hub data set, or one of {', '.join(named)}")


def _is_evaluation(path: Path) -> bool:
    return path.is_file() or (path / "predictions.jsonl").is_file()


def _run(
    request: _Request, options: Any, eval_set: Any, folder: Path, scoring: Any, retry_failed: bool, yes: bool
) -> Any:
    from pipelines.evaluate.providers.registry import open_provider
    from pipelines.evaluate.stage import check_output
    from pipelines.evaluate.stage import evaluate as stage

    check_output(folder)
    opened: Any = open_provider(request.provider, options)
    if hasattr(eval_set, "encoder_weights"):
        opened.check_store(eval_set.encoder_weights)
    if eval_set.num_renamed:
        say(f"{eval_set.num_renamed} utterances of the split share an id or have none; they were given one each")

    def on_missing(missing: Any) -> None:
        if not missing:
            say(f"{folder} holds every answer already; scoring again")
        elif hasattr(opened, "quote"):
            _confirm(opened.quote([(one.utterance_id, one.duration_s or 0.0) for one in missing]), yes)

    with _ProgressBar(len(eval_set.utterances)) as bar:
        done = stage(
            opened,
            eval_set,
            folder,
            scoring=scoring,
            trained_on=request.trained_on,
            retry_failed=retry_failed,
            on_missing=on_missing,
            on_progress=bar,
        )
    return done.summary


def _confirm(quote: Any, yes: bool) -> None:
    """Show what it costs and ask; jobs that are paid for already need no answer."""
    from pipelines.errors import EvaluationError

    say(str(quote))
    if yes or not quote.clips:
        return
    if not sys.stdin.isatty():
        raise EvaluationError("this costs money and nobody is here to say yes; add --yes to pay")
    typer.confirm("Pay for this?", abort=True, err=True)


class _ProgressBar:
    """Utterances done, on stderr, when that is a terminal."""

    def __init__(self, total: int) -> None:
        self._total = total

    def __enter__(self) -> "_ProgressBar":
        from tqdm import tqdm

        self._bar = tqdm(total=self._total, unit="utt", file=sys.stderr, disable=None, desc="eval")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        self._bar.update(done - self._bar.n)


def _finish(summary: Any, written: str, folder: Path, fail_over: float | None, json: bool) -> None:
    from pipelines.evaluate.report.report import comparison_line, headline, set_name

    print(f"{summary.name} on {set_name(summary)}\n{headline(summary)}")
    if summary.comparison is not None:
        print(comparison_line(summary.comparison))
    say(written)
    counts = summary.headline.word_errors
    if json:
        interval = summary.headline.interval
        numbers = {**counts.to_dict(), "wer": summary.headline.wer, "cer": summary.headline.cer}
        numbers["interval"] = None if interval is None else [interval.low, interval.high]
        print(json_module.dumps({**numbers, "output": str(folder)}))
    wer = counts.wer
    if fail_over is not None and wer > fail_over:
        say(f"WER {100 * wer:.2f} % is above {100 * fail_over:.2f} %")
        raise typer.Exit(1)
    if counts.failed:
        say(f"{counts.failed} utterances have no answer; report.md says why (--retry-failed tries them again)")
        raise typer.Exit(1)
