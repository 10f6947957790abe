"""Which of the files that pydicom brings with it are decoded, and why the others are refused.

    python shards/bench/dicom.py
"""

from __future__ import annotations

import re
from collections import defaultdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pydicom
from mmclip_shards.dicom import decode_dicom, is_dicom

RESULTS = Path(__file__).parent / "results"
BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"
PLUGINS = ("pillow", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pyjpegls", "python-gdcm")


def outcome(file: Path) -> str:
    try:
        image = decode_dicom(file)
    except ValueError as error:
        return re.sub(r"^.* is not a usable DICOM radiograph: ", "", str(error))
    return "decoded" if image.getextrema() != (0, 0) else "decoded; all its values are equal"


def transfer_syntax(file: Path) -> str:
    meta = pydicom.dcmread(file, stop_before_pixels=True).file_meta
    return meta.TransferSyntaxUID.name if "TransferSyntaxUID" in meta else "none"


def main() -> None:
    rows: dict[tuple[str, str], list[str]] = defaultdict(list)
    for file in sorted(path for path in BUNDLED.rglob("*") if path.is_file() and is_dicom(path)):
        rows[outcome(file), transfer_syntax(file)].append(file.relative_to(BUNDLED).as_posix())
    decoded = sum(len(names) for (what, _), names in rows.items() if what.startswith("decoded"))
    total = sum(map(len, rows.values()))
    installed = []
    for name in ("pydicom", *PLUGINS):
        try:
            installed.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            installed.append(f"no {name}")
    lines = [
        "# The DICOM files of pydicom", "",
        f"`python shards/bench/dicom.py`, {', '.join(installed)}: {decoded} of {total} are decoded.", "",
        "| outcome | transfer syntax | files |", "|---|---|---|",
    ]  # fmt: skip
    for (what, syntax), names in sorted(rows.items(), key=lambda row: (not row[0][0].startswith("decoded"), row[0])):
        shown = ", ".join(f"`{name}`" for name in names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        lines.append(f"| {what} | {syntax} | {len(names)}: {shown} |")
    (RESULTS / "dicom.md").write_text("\n".join(lines) + "\n")
    print(lines[2])


if __name__ == "__main__":
    main()
