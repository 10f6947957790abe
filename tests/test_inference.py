"""The Python interface: the same numbers as evaluation, the decoder of packing, and errors in one line."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmclip_shards import decode_image, load_manifest
from mmclip_shards.dicom import decode_dicom
from mmclip_shards.images import Rendering, prepare_image
from PIL import Image

from mmclip_dist import (
    MMCLIPModel,
    class_directions,
    crop_image,
    load_model,
    load_prompts,
    resolve_checkpoint,
    tokenize_prompts,
)
from mmclip_dist.data.transforms import WHOLE
from mmclip_dist.export.remote_code.image_processing_mmclip import MMCLIPImageProcessor
from mmclip_dist.inference import decoded
from mmclip_dist.model.mmclip import MMCLIP

README = Path(__file__).resolve().parents[1] / "README.md"


@pytest.fixture(scope="module")
def run(untrained: Path) -> Path:
    return untrained


@pytest.fixture(scope="module")
def model(run: Path) -> MMCLIPModel:
    return MMCLIPModel.from_pretrained(run, device="cpu")


@pytest.fixture(scope="module")
def trained(run: Path) -> MMCLIP:
    """The model as it was trained."""
    return load_model(resolve_checkpoint(str(run)))[0]


def picture(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


def png(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_every_form_of_an_image_is_the_same_image(model: MMCLIPModel, tmp_path: Path) -> None:
    """File, bytes, Pillow, array and tensor, and the deep, transparent, coloured and rotated variants of one picture."""
    grey = Image.fromarray(picture())
    grey.putpixel((0, 0), 0)
    grey.putpixel((1, 0), 255)  # its whole range, so that rescaling 16 bits gives it back
    values = np.asarray(grey)
    (tmp_path / "x.png").write_bytes(png(grey))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be rotated by 90 degrees clockwise
    rotated = png(grey.transpose(Image.Transpose.ROTATE_90), exif=turned)
    forms = [
        tmp_path / "x.png", str(tmp_path / "x.png"), png(grey), grey, values, values.astype(np.uint16) * 257,
        torch.from_numpy(crop_image(grey, WHOLE, model.size)), grey.convert("RGB"), grey.convert("RGBA"), grey.convert("P"),
        Image.fromarray(values.astype(np.uint16) * 257), rotated, Image.open(io.BytesIO(rotated)),
    ]  # fmt: skip
    embedded = model.encode_image(forms)
    assert embedded.shape == (13, 16) and embedded.dtype == torch.float32
    torch.testing.assert_close(embedded, embedded[:1].expand(13, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(embedded.norm(dim=1), torch.ones(13))
    other = model.encode_image(picture(seed=1))
    assert other.shape == (1, 16) and not torch.allclose(other[0], embedded[0], atol=1e-4)


def test_a_pillow_image_is_not_changed() -> None:
    turned = Image.Exif()
    turned[0x0112] = 6
    image = Image.open(io.BytesIO(png(Image.fromarray(picture()), exif=turned)))
    assert decode_image(image).size == (40, 60)
    assert image.size == (60, 40) and "exif" in image.info


def test_many_rows_are_those_of_single_ones(model: MMCLIPModel) -> None:
    """More than one batch of images and texts, in order, and a tensor of images; padding changes nothing."""
    pixels = torch.randn(35, 1, model.size, model.size, generator=torch.Generator().manual_seed(1))
    texts = [" ".join(["effusion"] * (1 + n % 9)) for n in range(35)]
    images, words = model.encode_image(pixels), model.encode_text(texts)
    for row in (0, 31, 32, 34):
        torch.testing.assert_close(images[row : row + 1], model.encode_image(pixels[row]), rtol=0, atol=1e-5)
        torch.testing.assert_close(words[row : row + 1], model.encode_text(texts[row]), rtol=0, atol=1e-5)
    assert model.encode_image([]).shape == model.encode_text([]).shape == (0, 16)


def test_zero_shot_is_that_of_evaluation(model: MMCLIPModel, trained: MMCLIP, sets) -> None:
    prompts = load_prompts(load_manifest(sets.test).labels)
    count, images = len(prompts.diseases), [picture(seed=seed) for seed in range(3)]
    with torch.no_grad():
        directions = class_directions(trained, *tokenize_prompts(prompts, model.tokenizer, model.max_tokens))
    kinds = [
        {name: [texts[column + start] for texts in prompts.texts] for column, name in enumerate(prompts.diseases)}
        for start in (0, count)
    ]
    found = model.zero_shot(images, kinds[0], dict(reversed(kinds[1].items())))
    assert found.classes == prompts.diseases
    torch.testing.assert_close(found.scores, model.encode_image(images) @ directions.T, rtol=0, atol=1e-5)
    assert found.probabilities is not None
    stated, denied = model.zero_shot(images, kinds[0]), model.zero_shot(images, kinds[1])
    assert stated.probabilities is None
    scale = trained.scale().detach()
    two = torch.stack([stated.scores, denied.scores]).mul(scale).softmax(0)[0]
    torch.testing.assert_close(found.probabilities, two, rtol=0, atol=1e-5)


def test_the_attention_map_is_the_models(model: MMCLIPModel, trained: MMCLIP) -> None:
    """Against the scores of the patches by the words, special tokens apart, in the grid's order."""
    grid = model.attention_map(picture(), "pleural effusion")
    side = trained.config.model.image.grid
    assert grid.shape == (side, side)
    full = model.attention_map(picture(), "pleural effusion", full_size=True)
    assert full.shape == (40, 60) and full.min() >= grid.min() - 1e-6 and full.max() <= grid.max() + 1e-6
    pixels = torch.from_numpy(crop_image(decode_image(picture()), WHOLE, model.size))[None]
    tokens = torch.tensor([model.tokenizer("pleural effusion")["input_ids"]])
    every = torch.ones_like(tokens, dtype=torch.bool)
    words = every.clone()
    words[:, [0, -1]] = False
    with torch.no_grad():
        seen = trained.image.encode(trained.image.embed(pixels))
        expected = trained.score_patches(seen, trained.text(tokens, every), words)
    torch.testing.assert_close(grid.flatten(), expected[0], rtol=0, atol=1e-6)


