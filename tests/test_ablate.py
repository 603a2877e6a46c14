"""Ablations on tiny random parts: every cell once, through kills, with a table, a plot and no encoder."""

import csv
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from extractions import stage_one
from trainings import tiny_recipe

from pipelines.ablate import sweep as ablate_module
from pipelines.ablate.grid import load_grid
from pipelines.ablate.report import Outcome, agreement, read_wers
from pipelines.ablate.sweep import ablate, gpus_for
from pipelines.errors import RecipeError, RunError
from pipelines.recipes import load_recipe
from pipelines.train.meter import counting_encoder_passes
from pipelines.train.run_table import compare_runs, list_runs
from pipelines.train.runs import Run
from pipelines.train.stage import TrainReport
from tinyaudio.model.modeling_tinyaudio import TinyAudioForConditionalGeneration


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory, encoder_folder, decoder_folder):
    path = tiny_recipe(tmp_path_factory.mktemp("tiny"), encoder_folder, decoder_folder)
    for encoding in ("float16", "int8"):
        stage_one(path, path.with_name(encoding), f"store.encoding={encoding}")
    return path


@pytest.fixture(scope="module")
def store(recipe_file):
    return recipe_file.with_name("float16")


def write_grid(path: Path, recipe_file: Path, axes: str, more: str = "") -> str:
    path.write_text(f'recipe = "{recipe_file}"\n[settings]\n"train.steps" = 4\n[axes]\n{axes}\n{more}\n')
    return str(path)


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir() if path.is_dir())


