from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from mmclip_shards.datasets.prepared import split_name
from mmclip_shards.datasets.recipe import Skipped, recipe
from mmclip_shards.schema import Record

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".dcm", ".dicom"})


@recipe(licence=None, access=None, source="your own files", unlisted_absent=True)
def folder(raw: Path) -> Iterator[Record | Skipped]:
    """Class folders: RAW/CLASS/IMAGE, or any tree of images whose folders name what they show.

    The image's own folder is its label; `normal` and `No Finding` make all others absent. Images that lie in RAW itself have
    unknown labels. A report may lie beside an image, as IMAGE.txt with the same stem (UTF-8). Each image counts as a patient
    of its own: if you know the patients, use `jsonl` or `csv`. Other files are left out and counted by suffix. `--split
    official` takes the first folder of RAW/train/CLASS/IMAGE, RAW/test/CLASS/IMAGE.
    """
    for path in _files(raw):
        source = path.relative_to(raw).as_posix()
        if path.suffix.lower() not in SUFFIXES:
            if path.suffix != ".txt":
                yield Skipped(f"no image: {path.suffix or 'no suffix'}")
            continue
        report = path.with_suffix(".txt")
        try:
            text = report.read_text(encoding="utf-8-sig") if report.is_file() else ""
        except UnicodeDecodeError as error:
            raise ValueError(f"{report} is not UTF-8: convert it (iconv)") from error
        first, *folders = path.relative_to(raw).parent.parts or ("",)
        yield Record(
            key=source, image=path, patient=source, source=source, report=text,
            labels={path.parent.name: 1} if path.parent != raw else {}, split=split_name(first) if folders else None,
        )  # fmt: skip


def _files(raw: Path) -> Iterator[Path]:
    """All files of a tree in one order, a folder at a time."""
    for place, folders, names in os.walk(raw):
        folders.sort()
        yield from (Path(place, name) for name in sorted(names))