def odd_images() -> dict[str, Any]:
    """Files and arrays that have been decoded in two ways somewhere: name -> image."""
    deep = np.linspace(900, 60_000, 40 * 60).reshape(40, 60)
    grey = Image.fromarray(picture())
    exif = Image.Exif()
    exif[0x0112] = 8
    palette = grey.convert("RGB").quantize(9)
    clear = grey.copy()
    clear.putalpha(Image.fromarray(picture()[::-1]))
    found: dict[str, Any] = {
        "orientation": encoded(grey, "JPEG", exif=exif), "colour": encoded(grey.convert("RGB"), "JPEG"),
        "cmyk": encoded(grey.convert("CMYK"), "JPEG"), "alpha": encoded(clear, "PNG"),
        "colour with alpha": encoded(clear.convert("RGBA"), "PNG"), "palette": encoded(palette, "PNG"),
        "clear palette": encoded(palette, "PNG", transparency=3), "one bit": encoded(grey.convert("1"), "PNG"),
        "16 bit": encoded(Image.fromarray(deep.astype(np.uint16)), "PNG"), "webp": encoded(grey, "WEBP", lossless=True),
    }  # fmt: skip
    return found | {name: deep.astype(name) for name in ("uint16", "int32", "int64", "uint32", "float32", "float64")}


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("name", odd_images())
def test_packing_training_evaluation_and_export_see_one_picture(name: str, tmp_path: Path) -> None:
    image = odd_images()[name]
    if isinstance(image, bytes):
        (tmp_path / "image").write_bytes(image)
        image = tmp_path / "image"
    packed = prepare_image(image, 512, rendering=Rendering(format="png")).data
    trained = crop_image(decode_image(packed), WHOLE, 32)
    assert trained.min() < trained.max()
    np.testing.assert_array_equal(crop_image(decoded(image), WHOLE, 32), trained)
    np.testing.assert_array_equal(MMCLIPImageProcessor(size=32)(image, return_tensors="np")["pixel_values"][0], trained)


