"""Image and attention grid stay in one geometry; pixels are what the file holds."""

import numpy as np
import pytest
from PIL import Image

from mmclip_dist.config import Augment
from mmclip_dist.data.transforms import (
    PIXEL_DEVIATION,
    PIXEL_MEAN,
    WHOLE,
    Crop,
    crop_grid,
    crop_image,
    random_crop,
)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("shape", [(64, 64), (60, 100), (90, 50)])
def test_image_and_grid_are_cropped_alike(seed: int, shape: tuple[int, int]) -> None:
    """A bright spot and the attention cell above it end at the same place, whatever the crop and the image's shape."""
    random = generator(seed)
    crop = random_crop(random, Augment(crop_area=(0.5, 1.0), flip=0.5))
    row, column = crop.top + 0.3 * (crop.bottom - crop.top), crop.left + 0.3 * (crop.right - crop.left)
    pixels, grid = np.zeros(shape, np.uint8), np.zeros((8, 8), np.float32)
    pixels[int(row * shape[0]), int(column * shape[1])] = 255
    grid[int(row * 8), int(column * 8)] = 1
    image_at = np.unravel_index(crop_image(Image.fromarray(pixels), crop, 64)[0].argmax(), (64, 64))
    grid_at = np.unravel_index(crop_grid(grid, crop, 64).argmax(), (64, 64))
    assert np.abs(np.subtract(image_at, grid_at)).max() <= 64 / 8 / (crop.bottom - crop.top) + 2
    expected = 0.7 if crop.mirrored else 0.3
    assert image_at[1] / 64 == pytest.approx(expected, abs=0.06)
    assert image_at[0] / 64 == pytest.approx(0.3, abs=0.06)


def test_whole_image_is_only_normalised() -> None:
    pixels = generator().integers(0, 256, (32, 32), dtype=np.uint8)
    found = crop_image(Image.fromarray(pixels), WHOLE, 32)
    np.testing.assert_allclose(found[0] * PIXEL_DEVIATION + PIXEL_MEAN, pixels / 255, atol=1e-6)


def test_mirrored_means_left_to_right() -> None:
    pixels = np.zeros((8, 8), np.uint8)
    pixels[:, 0] = 255
    assert crop_image(Image.fromarray(pixels), Crop(mirrored=True), 8)[0][:, -1].min() > 1


def test_crops_stay_inside_and_have_the_asked_area() -> None:
    random = generator()
    for _ in range(200):
        crop = random_crop(random, Augment(crop_area=(0.6, 0.9)))
        assert 0 <= crop.left < crop.right <= 1 + 1e-9 and 0 <= crop.top < crop.bottom <= 1 + 1e-9
        assert 0.55 <= (crop.right - crop.left) * (crop.bottom - crop.top) <= 0.9 + 1e-9
        assert not crop.mirrored  # laterality carries meaning: off by default


def test_crops_lie_everywhere_and_are_mirrored_as_often_as_asked() -> None:
    random, augment = generator(), Augment(crop_area=(0.5, 0.5), flip=0.25)
    crops = [random_crop(random, augment) for _ in range(2000)]
    for low, high in (("left", "right"), ("top", "bottom")):
        room = np.array([1 - getattr(crop, high) + getattr(crop, low) for crop in crops])
        place = np.array([getattr(crop, low) for crop in crops])[room > 0.05] / room[room > 0.05]
        assert place.min() < 0.02 and place.max() > 0.98 and place.mean() == pytest.approx(0.5, abs=0.03)
    aspects = np.array([(crop.right - crop.left) / (crop.bottom - crop.top) for crop in crops])
    assert 0.8 < aspects.min() < 0.88 and 1.13 < aspects.max() < 1.25  # (4/3) to the half that is cut away
    assert np.mean([crop.mirrored for crop in crops]) == pytest.approx(0.25, abs=0.04)
