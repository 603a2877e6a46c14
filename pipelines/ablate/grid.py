"""Grids: the combinations of recipe settings that an ablation trains, in one TOML file, checked strictly.

    recipe = "demo"
    [settings]                                   # for every run
    "train.steps" = 400
    [axes]                                       # every combination of these
    "projector.kind" = ["mlp", "linear"]
    "train.seed" = [0, 1]
    [[also]]                                     # further combinations, each with every seed
    "projector.kind" = "mlp"
    "train.learning_rate" = 1e-3
    [stores]                                     # the store of each encoding, where "store.encoding" is an axis
    int8 = "data/demo-int8"

The name of a cell consists of its settings and is the name of its run's folder, so that finished runs are found again.
"""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from pipelines.errors import RecipeError
from pipelines.recipes import Recipe, load_recipe
from pipelines.recipes.recipe import Section, explain, read_toml

GRIDS = Path(__file__).parent / "grids"
SEED = "train.seed"

Value = str | int | float | bool


class GridFile(Section):
    """A grid as written."""

    recipe: str = "demo"
    settings: dict[str, Value] = Field(default_factory=dict)
    axes: Annotated[dict[str, Annotated[list[Value], Field(min_length=1)]], Field(min_length=1)]
    also: list[dict[str, Value]] = Field(default_factory=list)
    stores: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a grid: its name, its settings beside those of the whole grid, the overrides, and the recipe."""

    name: str
    settings: dict[str, Value]
    overrides: tuple[str, ...]
    recipe: Recipe

    @property
    def group(self) -> tuple[tuple[str, Value], ...]:
        """The settings without the seed: cells of one group are repetitions of each other."""
        return tuple((key, value) for key, value in self.settings.items() if key != SEED)


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid with all its cells in the order they run, the first seed of every combination first."""

    name: str
    recipe: str
    cells: tuple[Cell, ...]
    stores: dict[str, Path]


def load_grid(name_or_path: str, overrides: Sequence[str] = ()) -> Grid:
    """Read and check a grid and the recipes of all its cells.

    Args:
        overrides: "section.key=value" for every run, applied after the grid's own settings.

    Raises:
        RecipeError: not found, not TOML, an unknown key, or a combination that is not a valid recipe.
    """
    path, content = read_toml(name_or_path, GRIDS, "grid")
    try:
        grid = GridFile.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"grid {name_or_path!r}: {explain(error, GridFile)}") from error
    seeds = grid.axes.get(SEED, [])
    combinations = [dict(zip(grid.axes, values, strict=True)) for values in itertools.product(*grid.axes.values())]
    combinations += [{**one, SEED: seed} for one in grid.also for seed in seeds] if seeds else grid.also
    combinations.sort(key=lambda one: seeds.index(one[SEED]) if one.get(SEED) in seeds else 0)
    keys = {key for settings in combinations for key in settings}
    uses = Counter(key.split(".")[-1] for key in keys)  # a setting goes by its last part where that is unique
    short = {key: last if uses[last := key.split(".")[-1]] == 1 else key for key in keys}
    cells = {}
    for settings in combinations:
        name = re.sub(r"[^A-Za-z0-9_.-]", "-", "_".join(f"{short[key]}-{value}" for key, value in settings.items()))
        applied = (*_as_overrides(grid.settings), *overrides, *_as_overrides(settings))
        recipe = load_recipe(grid.recipe, applied)
        cells[name] = Cell(name=name, settings=settings, overrides=applied, recipe=recipe)
    stores = {encoding: Path(store) for encoding, store in grid.stores.items()}
    return Grid(name=path.stem, recipe=grid.recipe, cells=tuple(cells.values()), stores=stores)


def _as_overrides(settings: dict[str, Value]) -> list[str]:
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]