def test_grid_killed_in_the_middle_goes_on_and_ends_with_table_and_plot(recipe_file, store, tmp_path):
    axes = '"projector.kind" = ["mlp", "linear"]\n"train.seed" = [0, 1]'
    stores = f'[stores]\nint8 = "{recipe_file.with_name("int8")}"\n'
    also = '[[also]]\n"projector.hidden_size" = 8\n[[also]]\n"store.encoding" = "int8"\n'
    grid = write_grid(tmp_path / "grid.toml", recipe_file, axes, stores + also)
    output, command = tmp_path / "out", [sys.executable, "-m", "tinyaudio", "ablate", grid, "--store", store]
    process = subprocess.Popen([*command, "--output", output], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not any(Run(p).is_finished for p in output.glob("*-0")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    finished = {p.name: (p / "run.json").stat().st_mtime_ns for p in output.iterdir() if Run(p).is_finished}
    assert 0 < len(finished) < 8
    lines: list[str] = []
    with counting_encoder_passes() as count:
        done = ablate(load_grid(grid), store, output, device="cpu", say=lines.append)
    assert count.passes == 0
    assert done.num_skipped == len(finished)
    assert f"{len(finished)} of them finished before" in lines[0]
    assert all((output / name / "run.json").stat().st_mtime_ns == when for name, when in finished.items())
    assert len(names(output)) == 8
    table = (output / "table.md").read_text()
    assert "Encoder passes during all of it: 0 (counted)" in table
    assert table.count("\n| ") == 5  # a header and four groups of two seeds
    rows = list(csv.DictReader((output / "table.csv").open()))
    assert len(rows) == 8
    assert {row["encoder_passes"] for row in rows} == {"0"}
    assert (output / "plot.png").read_bytes().startswith(b"\x89PNG")
    again = ablate(load_grid(grid), store, output, device="cpu", say=lines.append)
    assert again.num_skipped == 8


def test_parallel_jobs_train_the_same_grid(recipe_file, store, tmp_path):
    grid = write_grid(tmp_path / "grid.toml", recipe_file, '"projector.hidden_size" = [8, 16]')
    done = ablate(load_grid(grid), store, tmp_path / "out", jobs=2, device="cpu", say=lambda _: None)
    assert [one.report.is_finished for one in done.outcomes] == [True, True]
    assert [one.report.encoder_passes for one in done.outcomes] == [0, 0]
    table = list_runs(tmp_path / "out")
    assert {row[0] for row in table.rows} == {"hidden_size-8", "hidden_size-16"}
    compared = str(compare_runs(["hidden_size-8", "hidden_size-16"], tmp_path / "out"))
    assert "projector.hidden_size" in compared
    assert "train.seed" not in compared, "only settings that differ are shown"
    assert (tmp_path / "out" / "hidden_size-8" / "log.txt").read_text().count("dev WER") == 1
    changed = load_grid(grid, ["train.learning_rate=0.5"])
    with pytest.raises(RunError, match=r"train.learning_rate was 0.001 and is 0.5"):
        ablate(changed, store, tmp_path / "out", device="cpu", say=lambda _: None)


def test_a_run_that_fails_is_named_stops_no_other_and_is_tried_again(recipe_file, store, tmp_path, monkeypatch):
    grid = load_grid(write_grid(tmp_path / "grid.toml", recipe_file, '"train.seed" = [0, 1, 2]'))
    train, lines = ablate_module.train, []

    def diverge(recipe, *arguments, **options):
        if recipe.train.seed == 1:
            raise RunError("loss is nan at step 3")
        return train(recipe, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ablate_module, "train", diverge)
        done = ablate(grid, store, tmp_path / "out", device="cpu", say=lines.append)
    assert [one.name for one in done.outcomes] == ["seed-0", "seed-2"]
    assert any("seed-1 failed: loss is nan at step 3" in line for line in lines)
    assert "Failed: seed-1: loss is nan at step 3" in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(RunError, match=r"1 of 3 runs failed: seed-1. Run the same command again to retry them"):
        done.check()
    again = ablate(grid, store, tmp_path / "out", device="cpu", say=lines.append)
    again.check()
    assert (len(again.outcomes), again.num_skipped) == (3, 2)


def test_models_of_earlier_cells_are_let_go(recipe_file, store, tmp_path):
    grid = load_grid(write_grid(tmp_path / "grid.toml", recipe_file, '"train.seed" = [0, 1]'))
    alive: list[int] = []

    def count(line: str) -> None:
        if line[:1].isdigit():
            alive.append(sum(type(one) is TinyAudioForConditionalGeneration for one in gc.get_objects()))

    before = sum(type(one) is TinyAudioForConditionalGeneration for one in gc.get_objects())
    gc.disable()  # cycles must not wait for luck
    try:
        ablate(grid, store, tmp_path / "out", device="cpu", say=count)
    finally:
        gc.enable()
    assert max(alive) <= before


def test_grid_without_a_dev_split_is_compared_by_its_loss(recipe_file, store, tmp_path):
    path = tmp_path / "grid.toml"
    write_grid(path, recipe_file, '"projector.kind" = ["mlp", "linear"]')
    done = ablate(load_grid(str(path), ["corpus.dev_split=absent"]), store, tmp_path / "out", device="cpu", say=print)
    losses = [float(row[3]) for row in done.table.rows]
    assert losses == sorted(losses)
    assert [row[4] for row in done.table.rows] == ["-", "-"]
    assert (tmp_path / "out" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_jobs_take_the_visible_gpus_in_turn(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert gpus_for(3, "auto") == ["3", "5", "3"]
    assert gpus_for(2, "cpu") == [None, None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert gpus_for(2, "auto") == [None, None]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert gpus_for(3, "cuda") == ["0", "1", "0"]


def test_worker_sees_the_gpu_it_was_given():
    program = """
import os, queue
from pipelines.ablate.sweep import _begin_worker
gpus = queue.SimpleQueue()
gpus.put("5")
_begin_worker(1, gpus)
print(os.environ["CUDA_VISIBLE_DEVICES"])
"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "3,5"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "5"


def test_listing_finds_runs_inside_folders_with_their_overrides(recipe_file, tmp_path):
    for name, overrides in (
        ("plain", []),
        ("ablate-x/seed-1", ["train.seed=1"]),
        ("ablate-x/kind-linear", ["projector.kind=linear"]),
        ("again", []),
    ):
        Run(tmp_path / name).begin(load_recipe(str(recipe_file), overrides), {"overrides": overrides})
    text = (tmp_path / "again" / "recipe.toml").read_text()
    (tmp_path / "again" / "recipe.toml").write_text(text.replace("[projector]\n", "[projector]\nwhiten = true\n"))
    (tmp_path / "latest").symlink_to("plain")
    table = list_runs(tmp_path)
    assert table.columns[:3] == ("run", "began", "differs in")
    assert {row[0]: row[2] for row in table.rows} == {
        "plain": "-",
        "again": "-",
        "ablate-x/seed-1": "train.seed=1",
        "ablate-x/kind-linear": "projector.kind=linear",
    }
    steps = {row[0]: row[4] for row in table.rows}
    assert (steps["plain"], steps["again"]) == ("0/6", "0/?"), "an unreadable recipe does not hide the other runs"


def test_grid_is_checked_before_anything_runs(recipe_file, store, tmp_path):
    (tmp_path / "typo.toml").write_text('recipe = "demo"\n[axis]\n"train.seed" = [0]\n')
    with pytest.raises(RecipeError, match=r"unknown key 'axis'; did you mean 'axes'"):
        load_grid(str(tmp_path / "typo.toml"))
    with pytest.raises(RecipeError, match=r"unknown key 'projector.kin'; did you mean 'kind'"):
        load_grid(write_grid(tmp_path / "key.toml", recipe_file, '"projector.kin" = ["mlp"]'))
    with pytest.raises(RecipeError, match="did you mean 'mlp'"):
        load_grid(write_grid(tmp_path / "kind.toml", recipe_file, '"projector.kind" = ["linear", "mlpp"]'))
    with pytest.raises(
        RecipeError, match=r"no grid 'dem'; did you mean 'demo'. expected a TOML file or one of ctc, ctc-c"
    ):
        load_grid("dem")
    grid = load_grid(write_grid(tmp_path / "int8.toml", recipe_file, '"store.encoding" = ["float16", "int8"]'))
    with pytest.raises(
        RunError, match=r"encoding float16; expected int8. Try `tinyaudio extract --recipe .* --set store.enc"
    ):
        ablate(grid, store, tmp_path / "out", device="cpu", say=lambda _: None)
    assert not (tmp_path / "out").exists()


def test_counter_sees_an_encoder_that_runs(model, noise, processor):
    with counting_encoder_passes() as count:
        model.encode(**processor([noise(0.5)]))
    assert count.passes == 1


def test_settings_with_the_same_last_name_give_cells_of_different_names(recipe_file, tmp_path):
    axes = '"encoder.compile" = [true, false]\n"train.compile" = [true, false]\n"train.seed" = [0]'
    cells = load_grid(write_grid(tmp_path / "grid.toml", recipe_file, axes)).cells
    assert [cell.name for cell in cells] == [
        "encoder.compile-True_train.compile-True_seed-0",
        "encoder.compile-True_train.compile-False_seed-0",
        "encoder.compile-False_train.compile-True_seed-0",
        "encoder.compile-False_train.compile-False_seed-0",
    ]


def test_shipped_grid_has_four_projectors_and_two_seeds():
    cells = load_grid("demo").cells
    assert len({cell.recipe.projector.kind for cell in cells}) >= 4
    assert len({cell.recipe.train.seed for cell in cells}) == 2
    assert len(cells) >= 8


def test_grid_of_encodings_has_a_store_for_each_and_names_the_commands_that_make_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    grid = load_grid("encodings")
    assert {(cell.recipe.store.encoding, cell.recipe.train.seed) for cell in grid.cells} == {
        (encoding, seed) for encoding in ("float16", "int8", "int4", "int3") for seed in range(3)
    }
    commands = (
        "`tinyaudio extract --recipe demo --set store.encoding=float16 --store data/demo && "
        "tinyaudio extract --recipe demo --set store.encoding=int8 --store data/demo-int8"
    )
    missing = "data/demo, data/demo-int8, data/demo-int4, data/demo-int3"
    with pytest.raises(RunError, match=rf"no feature store at {missing}. Try ") as caught:
        ablate(grid, None, tmp_path / "out", device="cpu", say=lambda _: None)
    assert commands in str(caught.value)
    with pytest.raises(RunError, match=r"--store 'elsewhere' would not be used: the grid names all its stores"):
        ablate(grid, Path("elsewhere"), tmp_path / "out", device="cpu", say=lambda _: None)


def test_no_runs_is_one_line(tmp_path):
    with pytest.raises(RunError, match=r"no runs under .*`tinyaudio train` makes one"):
        list_runs(tmp_path / "nowhere")


def test_projectors_ranked_by_the_ctc_phase_alone_are_compared_with_a_full_ablation(
    tinyaudio, recipe_file, store, tmp_path
):
    """No step goes through the decoder; the table has the word errors by CTC alone, and the rank correlation."""
    grid = write_grid(tmp_path / "grid.toml", recipe_file, '"projector.hidden_size" = [8, 16]\n"train.seed" = [0, 1]')
    command = ("ablate", grid, "--store", store, "--device", "cpu", "--json", "--output")
    full = tinyaudio(*command, "full")
    assert "agreement" not in json.loads(full.stdout.splitlines()[-1])
    done = tinyaudio(*command, "ctc", "--ctc-only", "3", "--against", "full")
    report = json.loads(done.stdout.splitlines()[-1])
    assert [run["steps"] for run in report["runs"]] == [3] * 4
    assert [run["dev_wer"] for run in report["runs"]] == [None] * 4
    assert report["agreement"]["num_groups"] == 2
    assert "by CTC alone, %" in (tmp_path / "ctc" / "table.md").read_text()
    assert (tmp_path / "ctc" / "plot.png").is_file()


def test_curves_begin_with_the_decoder(recipe_file, store, tmp_path):
    """The steps of a curve are those through the decoder: a CTC phase before them moves nothing to the right."""
    grid = load_grid(write_grid(tmp_path / "grid.toml", recipe_file, '"train.ctc_steps" = [0, 2]'))
    done = ablate(grid, store, tmp_path / "out", device="cpu", say=lambda _: None)
    assert [one.wers[-1][0] for one in done.outcomes] == [4, 4]


def outcome(name: str, group: int, ctc_wer: float) -> Outcome:
    report = TrainReport(
        run=name, steps=3, loss=1.0, dev_wer=None, ctc_wer=ctc_wer, parameters=1, seconds=1.0, is_finished=True
    )
    return Outcome(
        name=name, settings={"a": group}, group=(("a", group),), report=report, wers=(), ctc_wers=(), losses=()
    )


def test_the_rank_correlation_is_spearmans_over_the_means_of_seeds(tmp_path):
    """Groups 1 to 4 have means 10, 20, 20, 40 here and 3, 2, 4, 8 there: ranks 1 2.5 2.5 4 and 2 1 3 4."""
    here = [(1, 5.0), (1, 15.0), (2, 20.0), (3, 20.0), (4, 40.0)]
    outcomes = [outcome(f"run-{i}", group, wer / 100) for i, (group, wer) in enumerate(here)]
    rows = [f"run-{i},{wer}" for i, wer in enumerate((0.02, 0.04, 0.02, 0.04, 0.08))]
    (tmp_path / "table.csv").write_text("\n".join(["run,dev_wer", *rows]) + "\n")
    names = [one.name for one in outcomes]
    found = agreement(outcomes, tmp_path, read_wers(tmp_path, names))
    expected = statistics.correlation([1, 2.5, 2.5, 4], [2, 1, 3, 4])
    assert (found.num_groups, found.best_here, found.best_there) == (4, 2, 3)
    assert abs(found.correlation - expected) < 1e-12
    (tmp_path / "table.csv").write_text("run,dev_wer\nrun-0,0.1\n")
    with pytest.raises(RunError, match="no dev WER of 4 runs, such as 'run-1'; expected the same grid"):
        read_wers(tmp_path, names)
    with pytest.raises(RunError, match="expected the folder of a finished ablation"):
        read_wers(tmp_path / "none", names)


def test_what_cannot_be_compared_is_said_before_the_first_run(recipe_file, store, tmp_path):
    grid = load_grid(write_grid(tmp_path / "grid.toml", recipe_file, '"projector.hidden_size" = [8, 16]'))
    with pytest.raises(RunError, match="expected the folder of a finished ablation"):
        ablate(grid, store, tmp_path / "out", device="cpu", say=lambda _: None, against=tmp_path / "none")
    single = load_grid(write_grid(tmp_path / "single.toml", recipe_file, '"train.seed" = [0, 1]'))
    (tmp_path / "table.csv").write_text("run,dev_wer\nseed-0,0.1\nseed-1,0.2\n")
    with pytest.raises(RunError, match="expected at least two, found 1"):
        ablate(single, store, tmp_path / "out", device="cpu", say=lambda _: None, against=tmp_path)
    assert not (tmp_path / "out").exists()
