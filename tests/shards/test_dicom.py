"""The real files that pydicom brings with it: grey images are decoded, and all else is refused by what it is."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
from mmclip_shards.dicom import decode_dicom, is_dicom
from mmclip_shards.images import Rendering, prepare_image

pydicom = pytest.importorskip("pydicom", reason='DICOM is not tested: pip install "mmclip-dist[dicom]"')
BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"


@pytest.mark.parametrize(
    "name",
    ["CT_small.dcm", "MR_small_RLE.dcm", "MR_small_bigendian.dcm", "JPEG2000.dcm", "image_dfl.dcm", "J2K_pixelrep_mismatch.dcm"],
)
def test_a_real_grey_image_is_decoded(name: str) -> None:
    found = pydicom.dcmread(BUNDLED / name)
    image = decode_dicom(BUNDLED / name)
    assert (image.mode, image.size, image.getextrema()) == ("L", (found.Columns, found.Rows), (0, 255))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rtplan.dcm", r"it holds no pixels \(RT Plan Storage\)"),
        ("dicomdirtests/DICOMDIR", r"it holds no pixels \(no class\)"),
        ("rtdose_1frame.dcm", r"its pixels are no picture \(RT Dose Storage\)"),
        ("liver_1frame.dcm", r"its pixels are no picture \(Segmentation Storage\)"),
        ("rtdose.dcm", r"it holds 15 frames \(RT Dose Storage\); one grey frame is needed"),
        ("examples_palette.dcm", r"it holds colours \(PALETTE COLOR\); one grey frame is needed"),
        ("SC_rgb_rle.dcm", r"it holds colours \(RGB\); one grey frame is needed"),
        ("MR_truncated.dcm", "The number of bytes of pixel data is less than expected"),
    ],
)
def test_what_is_no_grey_image_is_refused_by_what_it_is(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(str(BUNDLED / name))} is not a usable DICOM radiograph: {reason}"):
        decode_dicom(BUNDLED / name)


@pytest.mark.parametrize(
    ("syntax", "plugin"),
    [
        (pydicom.uid.JPEGExtended12Bit, "pylibjpeg pylibjpeg-libjpeg"),
        (pydicom.uid.JPEGLosslessSV1, "pylibjpeg pylibjpeg-libjpeg"),
        (pydicom.uid.JPEGLSLossless, "pyjpegls"),
        (pydicom.uid.HTJ2KLossless, "pylibjpeg pylibjpeg-openjpeg"),
    ],
)
def test_a_compression_without_a_decoder_names_the_plugin(syntax: str, plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = pydicom.dcmread(BUNDLED / "MR_small_jpeg_ls_lossless.dcm")
    found.file_meta.TransferSyntaxUID = syntax
    monkeypatch.setattr(pydicom.pixels.get_decoder(syntax), "_available", {})  # as if none was installed
    with pytest.raises(ValueError, match=rf"no installed plugin decodes .* \({syntax}\): pip install {plugin}; if") as error:
        decode_dicom(found)
    assert "\n" not in str(error.value)


def test_a_compression_that_no_plugin_decodes_is_named() -> None:
    found = pydicom.dcmread(BUNDLED / "MR_small_jpeg_ls_lossless.dcm")
    found.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML
    with pytest.raises(ValueError, match=r"MPEG2"):
        decode_dicom(found)


def test_a_window_of_percentiles_is_of_the_dicoms_values() -> None:
    values = pydicom.dcmread(BUNDLED / "CT_small.dcm").pixel_array
    image = prepare_image(BUNDLED / "CT_small.dcm", 512, rendering=Rendering(window=(5, 95)))
    low, high = np.percentile(values, (5, 95))
    expected = np.rint(np.clip((values - low) / (high - low), 0, 1) * 255)
    found = np.asarray(decode_dicom(BUNDLED / "CT_small.dcm", (5, 95)))
    np.testing.assert_allclose(found, expected, atol=1)
    assert image.suffix == "png"


@pytest.mark.slow
def test_every_file_is_a_picture_or_refused_in_one_line() -> None:
    decoded, refused = 0, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file in filter(is_dicom, (path for path in BUNDLED.rglob("*") if path.is_file())):
            try:
                assert decode_dicom(file).mode == "L"
                decoded += 1
            except ValueError as error:
                assert "\n" not in str(error)
                refused += 1
    assert decoded >= 39 and refused >= 100
