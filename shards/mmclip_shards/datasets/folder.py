from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePosixPath

from mmclip_shards.datasets.prepared import split_name
from mmclip_shards.datasets.recipe import Skipped, recipe
from mmclip_shards.dicom import is_dicom
from mmclip_shards.rawpath import RawPath, ahead, walk
from mmclip_shards.schema import Record

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".dcm", ".dicom"})


@recipe(licence=None, access=None, source="your own files", unlisted_absent=True)
def folder(raw: RawPath) -> Iterator[Record | Skipped]:
    """Class folders: RAW/CLASS/IMAGE, or any tree of images whose folders name what they show.

    The image's own folder is its label; `normal` and `No Finding` make all others absent. Images that lie in RAW itself have
    unknown labels. A report may lie beside an image, as IMAGE.txt with the same stem (UTF-8). Each image counts as a patient
    of its own: if you know the patients, use `jsonl` or `csv`. DICOM files need no suffix. Other files are left out and counted
    by suffix. `--split official` takes the first folder of RAW/train/CLASS/IMAGE, RAW/test/CLASS/IMAGE.
    """
    for path, text in ahead(_text, _images(raw)):
        if isinstance(path, Skipped):
            yield path
            continue
        source = path.relative_to(raw)
        first, *folders = source.parent.parts or ("",)
        yield Record(
            key=source.as_posix(), image=path, patient=source.as_posix(), source=source.as_posix(), report=text,
            labels={path.parent.name: 1} if path.parent != raw else {}, split=split_name(first) if folders else None,
        )  # fmt: skip


def _images(raw: RawPath) -> Iterator[tuple[RawPath | Skipped, RawPath | None]]:
    """Each image, and its report if there is one; and what is left out."""
    for folder, names in walk(raw):
        texts = {PurePosixPath(name).stem: name for name in names if name.lower().endswith(".txt")}
        described = set()
        for name in names:
            stem, suffix = PurePosixPath(name).stem, PurePosixPath(name).suffix
            if name.startswith("."):  # macOS puts ._IMAGE.png beside each image of an archive
                yield Skipped("hidden file"), None
                continue
            if name == "DICOMDIR":  # the list of an archive's files
                yield Skipped("no image: DICOMDIR"), None
                continue
            if (not suffix or suffix[1:].isdecimal()) and is_dicom(folder / name):
                stem = name
            elif suffix.lower() not in SUFFIXES:
                if suffix.lower() != ".txt":
                    yield Skipped(f"no image: {suffix or 'no suffix'}"), None
                continue
            described.add(stem)
            yield folder / name, folder / texts[stem] if stem in texts else None
        yield from ((Skipped("a text without an image"), None) for stem in texts if stem not in described)


def _text(report: RawPath | None) -> str:
    try:
        return "" if report is None else report.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{report} is not UTF-8: convert it (iconv)") from error
