from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping

from mmclip_shards.datasets.prepared import key_of
from mmclip_shards.datasets.recipe import Skipped, recipe
from mmclip_shards.datasets.upstream import Row, find_file, read_age, read_csv
from mmclip_shards.rawpath import RawPath
from mmclip_shards.schema import Record

_VIEWS = {"L": "LATERAL", "AP_horizontal": "AP SUPINE", "UNK": ""}
_NO_COMMA = re.compile(r"""['"]\s+['"]""")
_USELESS = ("exclude", "suboptimal study")


@recipe(
    licence="BIMCV PadChest research use agreement: research only, no sharing",
    access="request form",
    source="https://bimcv.cipf.es/bimcv-projects/padchest/",
    unlisted_absent=True,
    language="es",
)
def padchest(raw: RawPath) -> Iterator[Record | Skipped]:
    """PadChest: 160,861 radiographs of 67,625 patients, Spanish reports (stemmed), 193 labels.

    RAW holds PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv[.gz] and the folders 0 ... 50 and 54 (or one flat images/).

    Quirks: labels are Python lists with stray spaces and empty names; names are compared whole, since `mass` is also part of
    `breast mass`. Rows that are labelled `exclude` or `suboptimal study`, or projected EXCLUDE, are left out and counted;
    `unchanged` says nothing of this image and is dropped; `normal` makes all absent. PNGs have 16 bits of which 10 to 12 are
    used: they are scaled by their own minimum and maximum. Some PNGs are known to be broken or missing: allow them with
    --max-bad-fraction 0.001. 115,808 of the views and 121,808 of the label lists are not a person's: see MethodProjection and
    MethodLabel upstream. No split is official.
    """
    flat = raw / "images" if (raw / "images").is_dir() else None
    table = find_file(
        raw, "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", "PADCHEST_chest_x_ray_images_labels_160K.csv"
    )
    for row in read_csv(table, "ImageID", "ImageDir", "PatientID", "Projection", "Report", "Labels"):
        labels = _labels(row)
        useless = next((name for name in _USELESS if name in labels), None)
        if useless is not None or row["Projection"] == "EXCLUDE":
            yield Skipped(f"labelled {useless}" if useless else "projection EXCLUDE")
            continue
        name = row["ImageID"]
        yield Record(
            key=key_of(name), image=raw / row["ImageDir"] / name if flat is None else flat / name,
            patient=row["PatientID"], source=f"{row['ImageDir']}/{name}",
            report=row["Report"], labels=dict.fromkeys(labels - {"unchanged"}, 1),
            view=_VIEWS.get(row["Projection"], row["Projection"]) or None, age=_age(row),
        )  # fmt: skip


def _age(row: Mapping[str, str]) -> int | None:
    """Years from the year of birth (`1930.0`) to that of the study (`20140915`): the day of birth is not published."""
    study, born = row.get("StudyDate_DICOM", "")[:4], row.get("PatientBirth", "").partition(".")[0]
    return read_age(str(int(study) - int(born))) if study.isdigit() and born.isdigit() else None


def _labels(row: Row) -> set[str]:
    try:
        return read_list(row["Labels"])
    except ValueError as error:
        raise ValueError(f"{row.place}: {error}") from None


def read_list(cell: str) -> set[str]:
    """The names in a Python list of texts; empty for an empty cell or `nan`. ValueError for anything else."""
    if cell in ("", "nan"):
        return set()
    try:
        names = ast.literal_eval(cell)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        names = None
    # Without a comma, as NumPy prints lists, Python would join two texts: ['a' 'b'] is ['ab'].
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or _NO_COMMA.search(cell):
        raise ValueError("a cell of Labels is no list like ['normal']: download the table again")
    return {name for text in names if (name := text.strip())}
