"""The `tour` command, which is `make demo`: the whole line on the bundled corpus, ending in a table. Roof."""

import json as json_module
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyaudio.cli.options import say

TEST_SPLITS = {"test": "new sentences, known voices", "test_unseen": "new sentences, voices never heard"}
BEAMS = 4


def add_to(app: typer.Typer) -> None:
    """Register the command."""
    app.command("tour")(tour)


def tour(
    seed: Annotated[int, typer.Option("--seed", help="Seed of the projector and of the batch order.")] = 0,
    store: Annotated[Path, typer.Option("--store", help="Feature store.")] = Path("data/demo"),
    encoding: Annotated[
        str, typer.Option("--encoding", help="float16 or int8; int8 wants a --store of its own.")
    ] = "float16",
    run: Annotated[str | None, typer.Option("--run", help="Run folder or name; default demo, or demo-seed<N>.")] = None,
) -> None:
    """Extract, train, evaluate and transcribe, offline, on shipped small stand-ins; a few minutes on two CPU cores.

    The same steps with another recipe are what one types for the real models. A finished tour is not done again.
    """
    from pipelines.recipes import load_recipe
    from pipelines.train.runs import Run, run_folder

    recipe = load_recipe("demo", [f"train.seed={seed}", f"store.encoding={encoding}"])
    folder = run_folder(run or ("demo" if seed == 0 else f"demo-seed{seed}"), recipe.name).absolute()
    results = folder / "demo.json"
    if results.is_file():
        say(f"{folder} has made this tour already; remove it, or name another --run, to make it again")
        _print_table(json_module.loads(results.read_text()), folder)
        return
    started = time.monotonic()
    _extract(recipe, store)
    before = _evaluate_untrained(recipe, store, folder)
    trained = _train(recipe, store, Run(folder))
    scores = _evaluate(recipe, folder)
    summary = {
        "wer_before": before,
        **scores,
        **_measure(store),
        "steps": trained.steps,
        "seconds": round(time.monotonic() - started, 1),
    }
    results.write_text(json_module.dumps(summary, indent=2) + "\n")
    _print_table(summary, folder)
    _transcribe_one(recipe, store, folder)


def _measure(path: Path) -> dict[str, float]:
    """Add up what lies in the store, whoever put it there and when."""
    from cache import FeatureStore

    store = FeatureStore.open(path)
    duration_s = sum(store.commit(shard).duration_s for shard in store.committed_shards())
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return {"hours": duration_s / 3600, "store_bytes": size}


def _extract(recipe: Any, store: Path) -> None:
    from pipelines.corpora import open_corpus
    from pipelines.extract.stage import extract, wanted_splits

    say(f"\n1. stage one: tinyaudio extract --recipe demo --store {store}")
    splits, _ = wanted_splits(recipe, open_corpus(recipe.corpus))
    report = extract(recipe, store, splits=splits)
    say(str(report))


def _evaluate_untrained(recipe: Any, store: Path, folder: Path) -> float:
    import torch

    from cache import FeatureStore
    from pipelines.train.model import build_model

    say("\n2. word errors before training (a random projector)")
    untrained = folder.with_name(f"{folder.name}-untrained")
    model, processor = build_model(recipe, FeatureStore.open(store), torch.device("cpu"))
    model.save_pretrained(untrained)
    processor.save_pretrained(untrained)
    return _score(recipe, untrained, "test", 1).wer


def _train(recipe: Any, store: Path, run: Any) -> Any:
    from pipelines.train.stage import train

    say(f"\n3. stage two: tinyaudio train --recipe demo --store {store} --run {run.folder.name}")
    resume = bool(run.state) and not run.is_finished
    return train(recipe, store, run, resume=resume, say=say)


def _evaluate(recipe: Any, folder: Path) -> dict[str, float]:
    say("\n4. word errors after training, from raw audio: tinyaudio eval")
    scores = {}
    for split in TEST_SPLITS:
        for num_beams in (1, BEAMS):
            key = f"wer_{split}" + ("" if num_beams == 1 else f"_beam{num_beams}")
            scores[key] = _score(recipe, folder, split, num_beams).wer
    return scores


def _score(recipe: Any, model: Path, split: str, num_beams: int) -> Any:
    from pipelines.evaluate.eval_sets import open_eval_set
    from pipelines.evaluate.providers.base import ProviderOptions
    from pipelines.evaluate.providers.registry import open_provider
    from pipelines.evaluate.stage import evaluate, evaluation_name

    options = ProviderOptions(model=str(model), num_beams=num_beams, batch_size=32)
    eval_set = open_eval_set(recipe.corpus, split=split)
    folder = model / "eval" / evaluation_name("tinyaudio", eval_set, options)  # where `tinyaudio eval` looks
    done = evaluate(open_provider("tinyaudio", options), eval_set, folder)
    say(f"   {split}, {num_beams} beam{'s' * (num_beams > 1)}: {done.word_errors}")
    return done.word_errors


def _print_table(summary: dict[str, Any], folder: Path) -> None:
    rows = [("before training (greedy)", f"{100 * summary['wer_before']:.1f} %")]
    for split, meaning in TEST_SPLITS.items():
        greedy, beam = summary[f"wer_{split}"], summary[f"wer_{split}_beam{BEAMS}"]
        rows.append((meaning, f"{100 * greedy:.1f} % greedy, {100 * beam:.1f} % with {BEAMS} beams"))
    rows += [
        ("feature store", f"{summary['store_bytes'] / 1e6:.1f} MB for {summary['hours']:.2f} h of speech"),
        ("projector trained", f"{summary['steps']} steps"),
        ("all of it", f"{summary['seconds']:.0f} s"),
        ("model", os.path.relpath(folder)),
    ]
    print("\nword error rate on synthetic speech, stand-in models (nothing here speaks for the real ones)")
    for name, value in rows:
        print(f"  {name:<36}{value}")


def _transcribe_one(recipe: Any, store: Path, folder: Path) -> None:
    from pipelines.corpora import open_corpus
    from tinyaudio.transcribe import Transcriber

    corpus = open_corpus(recipe.corpus)
    first = corpus.scan("test_unseen").slice(0, 1).to_pylist()[0]
    ((_, audio),) = corpus.read_audio([first["source_id"]])
    clip = store.parent / "held-out.opus"
    clip.write_bytes(audio)
    (transcript,) = Transcriber.load(folder).transcribe([clip])
    print(f"\n$ tinyaudio transcribe {clip}\n{transcript.text}")
    print(f"  (a voice never heard in training; what was said: {first['transcript']!r})")
