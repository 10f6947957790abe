"""Every kind of image a data set may hold, to 8-bit single channel."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from mmclip_shards.images import PreparedImage, decode_image, prepare_image, rescale_to_8_bit
from mmclip_shards.schema import Box
from PIL import Image, PngImagePlugin


def encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def pixels(prepared: PreparedImage) -> np.ndarray:
    with Image.open(io.BytesIO(prepared.data)) as image:
        assert image.mode == "L"
        assert image.size == (prepared.width, prepared.height)
        assert image.format == {"png": "PNG", "jpg": "JPEG"}[prepared.suffix]
        return np.asarray(image)


RAMP16 = np.linspace(1000, 60_000, 40 * 30).reshape(40, 30).astype(np.uint16)


def test_a_16_bit_png_is_rescaled_and_not_clipped_to_white() -> None:
    data = encode(Image.fromarray(RAMP16))
    with Image.open(io.BytesIO(data)) as image:
        assert image.mode.startswith("I")
        assert np.asarray(image.convert("L")).min() == 255, "the trap is gone from Pillow: this test can go"
    prepared = prepare_image(data, 512)
    out = pixels(prepared).astype(int)
    assert prepared.suffix == "png"
    assert (out.min(), out.max()) == (0, 255)
    expected = (RAMP16.astype(float) - 1000) / 59_000 * 255
    assert np.abs(out - expected).max() <= 0.51


@pytest.mark.parametrize("array", [RAMP16, RAMP16.astype(np.int32) - 20_000, RAMP16.astype(np.float32) / 7])
def test_deep_arrays_are_rescaled_alike(array: np.ndarray) -> None:
    np.testing.assert_allclose(pixels(prepare_image(array, 512)).astype(int), rescale_to_8_bit(RAMP16), atol=1)


def test_8_bit_values_are_kept_as_they_are() -> None:
    array = np.arange(50, 150, dtype=np.uint8).reshape(10, 10)
    for image in (array, encode(Image.fromarray(array))):
        prepared = prepare_image(image, 512)
        assert (prepared.suffix, prepared.width, prepared.height) == ("png", 10, 10)
        np.testing.assert_array_equal(pixels(prepared), array)


def test_a_constant_deep_image_is_black() -> None:
    assert pixels(prepare_image(np.full((4, 4), 4095, np.uint16), 512)).max() == 0


def test_colour_becomes_luma_and_transparency_black() -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    assert pixels(prepare_image(encode(red), 512)).max() == 76
    assert abs(int(pixels(prepare_image(encode(red, "JPEG"), 512)).max()) - 76) <= 2
    clear = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    assert pixels(prepare_image(encode(clear), 512)).max() == 0
    half = Image.new("LA", (8, 8), (200, 128))
    assert pixels(prepare_image(encode(half), 512)).max() == pytest.approx(100, abs=1)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert pixels(prepare_image(encode(palette), 512)).max() == 76
    assert pixels(prepare_image(encode(Image.new("1", (8, 8), 1)), 512)).min() == 255
    assert pixels(prepare_image(encode(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"), 512)).min() >= 253


def turned_jpeg() -> bytes:
    """A bright left edge that EXIF orientation 6 turns to the top."""
    array = np.zeros((20, 40), np.uint8)
    array[:, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(Image.fromarray(array), "JPEG", exif=exif, quality=95)


def clear_palette() -> bytes:
    """Red, blue and a transparent yellow in stripes."""
    image = Image.fromarray(np.repeat(np.arange(3, dtype=np.uint8), 8)[None].repeat(16, axis=0), "P")
    image.putpalette([255, 0, 0, 0, 0, 255, 255, 255, 0])
    return encode(image, transparency=2)


def half_clear(mode: str) -> bytes:
    image = Image.new(mode, (16, 16), 200 if mode == "LA" else (200, 200, 200))
    image.putalpha(Image.fromarray(np.repeat(np.array([[0, 255]], np.uint8), 8, axis=1).repeat(16, axis=0)))
    return encode(image)


AWKWARD = {
    # name: (file, the middle row or column of the picture at its two ends)
    "orientation 6": (turned_jpeg(), (20, 40), (255, 0)),
    "grey with alpha": (half_clear("LA"), (16, 16), (0, 200)),
    "colour with alpha": (half_clear("RGBA"), (16, 16), (0, 200)),
    "palette with transparency": (clear_palette(), (24, 16), (76, 0)),
    "16 bit": (encode(Image.fromarray(RAMP16)), (30, 40), (0, 255)),
    "colour": (encode(Image.new("RGB", (16, 16), (255, 0, 0))), (16, 16), (76, 76)),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_packing_stores_the_picture_that_the_decoder_gives(name: str, tmp_path: Path) -> None:
    """What is trained on may be packed or, in a foreign set, the original file: both must show the same."""
    data, size, ends = AWKWARD[name]
    image = decode_image(data)
    assert (image.mode, image.size) == ("L", size)
    found = np.asarray(image).astype(int)
    tolerance = 6 if name == "orientation 6" else 0
    assert abs(found[0, 0] - ends[0]) <= tolerance and abs(found[-1, -1] - ends[1]) <= tolerance
    (tmp_path / "file").write_bytes(data)
    np.testing.assert_array_equal(np.asarray(decode_image(tmp_path / "file")), found)
    packed = prepare_image(data, 512)
    again = np.asarray(decode_image(packed.data)).astype(int)
    assert np.abs(again - found).max() <= tolerance, "only a JPEG, compressed again, may differ"


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_plain_grey_image_is_decoded_to_its_own_pixels(form: str) -> None:
    array = np.random.default_rng(3).integers(0, 255, (48, 64), np.uint8)
    data = encode(Image.fromarray(array), form)
    with Image.open(io.BytesIO(data)) as plain:
        expected = np.asarray(plain)
    np.testing.assert_array_equal(np.asarray(decode_image(data)), expected)
    if form == "PNG":
        np.testing.assert_array_equal(expected, array)


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_decoded_image_that_is_saved_holds_no_metadata(form: str) -> None:
    exif = Image.Exif()
    exif[0x010E] = "SECRET"
    options = {"JPEG": {"comment": b"SECRET"}, "PNG": {"icc_profile": b"SECRET"}}[form]
    image = decode_image(encode(Image.new("L", (8, 8), 9), form, exif=exif, **options))
    for saved in ("JPEG", "PNG"):
        written = encode(image, saved)
        assert b"SECRET" not in written and b"iCCP" not in written and b"Exif" not in written


def test_exif_orientation_is_applied_with_the_boxes_upright() -> None:
    prepared = prepare_image(turned_jpeg(), 10, [Box("a", 2, 4, 6, 8)])
    assert (prepared.width, prepared.height) == (10, 20)
    assert pixels(prepared)[:3].min() > 200 and pixels(prepared)[6:].max() < 60
    assert prepared.boxes == (Box("a", 1, 2, 3, 4),)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1000, 800), (640, 512)), ((800, 1000), (512, 640)), ((512, 900), (512, 900)), ((30, 20), (30, 20))],
)
def test_the_short_side_is_reduced_and_never_enlarged(size: tuple[int, int], expected: tuple[int, int]) -> None:
    for form in ("JPEG", "PNG"):
        prepared = prepare_image(encode(Image.new("L", size, 90), form), 512)
        assert (prepared.width, prepared.height) == expected
        assert abs(int(pixels(prepared).mean()) - 90) <= 1


def test_boxes_follow_the_image() -> None:
    prepared = prepare_image(np.zeros((1024, 2048), np.uint8), 512, [Box("Mass", 100, 200, 50, 20)])
    assert prepared.boxes == (Box("Mass", 50, 100, 25, 10),)


def test_output_is_deterministic_and_holds_no_metadata() -> None:
    array = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    secret = PngImagePlugin.PngInfo()
    secret.add_text("Patient", "SECRET")
    exif = Image.Exif()
    exif[0x010E] = "SECRET"
    for data in (
        encode(Image.fromarray(array), pnginfo=secret, icc_profile=b"SECRET"),
        encode(Image.fromarray(array), "JPEG", exif=exif, comment=b"SECRET", icc_profile=b"SECRET"),
    ):
        assert b"SECRET" in data or b"SECRET" in zlib.decompress(data[data.index(b"iCCP") + 17 :])
        first = prepare_image(data, 32)
        assert b"SECRET" not in first.data and b"iCCP" not in first.data and b"tEXt" not in first.data
        assert prepare_image(data, 32) == first


def png_of_size(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_001, 10_000), (60_000, 60_000)])
def test_decompression_bombs_are_refused_by_their_header(size: tuple[int, int]) -> None:
    for use in (decode_image, lambda data: prepare_image(data, 512)):
        with pytest.raises(ValueError, match="pixels"):
            use(png_of_size(*size))


def test_unreadable_files_are_errors_that_name_the_file(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300), np.uint8))
    whole = {"jpg": encode(noise, "JPEG"), "png": encode(noise)}
    broken = {
        "empty.jpg": b"",
        "text.png": b"<html>403</html>",
        "cut.jpg": whole["jpg"][: len(whole["jpg"]) // 2],
        "cut.png": whole["png"][: len(whole["png"]) // 2],
        "flipped.png": whole["png"][:5000] + bytes(9) + whole["png"][5009:],
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "bitmap.png": encode(noise, "BMP"),
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name} is not a usable JPEG or PNG"):
            prepare_image(tmp_path / name, 512)
        with pytest.raises(ValueError, match="image data is not a usable JPEG or PNG"):
            decode_image(data)
    with pytest.raises(ValueError, match=r"gone\.png"):
        prepare_image(tmp_path / "gone.png", 512)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((0, 4), np.uint8),
        np.zeros((4, 4), complex),
        np.full((4, 4), np.nan),
        np.array([[0.0, np.inf]]),
        np.broadcast_to(np.uint8(0), (10_001, 10_000)),
    ],
)
def test_arrays_that_are_no_image_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="image data"):
        prepare_image(array, 512)


def test_short_side_must_be_positive() -> None:
    with pytest.raises(ValueError, match="short_side"):
        prepare_image(np.zeros((4, 4), np.uint8), 0)
