"""The commands `eval` and `publish`. Part of the roof."""

import json as json_module
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

ModelArgument = Annotated[
    str | None,
    typer.Argument(help="Run or checkpoint folder, hub id, or a paid provider's model; default $TINYAUDIO_MODEL, "
                        "else runs/latest."),
]  # fmt: skip


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    app.command("eval")(evaluate)
    app.command("publish")(publish)


def say(line: str) -> None:
    """Print a message for people."""
    print(line, file=sys.stderr, flush=True)


def evaluate(
    model: ModelArgument = None,
    recipe: Annotated[str | None, typer.Option(help="Recipe name or file; default the run's own, else demo.")] = None,
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
        float | None, typer.Option(min=0, help="Exit 1 if the WER is above this fraction (0.05 is 5 %).")
    ] = None,
    set_: Annotated[list[str], typer.Option("--set", help="Override one setting: section.key=value.")] = [],  # noqa: B006
    json: Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")] = False,
) -> None:
    """Score a system on a split: word errors with intervals, breakdowns and a report. Killed, it goes on.

    Exits 1 if any utterance has no answer.
    """
    from pipelines.evaluate import Scoring, score_again

    scoring = Scoring(normalizer=normalizer, merge_compounds=merge_compounds, compare_with=compare)
    if rescore is not None:
        folder = output or (rescore if rescore.is_dir() else rescore.with_suffix(""))
        _finish(score_again(rescore, folder, scoring), folder, fail_over, json)
        return
    request = _Request(model, provider, recipe, corpus, set_)
    eval_set = request.eval_set(split, max_samples, seed, source, from_store)
    folder = output or request.default_output(eval_set.name, num_beams, guard, from_store is not None)
    if compare is not None and not _is_evaluation(compare):
        scoring = Scoring(**{**vars(scoring), "compare_with": compare / "eval" / folder.name})
    from pipelines.providers import ProviderOptions

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
        output=folder,
    )
    summary = _run(request, options, eval_set, folder, scoring, retry_failed, yes)
    _finish(summary, folder, fail_over, json)


class _Request:
    """What is to be evaluated, with the defaults filled in."""

    def __init__(
        self, model: str | None, provider: str, recipe: str | None, corpus: str | None, settings: list[str]
    ) -> None:
        from pipelines.recipes import load_recipe

        self.provider = provider
        self.model = _default_model() if model is None and provider in ("tinyaudio", "ctc") else model
        self.own = self._own_recipe()
        self.section = load_recipe(recipe or self.own or "demo", settings).corpus
        if corpus is not None:
            self.section = _corpus_section(corpus, self.section)

    def _own_recipe(self) -> str | None:
        folder = Path(self.model or "")
        beside = [folder / "recipe.toml", folder.parent / "recipe.toml", folder.parent.parent / "recipe.toml"]
        return next((str(path) for path in beside if self.model and path.is_file()), None)

    @property
    def trained_on(self) -> str | None:
        from pipelines.recipes import load_recipe

        if self.own is None or self.provider != "tinyaudio":
            return None
        corpus = load_recipe(self.own).corpus
        return corpus.name or Path(str(corpus.path)).name

    def eval_set(
        self, split: str | None, max_samples: int | None, seed: int, source: str | None, store: Path | None
    ) -> Any:
        from pipelines.errors import EvaluationError
        from pipelines.eval_sets import open_eval_set
        from pipelines.eval_sets_stored import open_stored_set

        chosen: dict[str, Any] = {"split": split or self.section.test_split, "max_samples": max_samples, "seed": seed}
        if store is None:
            return open_eval_set(self.section, **chosen, source=source)
        if self.provider != "tinyaudio":
            raise EvaluationError(f"provider {self.provider!r} cannot use stored features; leave --from-store out")
        return open_stored_set(store, self.section, **chosen, source=source)

    def default_output(self, set_name: str, num_beams: int | None, guard: bool, is_stored: bool) -> Path:
        ours = self.provider == "tinyaudio"
        parts = [set_name, None if ours else self.provider, num_beams and f"beams{num_beams}"]
        parts += ["stored" if is_stored else None, "unguarded" if ours and not guard and not is_stored else None]
        name = "-".join(str(part) for part in parts if part)
        if self.model is not None and Path(self.model).is_dir():
            return Path(self.model) / "eval" / name
        return Path("evaluations") / (self.model or "default").replace("/", "--") / name


