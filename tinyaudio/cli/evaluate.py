"""The `eval` command."""

import contextlib
import json as json_module
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyaudio.cli.console import ProgressBar, say, usage
from tinyaudio.cli.options import DeviceOption, DraftOption, JsonOption, NBestOption, SetOption, check_decoding

PAID = ("assemblyai",)  # providers whose models are not folders; a run then only says what to score and where to write


def parse_rate(text: str) -> float:
    """Parse "5%" or "0.05" as a fraction; a number above 1 without the sign is refused, since it may mean percent."""
    number = text.strip().removesuffix("%")
    is_percent = number != text.strip()
    try:
        value = float(number) / (100 if is_percent else 1)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a rate; expected 5% or 0.05") from None
    if value < 0 or (value > 1 and not is_percent):
        raise typer.BadParameter(f"{text!r} is {100 * value:g} %; expected a fraction such as 0.05, or {number}%")
    return value


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Run or checkpoint folder, or hub id; default $TINYAUDIO_MODEL, else runs/latest. For a paid "
            "provider: the provider's model name, or a run to store the results next to."
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe that names the corpus: its name or file.  [default: the model's own]")
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="Folder, hub data set, or a name of eval_sets.toml.  [default: the recipe's]")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split to score.  [default: the recipe's test split]")] = None,
    max_samples: Annotated[int | None, typer.Option(min=1, help="Score a random sample of this many.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed for --max-samples.")] = 0,
    source: Annotated[str | None, typer.Option(help="Score only utterances of this source.")] = None,
    provider: Annotated[
        str, typer.Option(help="System to score: tinyaudio, ctc, projector, hf or assemblyai.")
    ] = "tinyaudio",
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag of a hub model.")] = None,
    num_beams: Annotated[int | None, typer.Option(min=1, help="Beams.  [default: the model's own]")] = None,
    draft: DraftOption = "auto",
    ctc_nbest: NBestOption = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of tokens per piece of audio.  [default: the model's own]")
    ] = None,
    length_penalty: Annotated[
        float | None, typer.Option(help="Length penalty of beam search.  [default: the model's own]")
    ] = None,
    guard: Annotated[bool, typer.Option(help="Decode as transcribe does, or run the model alone.")] = True,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Utterances decoded together.  [default: 32 on a GPU, else 16]")
    ] = None,
    device: DeviceOption = "auto",
    api_key: Annotated[
        str | None, typer.Option(help="Key of a paid provider.  [default: its environment variable]")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Jobs of a paid provider in flight.")] = 5,
    yes: Annotated[bool, typer.Option("--yes", help="Pay without asking for confirmation.")] = False,
    output: Annotated[Path | None, typer.Option(help="Output folder.  [default: RUN/eval/CORPUS-SPLIT]")] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try utterances again that failed in an earlier call.")
    ] = False,
    normalizer: Annotated[
        str, typer.Option(help="Text normaliser of the headline: recipe, whisper or none.")
    ] = "recipe",
    rescore: Annotated[
        Path | None, typer.Option(help="Score this evaluation folder or predictions file again, without a model.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="Compare with another evaluation (its folder or predictions) or another run.")
    ] = None,
    fail_over: Annotated[
        float | None,
        typer.Option(parser=parse_rate, metavar="RATE", help="Exit with 1 if the WER is above this: 5% or 0.05."),
    ] = None,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Score a system on a split: word error rate with interval, breakdowns and a report.

    If it is interrupted, run the same command again to resume. Exits with 1 if any utterance has no answer.
    """
    from pipelines.errors import EvaluationError
    from pipelines.evaluate.eval_sets import corpus_name, open_eval_set
    from pipelines.evaluate.providers.base import ProviderOptions
    from pipelines.evaluate.providers.registry import PROVIDERS, open_provider
    from pipelines.evaluate.stage import Scoring, evaluation_name, score_again
    from pipelines.evaluate.stage import evaluate as run_stage
    from pipelines.recipes import load_recipe
    from tinyaudio.transcribe import default_model

    check_decoding(draft, num_beams, ctc_nbest, length_penalty)

    if rescore is not None:
        given = {"MODEL": model, "--corpus": corpus, "--recipe": recipe, "--split": split, "--source": source}
        ignored = [name for name, value in {**given, "--max-samples": max_samples}.items() if value is not None]
        if ignored:
            raise typer.BadParameter(f"--rescore scores existing predictions; omit {', '.join(ignored)}")
        if rescore.name == "predictions.jsonl":
            rescore = rescore.parent
        folder = output or (rescore if rescore.is_dir() else rescore.with_suffix(""))
        summary = score_again(rescore, folder, Scoring(normalizer=normalizer, compare_with=compare))
        _finish(summary, "summary.json, report.md and report.html", folder, fail_over, json)
        return

    # The model, and the recipe that it was trained with.
    if provider not in PROVIDERS:
        usage(f"--provider {provider!r}: expected one of {', '.join(PROVIDERS)}")
    if model is None and provider in ("tinyaudio", "ctc", "projector"):
        model = default_model()
    is_folder = model is not None and Path(model).is_dir()
    own = None
    if model is not None and is_folder:  # a run, or one of its checkpoints
        folders = (Path(model), Path(model).parent, Path(model).parent.parent)
        own = next((str(each / "recipe.toml") for each in folders if (each / "recipe.toml").is_file()), None)
    elif model is not None and provider == "tinyaudio":
        own = _recipe_on_hub(model, revision)

    # The utterances to score.
    if corpus is None and recipe is None and own is None:
        where = "" if model is None or is_folder else "it is not a folder, and the hub has none. Check the name, or "
        raise EvaluationError(f"{model or provider!r} has no recipe.toml; {where}name a --corpus or a --recipe")
    section = choose_corpus(recipe or own or "demo", corpus, set_ or [])
    eval_set = open_eval_set(
        section, split=split or section.test_split, max_samples=max_samples, seed=seed, source=source
    )
    if eval_set.num_renamed:
        say(f"{eval_set.num_renamed} utterances of the split have no id or a repeated one; each was given a new one")

    # The folder, named by what is asked for.
    options = ProviderOptions(
        model=None if provider in PAID and is_folder else model,
        revision=revision,
        device=device,
        batch_size=batch_size,
        num_beams=num_beams,
        draft=draft,
        ctc_nbest=ctc_nbest,
        max_new_tokens=max_new_tokens,
        length_penalty=length_penalty,
        guard=guard,
        api_key=api_key,
        concurrency=concurrency,
    )
    beside = Path(str(model)) / "eval"
    if not is_folder:
        beside = Path("evaluations") / (model or provider).strip("/").replace("/", "--")
    folder = output or beside / evaluation_name(provider, eval_set, options)
    if compare is not None and not (compare.is_file() or (compare / "predictions.jsonl").is_file()):
        compare = compare / "eval" / evaluation_name("tinyaudio", eval_set, options)
    folder.mkdir(parents=True, exist_ok=True)  # an unusable folder is reported before a model is loaded for it

    # Decode, score, report.
    try:
        opened: Any = open_provider(provider, replace(options, output=folder))
    except BaseException:
        with contextlib.suppress(OSError):  # with an earlier evaluation in it, it is not empty and stays
            folder.rmdir()
        raise

    def on_missing(missing: Any) -> None:
        if not missing:
            say(f"{folder} already contains every answer; scoring again")
        elif hasattr(opened, "quote"):
            _confirm(opened.quote([(one.utterance_id, one.duration_s or 0.0) for one in missing]), yes)

    with ProgressBar("eval", len(eval_set.utterances), "utt") as bar:
        summary = run_stage(
            opened,
            eval_set,
            folder,
            scoring=Scoring(normalizer=normalizer, compare_with=compare),
            trained_on=corpus_name(load_recipe(own).corpus) if own is not None and provider == "tinyaudio" else None,
            retry_failed=retry_failed,
            on_missing=on_missing,
            on_progress=lambda done, total: bar.update(done),
        )
    _finish(summary, "predictions, summary.json, report.md and report.html", folder, fail_over, json)


def _recipe_on_hub(model: str, revision: str | None) -> str | None:
    """Fetch the recipe that `publish` puts beside a model; None for a model without one."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        return hf_hub_download(model, "recipe.toml", revision=revision)
    except (EntryNotFoundError, LocalEntryNotFoundError, HFValidationError, OSError):
        return None  # a model that does not exist is reported when it is loaded


def choose_corpus(recipe: str, corpus: str | None, settings: list[str]) -> Any:
    """Return the corpus section to score.

    Args:
        corpus: a folder, a name of eval_sets.toml, or a hub data set; None takes the recipe's own.
        settings: overrides, "corpus.key=value".

    Raises:
        RecipeError: no such recipe, or a setting that it does not have.
        EvaluationError: no such corpus.
    """
    from pipelines.errors import EvaluationError
    from pipelines.evaluate.eval_sets import named_sections
    from pipelines.recipes import load_recipe
    from tinyaudio.model.frozen import is_hub_id

    base = load_recipe(recipe).corpus
    named = named_sections()
    if corpus is None:
        return load_recipe(recipe, settings).corpus
    table: dict[str, Any] = base.model_dump(exclude_none=True)
    if Path(corpus).is_dir():
        table = {key: value for key, value in table.items() if key not in ("name", "config", "revision")}
        table["path"] = corpus
    elif corpus in named:
        table = named[corpus].model_dump(exclude_none=True)
    elif is_hub_id(corpus) and corpus != base.name:
        # columns, splits and revision belong to another set; the text policy is the one the model was trained with
        table = {"name": corpus, **{key: value for key, value in table.items() if key.startswith("text_")}}
    elif corpus != base.name:
        raise EvaluationError(f"no corpus {corpus!r}; expected a folder, a hub data set, or one of {', '.join(named)}")
    return load_recipe(recipe, settings, corpus=table).corpus


def _confirm(quote: Any, yes: bool) -> None:
    """Print the price and ask; fetching jobs that are already paid for needs no confirmation."""
    from pipelines.errors import EvaluationError

    say(str(quote))
    if yes or not quote.clips:
        return
    if not sys.stdin.isatty():
        raise EvaluationError("refusing to submit paid jobs without confirmation; pass --yes to run non-interactively")
    typer.confirm("Pay for this?", abort=True, err=True)


def _finish(summary: Any, written: str, folder: Path, fail_over: float | None, json: bool) -> None:
    """Print the results and exit with 1 if they are above the limit or incomplete."""
    from pipelines.evaluate.report.report import comparison_line, headline, set_name

    print(f"{summary.name} on {set_name(summary)}\n{headline(summary)}")
    if summary.comparison is not None:
        print(comparison_line(summary.comparison))
    for note in summary.notes:
        say(note)
    say(f"{written}: {folder}")
    counts, interval = summary.word_errors, summary.headline.interval
    if json:
        numbers = {**counts.to_dict(), "wer": summary.headline.wer, "cer": summary.headline.cer}
        numbers["drafts"] = None if summary.timing.drafts is None else asdict(summary.timing.drafts)
        numbers["interval"] = None if interval is None else [interval.low, interval.high]
        print(json_module.dumps({**numbers, "output": str(folder)}))
    if fail_over is not None and counts.wer > fail_over:
        say(f"WER {100 * counts.wer:.2f} % is above {100 * fail_over:.2f} %")
        raise typer.Exit(1)
    if counts.failed:
        say(
            f"{counts.failed} utterances have no answer; see report.md for the reasons, --retry-failed tries them again"
        )
        raise typer.Exit(1)
