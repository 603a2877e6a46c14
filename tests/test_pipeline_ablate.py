"""Ablations on tiny random parts: every cell once, through kills, with a table, a plot and no encoder."""

import csv
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import NoiseMaker, write_folder_corpus, write_recipe

from pipelines.ablate import ablate
from pipelines.corpora import open_corpus
from pipelines.encoder_passes import counting_encoder_passes
from pipelines.errors import RecipeError, RunError
from pipelines.extract import extract, wanted_splits
from pipelines.grids import GRIDS, load_grid
from pipelines.recipes import load_recipe
from pipelines.run_table import compare_runs, list_runs
from pipelines.runs import Run


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory, encoder_folder, decoder_folder):
    root = tmp_path_factory.mktemp("tiny")
    write_folder_corpus(root / "corpus", NoiseMaker(seed=0), {"train": 40, "dev": 8})
    path = write_recipe(root / "tiny.toml", root / "corpus", encoder_folder, decoder_folder)
    for encoding in ("float16", "int8"):
        recipe = load_recipe(str(path), [f"store.encoding={encoding}"])
        splits = wanted_splits(recipe, open_corpus(recipe.corpus), None)[0]
        extract(recipe, root / encoding, splits=splits, device="cpu")
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
    also = '[[also]]\n"projector.whiten" = true\n[[also]]\n"store.encoding" = "int8"\n'
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
    assert [row[0] for row in table.rows] == ["hidden_size-8", "hidden_size-16"] or len(table.rows) == 2
    compared = str(compare_runs(["hidden_size-8", "hidden_size-16"], tmp_path / "out"))
    assert "projector.hidden_size" in compared
    assert "train.seed" not in compared, "only settings that differ are shown"
    changed = load_grid(grid, ["train.learning_rate=0.5"])
    with pytest.raises(RunError, match=r"train.learning_rate was 0.001 and is 0.5"):
        ablate(changed, store, tmp_path / "out", device="cpu", say=lambda _: None)


def test_grid_is_checked_before_anything_runs(recipe_file, store, tmp_path):
    (tmp_path / "typo.toml").write_text('recipe = "demo"\n[axis]\n"train.seed" = [0]\n')
    with pytest.raises(RecipeError, match=r"unknown key 'axis'; did you mean 'axes'"):
        load_grid(str(tmp_path / "typo.toml"))
    with pytest.raises(RecipeError, match=r"unknown key 'projector.kin'; did you mean 'kind'"):
        load_grid(write_grid(tmp_path / "key.toml", recipe_file, '"projector.kin" = ["mlp"]'))
    with pytest.raises(RecipeError, match=r"no grid 'dem'; expected a TOML file or one of .*demo"):
        load_grid("dem")
    grid = load_grid(write_grid(tmp_path / "int8.toml", recipe_file, '"store.encoding" = ["float16", "int8"]'))
    with pytest.raises(RunError, match=r"holds float16 and the grid asks for int8; extract one with"):
        ablate(grid, store, tmp_path / "out", device="cpu", say=lambda _: None)
    assert not (tmp_path / "out").exists()


def test_counter_sees_an_encoder_that_runs(model, noise, processor):
    with counting_encoder_passes() as count:
        model.encode(**processor([noise(0.5)]))
    assert count.passes == 1


def test_shipped_grid_has_four_projectors_and_two_seeds():
    (path,) = GRIDS.glob("*.toml")
    cells = load_grid(path.stem).cells
    assert len({cell.recipe.projector.kind for cell in cells}) >= 4
    assert len({cell.recipe.train.seed for cell in cells}) == 2
    assert len(cells) >= 8


def test_no_runs_is_one_line(tmp_path):
    with pytest.raises(RunError, match=r"no runs under .*`tinyaudio train` makes one"):
        list_runs(tmp_path / "nowhere")
