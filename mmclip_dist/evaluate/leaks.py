"""Was the test set trained on? By shard, by patient, by image, and by a table of data sets that share images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mmclip_shards.reader import ShardReader

from mmclip_dist.data.seen import Seen

_FAMILIES = {
    "nih": ("nih", "chestxray14", "chestxray8", "cxr14"),
    "googlenih": ("google2019", "googlenih"),
    "rsna": ("rsna",),
    "siim": ("siim",),
    "covidx": ("covidx",),
    "covidchestxray": ("covidchestxray", "ieee8023", "cohen"),
    "chestxdet": ("chestxdet",),
    "chexpert": ("chexpert",),
    "mimic": ("mimic",),
    "mscxr": ("mscxr",),
    "tbx11k": ("tbx11k",),
    "montgomery": ("montgomery",),
    "shenzhen": ("shenzhen",),
}
"""Family of data sets -> what its name contains, without case and punctuation."""

_SOURCES = {
    "googlenih": {"nih"}, "rsna": {"nih"}, "siim": {"nih"}, "chestxdet": {"nih"}, "covidx": {"nih", "rsna", "covidchestxray"},
    "mscxr": {"mimic"}, "tbx11k": {"montgomery", "shenzhen"},
}  # fmt: skip
"""Family -> the families whose images it holds. Splits of one family are told apart by patient instead."""


def families(dataset: str) -> set[str]:
    name = re.sub(r"[^a-z0-9]", "", dataset.lower())
    found = {family for family, words in _FAMILIES.items() if any(word in name for word in words)}
    return found - {"nih"} if "googlenih" in found else found


def share_images(one: str, other: str) -> bool:
    """Whether two data sets, by their names, are different collections that hold the same images."""
    mine, its = families(one), families(other)
    if mine & its:
        return False
    sources_of_mine, sources_of_its = (set().union(*({f} | _SOURCES.get(f, set()) for f in found)) for found in (mine, its))
    return bool(sources_of_mine & sources_of_its)


def refuse_trained(readers: Sequence[ShardReader], trained_on: Sequence[str]) -> None:
    """ValueError if a set shares a shard with `trained_on`."""
    for reader in readers:
        if set(trained_on) & {shard.sha256 for shard in reader.manifest.shards}:
            raise ValueError(
                f"{reader.url} was trained on, so its scores would say nothing; evaluate on another split or set, "
                "or pass --allow-leak"
            )


def check(
    readers: Sequence[ShardReader], trained_on: Sequence[str] | None, seen: Seen | None, *, dataset: str | None = None,
    allow: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """What of the sets was trained on, for the result. ValueError in one line if anything was, unless `allow`.

    trained_on: sha256 of the training shards; None if the model does not tell. seen: its patients and images; None likewise.
    dataset: the family of the protocol, beside the sets' own names.
    """
    checked = (["shards"] if trained_on is not None else []) + (["patients", "images", "data sets"] if seen is not None else [])
    found: dict[str, Any] = {
        "checked": checked, "shards": 0, "patients": 0, "images": 0, "data_sets": [], "allowed": allow,
        "patients_unknown_of": list(seen.unknown) if seen is not None else None,
    }  # fmt: skip
    if trained_on is not None:
        if not allow:
            refuse_trained(readers, trained_on)
        found["shards"] = sum(len(set(trained_on) & {shard.sha256 for shard in reader.manifest.shards}) for reader in readers)
    if seen is not None:
        found["patients"], found["images"] = seen.common(Seen.of(readers))
        own = (name for reader in readers for name in reader.manifest.datasets)
        names = dict.fromkeys([*own, *([dataset] if dataset else [])])
        found["data_sets"] = [[mine, its] for mine in names for its in seen.datasets if share_images(mine, its)]
    if (found["patients"] or found["images"] or found["data_sets"]) and not allow:
        told = [f"{found[kind]} of its {kind}" for kind in ("patients", "images") if found[kind]]
        told += [f"{its}, which shares images with {mine}" for mine, its in found["data_sets"]]
        raise ValueError(
            f"{', '.join(str(reader.url) for reader in readers)}: the model was trained on {' and '.join(told)}, so its "
            "scores would flatter; evaluate on another set, or pass --allow-leak, which the result then says (if only the "
            "patients' numbers are the same, pack one of the sets with --patients-of NAME)"
        )
    return found


def refuse_common(one: Sequence[ShardReader], other: Sequence[ShardReader], what: str) -> None:
    """ValueError if two sets that must be of different patients share some. what: their roles, for the message."""
    patients, images = Seen.of(one).common(Seen.of(other))
    if patients or images:
        raise ValueError(f"{what} share {patients} patients and {images} images: name sets of different patients")