def _default_model() -> str:
    from tinyaudio.transcribe import default_model

    return default_model()


def _corpus_section(corpus: str, base: Any) -> Any:
    from pipelines.errors import EvaluationError
    from pipelines.eval_sets import named_sections

    if Path(corpus).is_dir():
        return base.model_copy(update={"path": corpus, "name": None, "config": None})
    named = named_sections()
    if corpus in named:
        return named[corpus]
    if corpus.count("/") == 1 and not corpus.startswith((".", "/", "~")):
        return base.model_copy(update={"path": None, "name": corpus, "config": None})
    raise EvaluationError(f"no corpus {corpus!r}; expected a folder, a hub data set, or one of {', '.join(named)}")


def _is_evaluation(path: Path) -> bool:
    return path.is_file() or (path / "predictions.jsonl").is_file()


def _run(
    request: _Request, options: Any, eval_set: Any, folder: Path, scoring: Any, retry_failed: bool, yes: bool
) -> Any:
    from pipelines.evaluate import evaluate as stage
    from pipelines.evaluate import unanswered
    from pipelines.providers import open_provider

    opened: Any = open_provider(request.provider, options)
    if hasattr(eval_set, "encoder_weights"):
        opened.check_store(eval_set.encoder_weights)
    missing = unanswered(eval_set, folder, retry_failed)
    if hasattr(opened, "quote") and missing:
        _confirm(str(opened.quote([(one.utterance_id, one.duration_s or 0.0) for one in missing])), yes)
    if not missing:
        say(f"{folder} holds every answer already; scoring again")
    with _ProgressBar(len(eval_set.utterances)) as bar:
        done = stage(
            opened,
            eval_set,
            folder,
            scoring=scoring,
            trained_on=request.trained_on,
            retry_failed=retry_failed,
            on_progress=bar,
        )
    return done.summary


def _confirm(quote: str, yes: bool) -> None:
    from pipelines.errors import EvaluationError

    say(quote)
    if yes:
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


def _finish(summary: Any, folder: Path, fail_over: float | None, json: bool) -> None:
    from pipelines.report import comparison_line, headline, set_name

    print(f"{summary.name} on {set_name(summary)}\n{headline(summary)}")
    if summary.comparison is not None:
        print(comparison_line(summary.comparison))
    say(f"predictions, summary.json, report.md and report.html: {folder}")
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


def publish(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    repo: Annotated[str, typer.Option(help="Repository on the hub: owner/name.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Make the folder and the card, and stop.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    encoder_id: Annotated[str | None, typer.Option(help="Where others find the encoder, if yours is a folder.")] = None,
    decoder_id: Annotated[str | None, typer.Option(help="Where others find the decoder, if yours is a folder.")] = None,
    power_watts: Annotated[
        float | None, typer.Option(min=0, help="Power of the machine while training, W, for the card's energy.")
    ] = None,
    grams_per_kwh: Annotated[float | None, typer.Option(min=0, help="CO2 of its electricity, g for a kWh.")] = None,
    token: Annotated[str | None, typer.Option(help="Token of the hub; default HF_TOKEN or the stored one.")] = None,
    json: Annotated[bool, typer.Option("--json", help="End with one JSON object on stdout.")] = False,
) -> None:
    """Publish a run: model, card with measured numbers, evaluations, samples and checksums."""
    from pipelines.publish import Parts
    from pipelines.publish import publish as stage

    done = stage(
        run,
        repo,
        dry_run=dry_run,
        private=private,
        parts=Parts(encoder_id=encoder_id, decoder_id=decoder_id),
        power_watts=power_watts,
        grams_per_kwh=grams_per_kwh,
        token=token,
    )
    print(f"{len(done.files)} files in {done.folder}")
    print(done.url or "nothing was uploaded (--dry-run); read README.md there")
    if json:
        print(json_module.dumps({"folder": str(done.folder), "files": list(done.files), "url": done.url}))
