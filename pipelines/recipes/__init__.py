"""Everything that a stage may be told: recipes, one TOML file each, checked strictly."""

from pipelines.recipes.recipe import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe"]
