"""What becomes of stored DICOM values: files made here, held against the formulas of PS3.3, C.7.6.3, C.11.1 and C.11.2."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from mmclip_shards.dicom import decode_dicom
from mmclip_shards.images import prepare_image
from mmclip_shards.schema import Box

pydicom = pytest.importorskip("pydicom", reason='DICOM is not tested: pip install "mmclip-dist[dicom]"')

SIDE = 64
RAMP = np.linspace(0, 4095, SIDE * SIDE).reshape(SIDE, SIDE).round().astype(int)  # 12 bits
SIGNED = RAMP - 2048
LUT_12 = (np.sqrt(np.arange(4096) / 4095) * 4095).astype(int)
LUT_16 = LUT_12 * 16
LUT_8 = LUT_12 // 16


def file_of(values: np.ndarray, stored: int = 12, signed: bool = False, allocated: int = 16, **fields: Any) -> bytes:
    """A DICOM file with these stored values [height, width], in `stored` of `allocated` bits."""
    found = pydicom.Dataset()
    found.file_meta = pydicom.dataset.FileMetaDataset()
    found.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    found.SOPClassUID, found.SOPInstanceUID = pydicom.uid.DigitalXRayImageStorageForPresentation, "1.2.3"
    found.Rows, found.Columns = values.shape
    found.SamplesPerPixel, found.PhotometricInterpretation, found.PixelRepresentation = 1, "MONOCHROME2", int(signed)
    found.BitsAllocated, found.BitsStored, found.HighBit = allocated, stored, stored - 1
    data = (values & (2**allocated - 1)).astype(f"<u{allocated // 8}").tobytes()
    found.PixelData = data + bytes(len(data) % 2)
    for name, value in fields.items():
        setattr(found, name, value)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, found, enforce_file_format=True)
    return buffer.getvalue()


def table(values: np.ndarray, bits: int, first: int = 0, vr: str = "US", words: int = 16) -> Any:
    """A LUT sequence of one item. words: bits of each entry in the file."""
    item = pydicom.Dataset()
    item.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(values), first, bits])
    packed = values.astype(f"<u{words // 8}").tobytes()
    item.add_new("LUTData", vr, packed if vr == "OW" else np.frombuffer(packed, "<u2").tolist())
    return pydicom.Sequence([item])


def linear(values: np.ndarray, center: float, width: float) -> np.ndarray:
    return np.clip((values - (center - 0.5)) / (width - 1) + 0.5, 0, 1)


def grey(values: np.ndarray) -> np.ndarray:
    """Minimum to 0, maximum to 255."""
    values = values - float(values.min())
    return np.rint(values * (255 / values.max()))


WINDOW = {"WindowCenter": 2000, "WindowWidth": 1000}
CASES: dict[str, tuple[Callable[[], bytes], np.ndarray]] = {
    "12 bits": (lambda: file_of(RAMP), RAMP),
    "MONOCHROME1": (lambda: file_of(RAMP, PhotometricInterpretation="MONOCHROME1"), -RAMP),
    "signed, sign extended": (lambda: file_of(SIGNED, signed=True), SIGNED),
    "signed, sign not extended": (lambda: file_of(SIGNED & 0xFFF, signed=True), SIGNED),
    "10 bits, signed": (lambda: file_of((RAMP // 4 - 512) & 0x3FF, 10, signed=True), RAMP // 4),
    "8 bits of an odd size": (lambda: file_of((RAMP // 16)[:63, :63], 8, allocated=8), (RAMP // 16)[:63, :63]),
    "32 bits": (lambda: file_of(RAMP * 1_000_000, 32, allocated=32), RAMP),
    "overlay in the high bits": (lambda: file_of(RAMP | (RAMP % 7 == 0) * 0xF000), RAMP),
    "signed, overlay in the high bits": (lambda: file_of((SIGNED & 0xFFF) | (RAMP % 7 == 0) * 0xF000, signed=True), SIGNED),
    "stored in the high bits": (lambda: file_of((RAMP << 4) | (RAMP % 7 == 0) * 0xF, HighBit=15), RAMP),
    "signed, stored in the high bits": (lambda: file_of(SIGNED << 4, signed=True, HighBit=15), SIGNED),
    "window": (lambda: file_of(RAMP, **WINDOW), linear(RAMP, 2000, 1000)),
    "first of two windows": (lambda: file_of(RAMP, WindowCenter=[2000, 9], WindowWidth=[1000, 9]), linear(RAMP, 2000, 1000)),
    "window of MONOCHROME1": (
        lambda: file_of(RAMP, PhotometricInterpretation="MONOCHROME1", **WINDOW), -linear(RAMP, 2000, 1000),
    ),
    "window of one value": (lambda: file_of(RAMP, WindowCenter=2000, WindowWidth=1), RAMP > 1999.5),
    "window without a function": (lambda: file_of(RAMP, VOILUTFunction="", **WINDOW), linear(RAMP, 2000, 1000)),
    "exact window": (
        lambda: file_of(RAMP, VOILUTFunction="LINEAR_EXACT", **WINDOW), np.clip((RAMP - 2000) / 1000 + 0.5, 0, 1),
    ),
    "sigmoid": (lambda: file_of(RAMP, VOILUTFunction="SIGMOID", **WINDOW), 1 / (1 + np.exp(-4 * (RAMP - 2000) / 1000))),
    "steep sigmoid": (
        lambda: file_of(RAMP, VOILUTFunction="SIGMOID", WindowCenter=2000.5, WindowWidth=0.01), RAMP > 2000,
    ),
    "slope": (
        lambda: file_of(RAMP, RescaleSlope=2, RescaleIntercept=-1000, **WINDOW), linear(2 * RAMP - 1000, 2000, 1000),
    ),
    "falling slope": (lambda: file_of(RAMP, RescaleSlope=-1, RescaleIntercept=4095), -RAMP),
    "falling slope and window": (
        lambda: file_of(RAMP, RescaleSlope=-1, RescaleIntercept=4095, **WINDOW), linear(4095 - RAMP, 2000, 1000),
    ),
    "modality LUT of 16 bits": (lambda: file_of(RAMP, ModalityLUTSequence=table(LUT_16, 16)), LUT_16[RAMP]),
    "modality LUT of 12 bits": (lambda: file_of(RAMP, ModalityLUTSequence=table(LUT_12, 12)), LUT_12[RAMP]),
    "modality LUT and window": (
        lambda: file_of(RAMP, ModalityLUTSequence=table(LUT_12, 16), **WINDOW), linear(LUT_12[RAMP], 2000, 1000),
    ),
    "VOI LUT of 16 bits": (lambda: file_of(RAMP, VOILUTSequence=table(LUT_16, 16)), LUT_16[RAMP]),
    "VOI LUT before window": (lambda: file_of(RAMP, VOILUTSequence=table(LUT_12, 12), **WINDOW), LUT_12[RAMP]),
    "first of two VOI LUTs": (
        lambda: file_of(RAMP, VOILUTSequence=pydicom.Sequence([*table(LUT_12, 12), *table(LUT_12[::-1], 12)])), LUT_12[RAMP],
    ),
    "VOI LUT after a slope": (
        lambda: file_of(RAMP // 2, RescaleSlope=2, RescaleIntercept=0, VOILUTSequence=table(LUT_12, 12)), LUT_12[RAMP // 2 * 2],
    ),
    "VOI LUT of 8 bits in words": (lambda: file_of(RAMP, VOILUTSequence=table(LUT_8, 8)), LUT_8[RAMP]),
    "VOI LUT of 8 bits in bytes": (
        lambda: file_of(RAMP, VOILUTSequence=table(LUT_8, 8, vr="OW", words=8)), LUT_8[RAMP],
    ),
    "VOI LUT in OW": (lambda: file_of(RAMP, VOILUTSequence=table(LUT_16, 16, vr="OW")), LUT_16[RAMP]),
    "short VOI LUT": (
        lambda: file_of(RAMP, VOILUTSequence=table(np.arange(256)[::-1], 8, first=1000)), -np.clip(RAMP - 1000, 0, 255),
    ),
    "signed VOI LUT": (lambda: file_of(SIGNED, signed=True, VOILUTSequence=table(LUT_12, 12, first=-2048)), LUT_12[RAMP]),
    "signed VOI LUT, its start as unsigned": (
        lambda: file_of(SIGNED, signed=True, VOILUTSequence=table(LUT_12, 12, first=65536 - 2048)), LUT_12[RAMP],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_stored_values_become_grey_as_the_standard_says(name: str) -> None:
    make, expected = CASES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = np.asarray(decode_dicom(make()), int)
    np.testing.assert_allclose(found, grey(expected), atol=1)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    ("signed", "padding", "fields"),
    [
        (False, 4095, {"PixelPaddingValue": 4095}),
        (False, 0, {"PixelPaddingValue": 0}),
        (False, 65_535, {"PixelPaddingValue": 65_535, "BitsStored": 16, "HighBit": 15}),
        (False, 4010, {"PixelPaddingValue": 4095, "PixelPaddingRangeLimit": 4000}),
        (False, 7, {"PixelPaddingValue": 0, "PixelPaddingRangeLimit": 9}),
        (True, -2048, {"PixelPaddingValue": -2048}),
        (True, -2000, {"PixelPaddingValue": -2048, "PixelPaddingRangeLimit": -1990}),
    ],
)
def test_padding_is_black_and_does_not_count(photometric: str, signed: bool, padding: int, fields: dict) -> None:
    values = RAMP // 4 + 1000
    if signed:
        values -= 1500
    padded = values.copy()
    padded[:10] = padding
    found = np.asarray(
        decode_dicom(file_of(padded, signed=signed, PhotometricInterpretation=photometric, **fields)), int
    )
    assert found[:10].max() == 0
    np.testing.assert_allclose(found[10:], grey(-values[10:] if photometric == "MONOCHROME1" else values[10:]), atol=1)


def test_an_image_of_padding_alone_is_black() -> None:
    assert decode_dicom(file_of(np.full((4, 4), 7), PixelPaddingValue=7)).getextrema() == (0, 0)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"WindowCenter": 2000, "WindowWidth": 0}, "its window is 0 wide"),
        ({"WindowCenter": 2000, "WindowWidth": -5, "VOILUTFunction": "SIGMOID"}, "its window is -5 wide"),
        ({"VOILUTFunction": "CUBIC", **WINDOW}, "its window has an unknown function"),
        ({"VOILUTSequence": table(LUT_12, 12)[:1], "PixelPaddingValue": 0}, None),
    ],
)
def test_windows_that_mean_nothing_are_refused_by_name(fields: dict, reason: str | None) -> None:
    if reason is None:
        item = fields["VOILUTSequence"][0]
        item.LUTData = item.LUTData[:100]
        reason = "its VOI LUT holds 100 entries, and 4096 are said to be there"
        fields = {"VOILUTSequence": pydicom.Sequence([item])}
    with pytest.raises(ValueError, match=reason):
        decode_dicom(file_of(RAMP, **fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"PixelAspectRatio": [2, 1]},
        {"ImagerPixelSpacing": [0.2, 0.1]},
        {"PixelSpacing": [0.2, 0.1], "ImagerPixelSpacing": [1, 1]},
    ],
)
def test_pixels_that_are_not_square_are_made_so_and_boxes_follow(fields: dict) -> None:
    """A pixel is twice as tall as wide, so 60 rows of 80 pixels are 120 of 80."""
    values = np.zeros((60, 80), int)
    values[15:30, 20:60] = 4095
    data = file_of(values, **fields)
    assert decode_dicom(data).size == (80, 120)
    prepared = prepare_image(data, 40, [Box("a", 20, 15, 40, 15)])
    assert (prepared.width, prepared.height) == (40, 60) and prepared.boxes == (Box("a", 10, 15, 20, 15),)
    found = np.asarray(decode_dicom(data))
    rows, columns = np.nonzero(found > 127)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (30, 59, 20, 59)


def test_pixels_that_are_square_but_for_a_rounded_digit_stay_as_they_are() -> None:
    values = np.zeros((60, 80), int)
    for fields in ({"PixelAspectRatio": [1, 1]}, {"ImagerPixelSpacing": [0.1429, 0.143]}, {"PixelSpacing": None}):
        assert decode_dicom(file_of(values, **fields)).size == (80, 60)


@pytest.mark.parametrize(
    ("tag", "fields"),
    [
        (b"\x08\x00\x16\x00UI", {}),
        (b"\x28\x00\x04\x00CS", {}),
        (b"\x28\x00\x50\x10DS", {"WindowCenter": 100, "WindowWidth": 100}),
        (b"\x28\x00\x08\x00IS", {"NumberOfFrames": 1}),
    ],
)
def test_what_a_damaged_header_holds_is_never_told(
    tag: bytes, fields: dict, recwarn: pytest.WarningsRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    """A length that is too large makes the name behind it a part of another field."""
    data = bytearray(file_of(RAMP, StudyDescription="SECRET", **fields))
    place = data.index(tag) + len(tag)
    name = b"\x10\x00\x10\x00PN\x06\x00SECRET"
    length = int.from_bytes(data[place : place + 2], "little")
    data[place + 2 + length : place + 2 + length] = name
    data[place : place + 2] = (length + len(name)).to_bytes(2, "little")
    try:
        decode_dicom(bytes(data))
    except ValueError as error:
        assert "SECRET" not in str(error) and "\n" not in str(error)
    else:
        assert tag.endswith(b"UI"), "the class of an image changes no pixel; the other fields are needed"
    assert not [str(warning.message) for warning in recwarn] and "SECRET" not in caplog.text


@pytest.mark.parametrize("values", [{"HighBit": 15}, {}])
def test_a_dataset_of_the_callers_stays_as_it_was(values: dict) -> None:
    found = pydicom.dcmread(io.BytesIO(file_of(RAMP << 4 if values else RAMP, **values, **WINDOW)))
    before, pixels = found.to_json(), found.pixel_array.copy()
    first = decode_dicom(found)
    np.testing.assert_array_equal(found.pixel_array, pixels)
    np.testing.assert_array_equal(np.asarray(decode_dicom(found)), np.asarray(first))
    assert found.to_json() == before
