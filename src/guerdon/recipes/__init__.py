"""Recipes: what a run is made of, as YAML. `load_recipe` reads one, checks it and fills the defaults."""

from __future__ import annotations

from guerdon.recipes.schema import Recipe, bundled, dump, load_recipe, resolve

__all__ = ["Recipe", "bundled", "dump", "load_recipe", "resolve"]
