from __future__ import annotations

from collections.abc import Iterator

from mmclip_shards.datasets.prepared import key_of
from mmclip_shards.datasets.recipe import DICOM, recipe
from mmclip_shards.datasets.upstream import find_file, read_csv
from mmclip_shards.rawpath import RawPath
from mmclip_shards.schema import Box, Record

_SIDE = 1024  # pixels: all images are square


@recipe(
    licence="Kaggle competition rules: non-commercial and academic use",
    access="Kaggle account",
    source="https://www.kaggle.com/c/siim-acr-pneumothorax-segmentation",
    same_images=("nih", "rsna"),
    needs=DICOM,
)
def siim_acr(raw: RawPath) -> Iterator[Record]:
    """SIIM-ACR Pneumothorax: 12,047 radiographs (DICOM) with masks as run lengths, which become boxes.

    RAW holds train-rle.csv (stage 1) or stage_2_train.csv, and dicom-images-train/ (and -test/, whose labels stage 2
    published).

    Quirks: the header is `ImageId, EncodedPixels` with a space, and no mask is ` -1` or `-1`; an image has a row for each
    mask, and each becomes a box. Run lengths are pairs of skip and length, the skip counted from the end of the run before,
    down the columns of 1024 x 1024 pixels. Ids have dots. The images are of NIH ChestX-ray14, under ids of their own. No
    patient ids: an image is a patient. No split is official.
    """
    files = {path.stem: path for folder in ("dicom-images-train", "dicom-images-test") for path in raw.glob(f"{folder}/**/*.dcm")}
    boxes: dict[str, list[Box]] = {}
    for row in read_csv(find_file(raw, "stage_2_train.csv", "train-rle.csv"), "ImageId", "EncodedPixels"):
        found = boxes.setdefault(row["ImageId"], [])
        if row["EncodedPixels"] != "-1":
            try:
                found.append(box_of_runs(row["EncodedPixels"], "Pneumothorax"))
            except ValueError as error:
                raise ValueError(f"{row.place}: {error}") from None
    for image, found in boxes.items():
        source = f"{image}.dcm"
        yield Record(
            key=key_of(source), image=files.get(image, raw / "dicom-images-train" / source), patient=image, source=source,
            labels={"Pneumothorax": int(bool(found))}, boxes=tuple(found),
        )  # fmt: skip


def box_of_runs(cell: str, label: str, side: int = _SIDE) -> Box:
    """The box around a mask of relative run lengths, down the columns of an image of side x side pixels."""
    try:
        numbers = [int(text) for text in cell.split()]
    except ValueError:
        numbers = []
    if not numbers or len(numbers) % 2 or min(numbers) < 0 or min(numbers[1::2]) == 0:
        raise ValueError("a cell of EncodedPixels is neither -1 nor pairs of skip and length: download the table again")
    position, columns, rows = 0, set[int](), set[int]()
    for skip, length in zip(numbers[::2], numbers[1::2], strict=True):
        start = position + skip
        position = start + length
        first, last = divmod(start, side), divmod(position - 1, side)
        columns |= {first[0], last[0]}
        rows |= {first[1], last[1]} if first[0] == last[0] else {0, side - 1}
    if position > side * side:
        raise ValueError(f"a cell of EncodedPixels reaches beyond {side} x {side} pixels: download the table again")
    x, y = min(columns), min(rows)
    return Box(label, x, y, max(columns) - x + 1, max(rows) - y + 1)