@pytest.mark.parametrize(
    ("present", "absent", "message"),
    [
        ({}, None, "no class to score"),
        ({"Edema": []}, None, "'Edema' needs a list of at least one prompt"),
        ({"Edema": "There is edema."}, None, "'Edema' needs a list of at least one prompt"),
        ({"Edema": ["edema " * 99]}, None, "a prompt of 'Edema' has .* tokens, the model reads 48: shorten it"),
        ({"Edema": ["edema"]}, {"Mass": ["no mass"]}, r"differ in \['Edema', 'Mass'\]"),
    ],
)
def test_prompts_that_cannot_be_used(model: MMCLIPModel, present, absent, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.zero_shot(picture(), present, absent)


def test_images_that_cannot_be_used(model: MMCLIPModel, tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(png(Image.fromarray(picture()))[:200])
    torn = Image.open(tmp_path / "torn.png")
    for image, message in (
        (tmp_path / "none.png", "none.png is not a usable JPEG, PNG or WebP: No such file"),
        (str(tmp_path / "torn.png"), "torn.png is not a usable JPEG, PNG or WebP"),
        (torn, "the Pillow image cannot be used"),
        (b"text", "image data is not a usable JPEG, PNG or WebP: it has another format"),
        (np.zeros((4, 4, 3), np.uint8), r"shape \(4, 4, 3\); a single-channel image"),
        (torch.zeros(1, 5, 5), r"shape \[1, 5, 5\]; the model takes \[1, 32, 32\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode_image(image)
    with pytest.raises(ValueError, match="has no word to look for"):
        model.attention_map(picture(), " ")
    with pytest.raises(ValueError, match="no checkpoint at"):
        MMCLIPModel.from_pretrained(tmp_path)


def test_the_example_of_the_readme_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    code = README.read_text().split("## From Python")[1].split("```python\n")[1].split("```")[0]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "train").symlink_to(run)
    (tmp_path / "chest.png").write_bytes(png(Image.fromarray(picture())))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    assert tuple(names["heat"].shape) == (40, 60)  # type: ignore[attr-defined]
    assert "('Effusion',)" in capsys.readouterr().out


# -- DICOM ------------------------------------------------------------------------------------------------------------


RAMP = np.random.default_rng(0).integers(0, 4096, (30, 50)).astype(np.uint16)


def dicom(values: np.ndarray, **fields: object):
    pydicom = pytest.importorskip("pydicom", reason='DICOM is not tested: pip install "mmclip-dist[dicom]"')
    found = pydicom.Dataset()
    found.file_meta = pydicom.dataset.FileMetaDataset()
    found.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    found.file_meta.MediaStorageSOPClassUID = pydicom.uid.DigitalXRayImageStorageForPresentation
    found.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    found.Rows, found.Columns = values.shape
    found.SamplesPerPixel, found.PhotometricInterpretation = 1, "MONOCHROME2"
    found.BitsAllocated, found.BitsStored, found.HighBit, found.PixelRepresentation = 16, 12, 11, 0
    found.PixelData = values.tobytes()
    for name, value in fields.items():
        setattr(found, name, value)
    return found


def test_dicom_is_read_as_its_pixels(model: MMCLIPModel, tmp_path: Path) -> None:
    plain, inverted = dicom(RAMP), dicom(4095 - RAMP, PhotometricInterpretation="MONOCHROME1")
    plain.save_as(tmp_path / "a.dcm", enforce_file_format=True)
    scaled = dicom(RAMP, RescaleSlope="2", RescaleIntercept="-100", RescaleType="US")
    images = [plain, tmp_path / "a.dcm", (tmp_path / "a.dcm").read_bytes(), inverted, scaled]
    assert torch.equal(model.encode_image(images), model.encode_image([RAMP] * 5))


def test_a_window_of_dicom_is_applied(model: MMCLIPModel) -> None:
    windowed = dicom(RAMP, WindowCenter="1000", WindowWidth="500")
    expected = decode_image(np.clip(RAMP.astype(float), 750, 1250))
    np.testing.assert_allclose(np.asarray(decode_dicom(windowed), int), np.asarray(expected, int), atol=2)
    assert model.encode_image(windowed).shape == (1, 16)


def test_colour_frames_and_damage_in_dicom_are_one_line(model: MMCLIPModel) -> None:
    for bad, says in (
        (3, "int is no image"),
        (dicom(RAMP, SamplesPerPixel=3), "one grey frame is needed"),
        (dicom(RAMP, NumberOfFrames="2"), "one grey frame is needed"),
        (dicom(RAMP, Rows=60_000, Columns=60_000), "60000 x 60000 pixels are more than"),
        (dicom(RAMP, PixelData=b"12"), "not a usable DICOM radiograph"),
        (b"\0" * 128 + b"DICM", "not a usable DICOM radiograph"),
    ):
        with pytest.raises(ValueError, match=says) as found:
            model.encode_image(bad)
        assert "\n" not in str(found.value)


def test_without_pydicom_the_error_says_what_to_install(model: MMCLIPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ValueError, match=re.escape('pip install "mmclip-dist[dicom]"')):
        model.encode_image(b"\0" * 128 + b"DICM")
