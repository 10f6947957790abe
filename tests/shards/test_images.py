"""Every kind of image a data set may hold, to 8-bit single channel."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from mmclip_shards.clahe import equalise
from mmclip_shards.grey import rescale_to_8_bit
from mmclip_shards.images import Format, PreparedImage, Rendering, decode_image, prepare_image
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


@pytest.mark.parametrize("size", [(64, 91), (65, 30), (131, 66), (30, 67), (513, 1000)])
def test_a_reduction_is_pillows_own_filter_to_the_bit(size: tuple[int, int]) -> None:
    array = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    for short_side in (1, 7, 29):
        prepared = prepare_image(array, short_side)
        wanted = Image.fromarray(array).resize((prepared.width, prepared.height), Image.Resampling.LANCZOS)
        np.testing.assert_array_equal(pixels(prepared), np.asarray(wanted))


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
        with pytest.raises(ValueError, match=rf"{name} is not a usable JPEG, PNG or WebP"):
            prepare_image(tmp_path / name, 512)
        with pytest.raises(ValueError, match="image data is not a usable JPEG, PNG or WebP"):
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


def waves(width: int, height: int, noise: float = 6.0) -> np.ndarray:
    """Slow and fast changes, and noise, as a radiograph has them."""
    y, x = np.mgrid[0:height, 0:width]
    values = 110 + 60 * np.sin(x / 31) + 40 * np.cos(y / 43) + 12 * np.sin(x / 3 + y / 5)
    return np.clip(values + np.random.default_rng(1).normal(0, noise, values.shape), 0, 255).astype(np.uint8)


def test_formats_hold_the_same_pixels_and_quality_is_that_of_jpeg() -> None:
    array = waves(90, 70)
    names = get_args(Format)
    made = {name: prepare_image(array, 64, rendering=Rendering(format=name)) for name in names}
    assert [each.suffix for each in made.values()] == ["png", "jpg", "png", "webp"]
    found = {name: np.asarray(decode_image(each.data)).astype(int) for name, each in made.items()}
    assert made["source"] == made["png"]
    np.testing.assert_array_equal(found["webp-lossless"], found["png"])
    assert 0 < np.abs(found["jpg"] - found["png"]).mean() < 3
    coarse = prepare_image(array, 64, rendering=Rendering(format="jpg", quality=40))
    assert len(coarse.data) < len(made["jpg"].data) / 2
    of_jpeg = encode(Image.fromarray(array), "JPEG")
    assert prepare_image(of_jpeg, 64).suffix == "jpg"
    lossless = prepare_image(of_jpeg, 64, rendering=Rendering(format="png"))
    assert (lossless.suffix, lossless.width, lossless.height) == ("png", 82, 64)


def test_a_window_of_percentiles_is_of_the_images_own_values() -> None:
    deep = np.linspace(0, 4000, 10_000).reshape(100, 100).astype(np.uint16)
    deep[0, 0], deep[-1, -1] = 0, 65_535  # one bright pixel would leave the rest black
    assert pixels(prepare_image(deep, 512)).mean() < 10
    found = pixels(prepare_image(deep, 512, rendering=Rendering(window=(1, 99)))).astype(int)
    expected = np.clip((deep.astype(float) - 40) / (3960 - 40), 0, 1) * 255
    assert np.abs(found - expected).max() <= 2
    grey = np.linspace(50, 150, 10_000).reshape(100, 100).astype(np.uint8)
    for data in (grey, encode(Image.fromarray(grey)), encode(Image.fromarray(grey).convert("RGB"))):
        found = pixels(prepare_image(data, 512, rendering=Rendering(window=(0, 100))))
        assert (found.min(), found.max()) == (0, 255)
    half_black = np.zeros((10, 10), np.uint8)
    half_black[0, 0] = 9
    with pytest.raises(ValueError, match="percentiles 1 and 90 are equal: choose a wider window"):
        prepare_image(half_black, 512, rendering=Rendering(window=(1, 90)))


@pytest.mark.parametrize(
    ("size", "digest"),
    # of the bytes that OpenCV 5.0's createCLAHE(2.0, (8, 8)) gives
    [((128, 96), "374af824a91a599a"), ((91, 37), "e32cb5866c951fe1"), ((128, 91), "18e515ffecfad69e")],
)
def test_clahe_is_opencvs(size: tuple[int, int], digest: str) -> None:
    x, y = np.arange(size[0]), np.arange(size[1])[:, None]
    array = ((x * x + 3 * y * y + x * y // 7) // 16 % 256).astype(np.uint8)
    assert hashlib.sha256(equalise(array).tobytes()).hexdigest()[:16] == digest


def test_clahe_is_applied_to_the_reduced_image() -> None:
    array = waves(200, 160)
    plain = prepare_image(array, 80)
    np.testing.assert_array_equal(pixels(prepare_image(array, 80, rendering=Rendering(clahe=True))), equalise(pixels(plain)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "gif"}, "format 'gif' is unknown; it must be one of source, jpg, png, webp-lossless"),
        ({"quality": 0}, "quality is 0"),
        ({"window": (99, 1)}, "two rising percentiles"),
        ({"window": (0, 101)}, "two rising percentiles"),
    ],
)
def test_what_no_image_can_be_made_by_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rendering(**fields)


def test_an_image_that_is_too_long_for_webp_is_refused_by_name(tmp_path: Path) -> None:
    Image.new("L", (16_400, 2)).save(tmp_path / "long.png")
    with pytest.raises(ValueError, match=r"long\.png is 16400 pixels long, and WebP ends at 16,383"):
        prepare_image(tmp_path / "long.png", 2, rendering=Rendering(format="webp-lossless"))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((one.astype(float) - other) ** 2))


@pytest.mark.parametrize("size", [(480, 640), (515, 643)])  # even and uneven halves
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_big_jpeg_is_decoded_coarsely_and_looks_as_if_it_was_not(size: tuple[int, int], mode: str) -> None:
    data = encode(Image.fromarray(waves(*size)).convert(mode), "JPEG", quality=95)
    exact = Rendering(format="png")
    found = prepare_image(data, 100, [Box("a", 48, 64, 96, 128)], exact)
    whole = decode_image(data)
    assert whole.size == size
    width, height = (round(side * 100 / min(size)) for side in size)
    assert (found.width, found.height) == (width, height)
    expected = np.asarray(whole.resize((width, height), Image.Resampling.LANCZOS))
    assert not np.array_equal(pixels(found), expected), "it was decoded whole"
    assert psnr(pixels(found), expected) > 48
    across, down = width / size[0], height / size[1]
    assert found.boxes == (Box("a", 48 * across, 64 * down, 96 * across, 128 * down),)


def test_a_jpeg_is_decoded_whole_where_half_would_not_be_twice_the_target_or_it_is_turned() -> None:
    array = waves(480, 640)
    plain = encode(Image.fromarray(array), "JPEG", quality=95)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(Image.fromarray(array), "JPEG", quality=95, exif=exif)
    for data, short_side in ((plain, 121), (turned, 100)):
        whole = decode_image(data)
        size = tuple(round(side * short_side / 480) for side in whole.size)
        expected = np.asarray(whole.resize(size, Image.Resampling.LANCZOS))
        np.testing.assert_array_equal(pixels(prepare_image(data, short_side, rendering=Rendering(format="png"))), expected)
