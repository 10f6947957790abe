"""Named protocols: which classes, in which words, on which split, by which metrics. One YAML file each, in `protocols/`."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from mmclip_shards.manifest import Manifest
from mmclip_shards.reader import ShardReader
from mmclip_shards.schema import canonical_json
from mmclip_shards.textfiles import read_text
from pydantic import Field, ValidationError

from mmclip_dist.config import Section, one_line
from mmclip_dist.data.prompts import load_prompts

OWN = "own"
_FIELD = "{disease}"
S = TypeVar("S", bound=Section)
Metric = Literal["auroc", "auprc", "f1", "accuracy"]


class Class(Section):
    """A class of a protocol. words: what {disease} stands for, by default the class's name; labels: other names under which sets
    label it; present, absent: prompts in place of the protocol's; parts: "present" prompts as all combinations of some texts."""

    words: str | None = None
    labels: tuple[str, ...] = ()
    present: tuple[str, ...] | None = None
    absent: tuple[str, ...] | None = None
    parts: tuple[tuple[str, ...], ...] = ()


class Protocol(Section):
    """The content of a protocol's file.

    source: where it comes from, and how it departs from that; dataset: the family in the table of sets that share images;
    split: the one it is defined on; images: how many there are, if that is fixed; exclusive: every image has exactly one of the
    classes; classes: empty for those of the set itself; present, absent: prompts of every class, with {disease}. Without absent
    ones a score is the mean similarity to the present ones, else that minus the mean similarity to the absent ones. train_lists:
    share of the labels -> text file, beside the protocol's own, of the keys that are trained on; without one the seed draws them.
    """

    name: str
    source: str
    dataset: str | None = None
    split: str | None = None
    images: int | None = Field(None, gt=0)
    exclusive: bool = False
    metrics: tuple[Metric, ...] = ("auroc", "auprc", "f1", "accuracy")
    classes: dict[str, Class] = Field(default_factory=dict)
    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    train_lists: dict[float, str] = Field(default_factory=dict)

    def prompts(self) -> Prompts:
        """ValueError for a class without prompts: some protocols fix only split and classes."""
        return {name: self._prompts_of(name, one) for name, one in self.classes.items()}

    def _prompts_of(self, name: str, one: Class) -> Texts:
        words = one.words or name
        joined = tuple(" ".join(parts).strip() for parts in product(*one.parts)) if one.parts else None
        present, absent = (
            tuple(text.replace(_FIELD, words) for text in (self_texts if own is None else own))
            for own, self_texts in ((one.present or joined, self.present), (one.absent, self.absent))
        )
        if not present:
            raise ValueError(
                f"protocol {self.name}: the class {name!r} has no prompts, so it cannot be scored zero-shot: evaluate a probe, "
                "or give it `present` prompts in a file of your own (--protocol FILE.yaml)"
            )
        return Texts(present, absent)


@dataclass(frozen=True)
class Texts:
    """Prompts that state a class, and prompts that deny it (perhaps none)."""

    present: tuple[str, ...]
    absent: tuple[str, ...]


Prompts = Mapping[str, Texts]


def prompts_hash(prompts: Prompts) -> str:
    """sha256 of all prompts."""
    return hashlib.sha256(canonical_json({name: [texts.present, texts.absent] for name, texts in prompts.items()})).hexdigest()


def own_prompts(classes: Sequence[str], file: str | None) -> Prompts:
    """The prompts of training (`prompts.file`) for the labels of a set."""
    found = load_prompts(classes, file)
    count = len(classes)
    return {
        name: Texts(
            tuple(texts[number] for texts in found.texts), tuple(texts[count + number] for texts in found.texts)
        )
        for number, name in enumerate(classes)
    }


def check_prompts(prompts: Prompts, tokens: Callable[[str], int], window: int) -> None:
    """ValueError for a prompt that is longer than the model's window: what is cut off would be left out without a word."""
    for name, texts in prompts.items():
        for text in (*texts.present, *texts.absent):
            count = tokens(text)
            if count > window:
                raise ValueError(
                    f"a prompt of {name!r} has {count} tokens, but the model reads {window}: {text[:60]!r}; use a protocol with "
                    "shorter prompts"
                )


# -- Files ------------------------------------------------------------------------------------------------------------


def protocol_names() -> list[str]:
    return names_in("protocols")


