"""`make real`: every stage on real pretrained parts and human speech, from two wheels to tables of word errors.

    <out>/parts/                    the converted parts, if `--parts` has wheels
    <out>/checks.json               word errors of Whisper itself, perplexity of the language model
    <out>/store/                    features of the training and dev splits
    <out>/schedule.json             seconds a step takes here, and how many steps fit into the time
    <out>/main/, plain/             the runs with and without a CTC loss
    <out>/model/                    the trained projector in float16, which is what is evaluated
    <out>/eval/                     evaluations on the test split
    <out>/results.md, learning-curve.png

What exists already is not made again: if the command is interrupted, run it again to resume.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cache.errors import CacheError
from pipelines.errors import PipelineError
from pipelines.evaluate.eval_sets import open_eval_set
from pipelines.evaluate.providers.base import ProviderOptions
from pipelines.evaluate.providers.registry import open_provider
from pipelines.evaluate.report.report import headline
from pipelines.evaluate.stage import Scoring, evaluate
from pipelines.evaluate.summary import Summary, load_summary
from pipelines.extract.stage import extract
from pipelines.files import write_text
from pipelines.real.checks import perplexity, read_transcripts
from pipelines.real.export import export
from pipelines.real.parts import PARTS, SMOLLM2, WHISPER, convert_part
from pipelines.real.report import LABELS, curve_of, draw, tabulate
from pipelines.recipes import Recipe, load_recipe
from pipelines.train.runs import Run
from pipelines.train.stage import train
from tinyaudio.model.errors import TinyAudioError

CHECKED = 100  # utterances of the checks
BEAMS, BEAM_SAMPLES = 4, 200  # beam search takes several times as long, so it is scored on a sample
NBEST = 10
TIMED_STEPS = 6  # the first is not counted
NORMALIZER = "whisper"  # Whisper writes numbers, capitals and punctuation; LibriSpeech has none

Say = Callable[[str], None]


def real(
    parts: Path,
    speech: Path | None,
    out: Path,
    *,
    hours: float | None = None,
    plain: bool = False,
    max_samples: int | None = None,
    overrides: Sequence[str] = (),
    say: Say = print,
) -> Path:
    """Convert, check, extract, train, evaluate and report; return the file with the tables.

    Args:
        parts: folder with the two wheels, or with the two converted folders.
        speech: folder of a corpus with the splits that real.toml names; None: convert the parts, return their folder.
        hours: time of each training on this machine; None: the recipe's number of steps.
        plain: also train without a CTC loss, for as long.
        max_samples: size of a random sample of the test split; None: all of it.

    Raises:
        RunError: wheels that are missing or others, or a training stopped by a signal. Others as the stages.
    """
    out.mkdir(parents=True, exist_ok=True)
    evaluations = out / "eval"

    say("1. Parts")
    if not all((parts / part.folder / "config.json").is_file() for part in PARTS):
        wheels, parts = parts, out / "parts"
        for part in PARTS:
            say(f"   {convert_part(part, wheels, parts)}")
    if speech is None:
        return parts
    recipe = load_recipe(
        str(Path(__file__).with_name("real.toml")),
        [
            f"corpus.path={speech.resolve()}",
            f"encoder.id={(parts / WHISPER).resolve()}",
            f"decoder.id={(parts / SMOLLM2).resolve()}",
            *overrides,
        ],
    )

    say("2. Checks of the parts alone")
    checks = out / "checks.json"
    if not checks.is_file():
        itself = score(recipe, "hf", parts / WHISPER, evaluations / "whisper-check", size=CHECKED)
        language = perplexity(parts / SMOLLM2, read_transcripts(recipe.corpus, recipe.corpus.test_split, CHECKED))
        told = {"whisper": headline(itself), "language_model": str(language), **language.to_dict()}
        write_text(checks, json.dumps(told, indent=2) + "\n")
    checked = json.loads(checks.read_text())
    say(f"   Whisper itself: {checked['whisper']}")
    say(f"   language model without audio: {checked['language_model']}")

    say("3. Stage one")
    splits = [name for name in (recipe.corpus.train_split, recipe.corpus.dev_split) if name is not None]
    say(f"   {extract(recipe, out / 'store', splits=splits)}")

    say("4. Stage two")
    if hours is not None or plain:
        steps = schedule(recipe, out, hours, say)
        recipe = with_train(recipe, steps=steps["steps"])
    runs = {"main": recipe}
    if plain:
        runs["plain"] = with_train(recipe, steps=steps["plain_steps"], ctc_steps=0, ctc_weight=0.0)
    for name, settings in runs.items():
        run = Run(out / name)
        if not run.is_finished:
            report = train(settings, out / "store", run, resume=bool(run.state), say=say)
            say(f"   {report}")
            report.require_finished()

    say("5. Evaluation")
    models = {}
    for name in runs:
        models[name] = out / ("model" if name == "main" else f"model-{name}")
        if not models[name].is_dir():
            export(out / name, models[name], encoder_id=str(parts / WHISPER), decoder_id=str(parts / SMOLLM2))
    whisper = evaluations / "whisper"
    found = {"Whisper tiny.en itself": score(recipe, "hf", parts / WHISPER, whisper, size=max_samples)}
    alone = evaluations / "ctc"
    if recipe.train.ctc_steps or recipe.train.ctc_weight:
        found["the projector's CTC head alone"] = score(recipe, "projector", models["main"], alone, size=max_samples)
    for name, model in models.items():
        other = alone if alone.is_dir() else None
        found[LABELS[name]] = score(
            recipe, "tinyaudio", model, evaluations / name, size=max_samples, num_beams=1, compare_with=other
        )
    found[f"{LABELS['main']}, {BEAMS} beams"] = score(
        recipe,
        "tinyaudio",
        models["main"],
        evaluations / f"main-beams{BEAMS}",
        size=min(BEAM_SAMPLES, max_samples or BEAM_SAMPLES),
        num_beams=BEAMS,
        compare_with=evaluations / "main",
    )
    if recipe.train.ctc_weight:
        found[f"{LABELS['main']}, choosing among the {NBEST} best texts of its CTC head"] = score(
            recipe,
            "tinyaudio",
            models["main"],
            evaluations / f"main-nbest{NBEST}",
            size=max_samples,
            ctc_nbest=NBEST,
            compare_with=alone,
        )
    for label, one in found.items():
        say(f"   {label}: {headline(one)}")

    curves = {name: curve_of(Run(out / name)) for name in runs}
    write_text(out / "results.md", tabulate(found, curves, checked))
    draw(curves, out / "learning-curve.png")
    say(f"written: {out / 'results.md'}, {out / 'learning-curve.png'}, {models['main']}")
    return out / "results.md"


def score(
    recipe: Recipe,
    provider: str,
    model: Path,
    folder: Path,
    *,
    size: int | None,
    num_beams: int | None = None,
    ctc_nbest: int | None = None,
    compare_with: Path | None = None,
) -> Summary:
    """Evaluate a system on `size` utterances of the test split (None: all), or read the finished evaluation."""
    if (folder / "summary.json").is_file():
        return load_summary(folder / "summary.json")
    eval_set = open_eval_set(recipe.corpus, split=recipe.corpus.test_split, max_samples=size)
    opened = open_provider(provider, ProviderOptions(model=str(model), num_beams=num_beams, ctc_nbest=ctc_nbest))
    scoring = Scoring(normalizer=NORMALIZER, compare_with=compare_with)
    return evaluate(opened, eval_set, folder, scoring=scoring)


def schedule(recipe: Recipe, out: Path, hours: float | None, say: Say) -> dict[str, Any]:
    """Measure how long steps take here, and count those that fit into the time; once, since runs must not change.

    Returns:
        `steps` through the decoder after the recipe's CTC steps; `plain_steps` of a run without CTC loss that takes as
        long; `ctc_step_s` and `step_s`, seconds.
    """
    path = out / "schedule.json"
    if not path.is_file():
        ctc_steps, ctc_step_s = recipe.train.ctc_steps, 0.0
        if ctc_steps:
            ctc_step_s = _seconds_per_step(recipe, out)
        step_s = _seconds_per_step(with_train(recipe, ctc_steps=0, steps=max(1, recipe.train.steps)), out)
        total_s = ctc_steps * ctc_step_s + recipe.train.steps * step_s if hours is None else 3600 * hours
        steps = recipe.train.steps if hours is None else max(1, math.floor((total_s - ctc_steps * ctc_step_s) / step_s))
        found = {
            "hours": round(total_s / 3600, 2),
            "steps": steps,
            "plain_steps": max(1, math.floor(total_s / step_s)),
            "ctc_step_s": ctc_step_s,
            "step_s": step_s,
        }
        write_text(path, json.dumps(found, indent=2) + "\n")
    known: dict[str, Any] = json.loads(path.read_text())
    ctc = f"{recipe.train.ctc_steps:,} CTC steps of {known['ctc_step_s']:.2f} s"
    say(f"   {known['hours']} h: {ctc}, then {known['steps']:,} steps of {known['step_s']:.2f} s")
    return known


def _seconds_per_step(recipe: Recipe, out: Path) -> float:
    """Time the first steps of a run in a folder of its own, without evaluations."""
    settings = with_train(recipe, log_every=1, eval_every=1_000_000, save_every=1_000_000, report_to=[])
    with tempfile.TemporaryDirectory(dir=out) as folder:
        run = Run(Path(folder, "timing"))
        report = train(settings, out / "store", run, say=lambda _: None, stop_after=TIMED_STEPS)
        if report.steps < TIMED_STEPS:
            report.require_finished()
        seconds = [entry["seconds"] for entry in run.metrics() if "seconds" in entry]
    return (seconds[-1] - seconds[0]) / max(1, len(seconds) - 1)


def with_train(recipe: Recipe, **changes: Any) -> Recipe:
    """Change settings of stage two."""
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run, and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.real.run", description="Run every stage on real parts and speech."
    )
    parser.add_argument("--parts", type=Path, required=True, help="folder of the two wheels, or of converted parts")
    parser.add_argument("--speech", type=Path, help="folder of the corpus; without it, only the parts are converted")
    parser.add_argument("--out", type=Path, default=Path("data/real"), help="folder of everything that is made")
    parser.add_argument("--hours", type=float, help="time of each training; default: the recipe's steps")
    parser.add_argument("--plain", action="store_true", help="also train without a CTC loss, for as long")
    parser.add_argument("--max-samples", type=int, help="size of a random sample of the test split; default: all")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override the recipe")
    given = parser.parse_args(arguments)
    try:
        real(
            given.parts,
            given.speech,
            given.out,
            hours=given.hours,
            plain=given.plain,
            max_samples=given.max_samples,
            overrides=given.set,
        )
    except (PipelineError, TinyAudioError, CacheError, OSError) as error:
        print(f"error: {error}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
