"""The `demo` command, which `make demo` runs: both stages on the bundled corpus, word error rates, a transcript."""

import json
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyaudio.cli.console import aligned, say

TEST_SPLITS = {"test": "new sentences, known voices", "test_unseen": "new sentences, unknown voices"}
BEAMS = 4


def demo(
    seed: Annotated[int, typer.Option("--seed", help="Seed of the projector's weights and of the batch order.")] = 0,
    store: Annotated[Path, typer.Option("--store", help="Feature store.")] = Path("data/demo"),
    encoding: Annotated[
        str, typer.Option("--encoding", help="float16, int8, int4 or int3; each needs a separate --store.")
    ] = "float16",
    run: Annotated[
        str | None, typer.Option("--run", help="Name under runs/, or a folder.  [default: demo, or demo-seed<N>]")
    ] = None,
) -> None:
    """Run extract, train, eval and transcribe offline, on tiny bundled models. Takes minutes on two CPU cores.

    The same commands with another --recipe train the real models. A finished demo run is not repeated.
    """
    import torch

    from cache import FeatureStore
    from pipelines.corpora import open_corpus
    from pipelines.extract.request import wanted_splits
    from pipelines.extract.stage import extract
    from pipelines.files import write_text
    from pipelines.recipes import load_recipe
    from pipelines.train.model import build_model
    from pipelines.train.runs import Run, run_folder
    from pipelines.train.stage import train
    from tinyaudio.transcribe import Transcriber

    recipe = load_recipe("demo", [f"train.seed={seed}", f"store.encoding={encoding}"])
    folder = run_folder(run or ("demo" if seed == 0 else f"demo-seed{seed}"), recipe.name).absolute()
    results = folder / "demo.json"
    if results.is_file():
        say(f"{folder} already contains a finished demo run; delete it or pass a different --run to repeat the demo")
        _print_results(json.loads(results.read_text()), folder)
        return
    started = time.monotonic()

    say(f"\n1. Stage one: tinyaudio extract --recipe demo --store {store}")
    corpus = open_corpus(recipe.corpus)
    splits, _ = wanted_splits(recipe, corpus)
    stored = extract(recipe, store, splits=splits)
    say(str(stored))

    say("\n2. Word errors before training, with a random projector")
    untrained = folder.with_name(f"{folder.name}-untrained")
    model, processor = build_model(recipe, FeatureStore.open(store), torch.device("cpu"))
    model.save_pretrained(untrained)
    processor.save_pretrained(untrained)
    scores = {"wer_before": score(recipe, untrained, "test", 1)}

    say(f"\n3. Stage two: tinyaudio train --recipe demo --store {store} --run {folder.name}")
    started_run = Run(folder)
    resume = bool(started_run.state) and not started_run.is_finished
    trained = train(recipe, store, started_run, resume=resume, say=say)
    trained.require_finished()

    say("\n4. Word errors after training, from raw audio: tinyaudio eval")
    for split in TEST_SPLITS:
        scores[f"wer_{split}"] = score(recipe, folder, split, 1)
        scores[f"wer_{split}_beam{BEAMS}"] = score(recipe, folder, split, BEAMS)
    summary = {
        **scores,
        "hours": stored.hours,
        "store_bytes": stored.store_bytes,
        "steps": trained.steps,
        "seconds": round(time.monotonic() - started, 1),
    }
    write_text(results, json.dumps(summary, indent=2) + "\n")
    _print_results(summary, folder)

    first = corpus.scan("test_unseen").slice(0, 1).to_pylist()[0]
    ((_, audio),) = corpus.read_audio([first["source_id"]])
    clip = store.parent / "held-out.opus"
    clip.write_bytes(audio)
    (transcript,) = Transcriber.load(folder).transcribe([clip])
    print(f"\n$ tinyaudio transcribe {clip}\n{transcript.text}")
    print(f"  (an unknown voice; reference: {first['transcript']!r})")


def score(recipe: Any, model: Path, split: str, num_beams: int) -> float:
    """Evaluate a model in the folder in which `tinyaudio eval` looks for the same evaluation, and return its WER."""
    from pipelines.evaluate.eval_sets import open_eval_set
    from pipelines.evaluate.providers.base import ProviderOptions
    from pipelines.evaluate.providers.registry import open_provider
    from pipelines.evaluate.stage import evaluate, evaluation_name

    options = ProviderOptions(model=str(model), num_beams=num_beams, batch_size=32)
    eval_set = open_eval_set(recipe.corpus, split=split)
    folder = model / "eval" / evaluation_name("tinyaudio", eval_set, options)
    word_errors = evaluate(open_provider("tinyaudio", options), eval_set, folder).word_errors
    say(f"   {split}, {num_beams} beam{'s' * (num_beams > 1)}: {word_errors}")
    return word_errors.wer


def _print_results(summary: dict[str, Any], folder: Path) -> None:
    rows = [("before training", f"{100 * summary['wer_before']:.1f} % greedy")]
    for split, meaning in TEST_SPLITS.items():
        greedy, beam = summary[f"wer_{split}"], summary[f"wer_{split}_beam{BEAMS}"]
        rows.append((meaning, f"{100 * greedy:.1f} % greedy, {100 * beam:.1f} % with {BEAMS} beams"))
    rows += [
        ("feature store", f"{summary['store_bytes'] / 1e6:.1f} MB for {summary['hours']:.2f} h of speech"),
        ("training", f"{summary['steps']} steps"),
        ("total time", f"{summary['seconds']:.0f} s"),
        ("model", os.path.relpath(folder)),
    ]
    print("\nWord error rate on synthetic speech with tiny test models; says nothing about the real models")
    print(aligned(rows, indent="  "))