def names_in(folder: str) -> list[str]:
    """Names of the files in a folder of this package."""
    files = (resources.files("mmclip_dist") / "evaluate" / folder).iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in files if entry.name.endswith(".yaml"))


def load_protocol(name: str) -> Protocol:
    """A protocol by its name, or from a YAML file of the same form. ValueError in one line if there is none or it is odd."""
    found = load_named(name, "protocols", Protocol, "protocol")
    lists = {share: str(Path(name).parent / file) for share, file in found.train_lists.items()}
    return found.model_copy(update={"train_lists": lists})


def load_named(name: str, folder: str, kind: type[S], what: str) -> S:
    """A section by the name of its file in a folder of this package, or from a YAML file of its form. ValueError in one line."""
    if name.endswith((".yaml", ".yml")):
        path, text = Path(name), _text_of(Path(name), what)
    elif name in names_in(folder):
        path = Path(name)
        text = (resources.files("mmclip_dist") / "evaluate" / folder / f"{name}.yaml").read_text(encoding="utf-8")
    else:
        raise ValueError(f"no {what} {name!r}: the {what}s are {', '.join(names_in(folder))}; a file must end in .yaml")
    try:
        values: Any = yaml.safe_load(text)
        if not isinstance(values, dict):
            raise ValueError(f"it must hold the fields of a {what}")
        return kind.model_validate({"name": path.stem if path.suffix else name, **values})
    except yaml.YAMLError as error:
        raise ValueError(f"{what} {name} is not valid YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise ValueError(f"{what} {name}: {one_line(error)}") from error
    except ValueError as error:
        raise ValueError(f"{what} {name}: {error}") from error


def _text_of(path: Path, what: str) -> str:
    try:
        return read_text(path, "save it as UTF-8")
    except FileNotFoundError as error:
        raise ValueError(f"--{what} {path}: no such file") from error


# -- A protocol on a set ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Which label of a set is which class. labels: a label's name in the set -> number of the class; unknown: labels of the set
    that the protocol does not know."""

    labels: dict[str, int]
    unknown: tuple[str, ...]

    def of_box(self, label: str) -> int | None:
        """The class of a box."""
        return self.labels.get(label, {folded(name): number for name, number in self.labels.items()}.get(folded(label)))


def folded(name: str) -> str:
    """A label's name without case, underscores and punctuation: "Pleural_Thickening" is "pleural thickening"."""
    return " ".join(re.findall(r"[a-z0-9]+", name.lower()))


def matched(protocol: Protocol, sets: Sequence[ShardReader]) -> tuple[tuple[str, ...], list[Columns]]:
    """The classes of a protocol on some sets, and each set's columns. Of `own`, the classes are all labels of all sets."""
    for reader in sets:
        if not reader.manifest.labels:
            raise ValueError(f"{reader.url} has no labels to evaluate on; pack it with --labels-column")
    if protocol.classes:
        return tuple(protocol.classes), [columns_of(protocol, reader.manifest, str(reader.url)) for reader in sets]
    classes = tuple(dict.fromkeys(name for reader in sets for name in reader.manifest.labels))
    return classes, [Columns({name: classes.index(name) for name in reader.manifest.labels}, ()) for reader in sets]


def check_split(protocol: Protocol, manifest: Manifest, url: str) -> None:
    """ValueError if a set is another split than the one that the protocol is defined on."""
    if protocol.split is not None and manifest.split != protocol.split:
        raise ValueError(
            f"{url} is the split {manifest.split!r}, but protocol {protocol.name} is defined on {protocol.split!r}: name that one"
        )


def columns_of(protocol: Protocol, manifest: Manifest, url: str) -> Columns:
    """Match a set's labels with the protocol's classes by name. ValueError if the set lacks a class."""
    names = {folded(label): label for label in manifest.labels}
    labels, missing = {}, []
    for number, (name, one) in enumerate(protocol.classes.items()):
        found = next((names[key] for key in map(folded, (name, *one.labels)) if key in names), None)
        if found is None:
            missing.append(name)
        else:
            labels[found] = number
    unknown = tuple(label for label in manifest.labels if label not in labels)
    if missing:
        told = f"; labels unknown to the protocol: {', '.join(unknown)}" if unknown else ""
        raise ValueError(f"{url} lacks labels that protocol {protocol.name} needs: {', '.join(missing)}{told}")
    return Columns(labels, unknown)
