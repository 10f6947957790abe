from __future__ import annotations

from collections.abc import Iterator

from mmclip_shards.datasets.prepared import split_name
from mmclip_shards.datasets.recipe import Skipped, recipe
from mmclip_shards.datasets.upstream import Row, find_file, find_optional, read_csv
from mmclip_shards.rawpath import RawPath
from mmclip_shards.schema import Record

_LABELS: dict[str, dict[str, int | None]] = {
    "positive": {"COVID-19": 1},
    "negative": {"COVID-19": 0},
    "COVID-19": {"COVID-19": 1, "Pneumonia": 1},
    "pneumonia": {"COVID-19": 0, "Pneumonia": 1},
    "normal": {"COVID-19": 0, "Pneumonia": 0},
}


@recipe(
    licence="that of each source (cohen, fig1, actmed, sirm, rsna, ricord, bimcv, stonybrook); research only",
    access="Kaggle account",
    source="https://github.com/lindawangg/COVID-Net/blob/master/docs/COVIDx.md",
    official=True,
    private_paths=True,
    same_images=("rsna", "nih"),
)
def covidx(raw: RawPath) -> Iterator[Record | Skipped]:
    """COVIDx CXR-2, CXR-3 or CXR-4: radiographs of COVID-19 from many sources, two or three classes.

    RAW holds train.txt, test.txt (CXR-4: and val.txt) and the folders train/, test/, val/. Give the release by --dataset
    covidx4.

    Quirks: the lists have no header; their columns, separated by spaces, are patient, file name, class, source. Classes are
    positive and negative, or normal, pneumonia and COVID-19. Patient numbers are those of a source, so a patient is both
    together; `rnsa` is a misspelt `rsna`. MAVL's `COVIDx-CXR-2` is another split of train.txt, in lists of the same form: put the
    file names (their second column) into RAW/splits/mavl/train.txt, val.txt and test.txt. Negatives are of RSNA, so of NIH.
    File names of some sources (RICORD) hold patient numbers, so keyed hashes are stored in their place.
    """
    validation = find_optional(raw, "val.txt")  # of CXR-4 alone
    tables = [find_file(raw, "train.txt"), *([] if validation is None else [validation]), find_file(raw, "test.txt")]
    for table in tables:
        for row in read_csv(table, header=("patient", "image", "class", "source"), delimiter=" ", ragged=True):
            if row["class"] not in _LABELS:
                yield Skipped(f"class {row['class']}")
                continue
            source = f"{table.stem}/{row['image']}"
            yield Record(
                key=source, image=raw / source, patient=f"{_source(row)} {row['patient']}", source=source,
                labels=_LABELS[row["class"]], split=split_name(table.stem),
            )  # fmt: skip


def _source(row: Row) -> str:
    source = row["source"].lower()
    return "rsna" if source == "rnsa" else source
