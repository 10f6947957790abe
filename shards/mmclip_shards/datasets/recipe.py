"""A recipe says how one published data set becomes `Record`s, under which terms, and how it is split."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from mmclip_shards.rawpath import RawPath
from mmclip_shards.schema import Record

ENTRY_POINTS = "mmclip_shards.datasets"
"""The group under which a package offers recipes."""

BUILT_IN = {
    name: name.replace("-", "_")
    for name in (
        "brax", "candid-ptx", "chexpert", "chexpert-plus", "covidx", "folder", "jsonl", "mimic-cxr", "mimic-cxr-jpg", "nih",
        "openi", "padchest", "parquet", "rexgradient", "rocov2", "rsna", "siim-acr", "vindr-cxr",
    )
}  # fmt: skip
"""Name -> module of this package, and the recipe in it. Not entry points of our own distributions: a checkout on PYTHONPATH has
none."""

OFFICIAL = "official"


@dataclass(frozen=True)
class Skipped:
    """What a recipe yields for an upstream row that becomes no record. reason: without ids; equal reasons are counted."""

    reason: str


Read = Callable[[RawPath], Iterable[Record | Skipped]]
"""The published tree -> its records, in an order that depends on the tree alone. A record's key may be any text of its own. It
is gone through once; it should hold no more than ids and labels in memory."""


@dataclass(frozen=True)
class Recipe:
    """How one data set is read. Make it with `recipe`.

    title: one line; licence, access: its terms, for the manifest (None: your own files); source: where it is to be had.
    official: whether records carry the split that the data set itself gives. private_paths: keys and paths name patients, so
    keyed hashes are stored in their place. unlisted_absent: the records' labels are lists of what is present; a label that
    another record has and this one has not is absent. same_images: recipes that share images with this one. needs: module
    that its images or tables need, and the extra that has it. patients: name of the collection that numbers its patients, where
    another recipe reads the same one; by default the recipe's own name. language: of its reports (ISO 639-1).
    """

    read: Read
    title: str
    licence: str | None
    access: str | None
    source: str
    official: bool = False
    private_paths: bool = False
    unlisted_absent: bool = False
    same_images: tuple[str, ...] = ()
    needs: tuple[str, str] | None = None
    patients: str | None = None
    language: str = "en"

    def numbering(self, name: str) -> str | None:
        """Whose numbers its patients have, for `hash_patient`. Your own files (no licence) share one: only you know which of them
        are of one hospital. name: the recipe's."""
        return None if self.licence is None else self.patients or name


DICOM = ("pydicom", "dicom")
"""`Recipe.needs` of sets of DICOM files."""


def recipe(
    *,
    licence: str | None,
    access: str | None,
    source: str,
    official: bool = False,
    private_paths: bool = False,
    unlisted_absent: bool = False,
    same_images: tuple[str, ...] = (),
    needs: tuple[str, str] | None = None,
    patients: str | None = None,
    language: str = "en",
) -> Callable[[Read], Recipe]:
    """Turn a function that yields `Record`s into a `Recipe`; the first line of its docstring is the title."""

    def make(read: Read) -> Recipe:
        title = (inspect.getdoc(read) or "").partition("\n")[0]
        return Recipe(
            read, title, licence, access, source, official, private_paths, unlisted_absent, same_images, needs, patients,
            language,
        )  # fmt: skip

    return make


def recipe_names() -> list[str]:
    """All names that `find_recipe` knows: the built-in ones, and those of installed packages."""
    return sorted({*BUILT_IN, *(found.name for found in entry_points(group=ENTRY_POINTS))})


def find_recipe(name: str) -> Recipe:
    """The recipe of that name, or in that Python file. The file is run: give only your own. ValueError when there is none."""
    if name.endswith(".py"):
        return _in_file(Path(name))
    offers = [found for found in entry_points(group=ENTRY_POINTS) if found.name == name]
    if name in BUILT_IN:
        offers.append(EntryPoint(name, f"mmclip_shards.datasets.{BUILT_IN[name]}:{BUILT_IN[name]}", ENTRY_POINTS))
    if not offers:
        near = get_close_matches(name, recipe_names(), n=3, cutoff=0.0)
        raise ValueError(f"there is no recipe {name!r}; nearest: {', '.join(near)} (or give a file that ends in .py)")
    if len({offer.value for offer in offers}) > 1:
        values = ", ".join(sorted(offer.value for offer in offers))
        raise ValueError(f"several packages offer a recipe {name!r} ({values}): uninstall all but one")
    try:
        found = offers[0].load()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"recipe {name!r} cannot be loaded from {offers[0].value}: {error}") from error
    if not isinstance(found, Recipe):
        raise ValueError(f"{offers[0].value} is not a recipe: make it with @mmclip_shards.recipe")
    return found


def check_needs(found: Recipe) -> None:
    """ValueError that says what to install when a recipe needs a module that is not there."""
    if found.needs is not None and importlib.util.find_spec(found.needs[0]) is None:
        module, extra = found.needs
        raise ValueError(f'this data set needs {module}: pip install "mmclip-dist[{extra}]"')


def _in_file(path: Path) -> Recipe:
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise ValueError(f"there is no recipe file {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = [value for value in vars(module).values() if isinstance(value, Recipe)]
    if len(found) != 1:
        raise ValueError(f"{path} holds {len(found)} recipes; one function with @mmclip_shards.recipe is needed")
    return found[0]
