"""Reading images of every kind, and the evaluation transform against transformers' image processor."""

import io
import re

import numpy as np
import odd_files
import pytest
import torch
from PIL import Image, ImageFile

from blip_fast.media.images import MEAN, STD, ImageError, evaluation_transform, load_image


def difference(image: Image.Image, expected: Image.Image) -> float:
    """Mean absolute difference, of 255."""
    assert image.mode == "RGB" and image.size == expected.size
    return float(np.abs(np.asarray(image, dtype=np.int64)
                        - np.asarray(expected.convert("RGB"), dtype=np.int64)).mean())


@pytest.mark.parametrize("name", odd_files.good_files())
def test_every_kind_shows_the_picture(name: str, tmp_path) -> None:
    content = odd_files.good_files()[name]
    allowed = 4 if "palette" in name or "gif" in name else 2  # 256 colours; lossy compression
    assert difference(load_image(content), odd_files.picture()) < allowed
    path = tmp_path / name
    path.write_bytes(content)
    assert difference(load_image(path), odd_files.picture()) < allowed
    assert difference(load_image(str(path)), odd_files.picture()) < allowed


@pytest.mark.parametrize("name", odd_files.grey_files())
def test_every_grey_kind_shows_the_grey_picture(name: str) -> None:
    assert difference(load_image(odd_files.grey_files()[name]), odd_files.picture().convert("L")) < 2


@pytest.mark.parametrize("name", odd_files.bad_files())
def test_bad_files_are_refused_by_name(name: str, tmp_path) -> None:
    content = odd_files.bad_files()[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ImageError, match=re.escape(str(path))) as error:
        load_image(path)
    assert "\n" not in str(error.value)
    with pytest.raises(ImageError, match="sample 17"):
        load_image(content, name="sample 17")


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch) -> None:
    content = odd_files.bomb()
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it is decoded"))
    with pytest.raises(ImageError, match="size"):
        load_image(content)
    # Also where a program has switched Pillow's own guard off.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ImageError, match="30000 × 30000 pixels are more than 80,000,000"):
        load_image(content)


def test_other_sources() -> None:
    image = odd_files.picture()
    array = np.asarray(image)
    for source in (image, array, np.dstack([array, array[..., :1]]), image.convert("RGBA")):
        assert difference(load_image(source), image) == 0
    for grey in (array[..., 0], array[..., :1], Image.fromarray(array[..., 0])):
        assert difference(load_image(grey), Image.fromarray(array[..., 0])) == 0
    for bad in (array.astype(np.float32), array[None], array[..., :2], np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ImageError):
            load_image(bad)
    with pytest.raises(ImageError, match="floating-point"):
        load_image(Image.new("F", (4, 4)))
    with pytest.raises(ImageError, match="no such file"):
        load_image("nowhere.jpg")


def test_postscript_is_never_run() -> None:
    stream = io.BytesIO()
    odd_files.picture().save(stream, "EPS")
    with pytest.raises(ImageError, match="known format"):
        load_image(stream.getvalue())


@pytest.mark.parametrize("image_size", [16, 224, 385])
def test_evaluation_transform_equals_transformers(image_size: int, photographs) -> None:
    transformers = pytest.importorskip("transformers")
    images = [load_image(path) for path in photographs.paths[:4]]
    images += [odd_files.picture(7, 300), odd_files.picture(1, 1)]
    processor = transformers.BlipImageProcessor(size={"height": image_size, "width": image_size})
    expected = processor(images, return_tensors="pt")["pixel_values"]
    pixels = evaluation_transform(images, image_size)
    assert pixels.dtype == torch.float32 and pixels.is_contiguous()
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


def test_evaluation_transform_by_hand() -> None:
    pixels = evaluation_transform([Image.new("RGB", (5, 9), (255, 0, 51))], 2)
    expected = [(value - mean) / std for value, mean, std in zip((1, 0, 0.2), MEAN, STD, strict=True)]
    torch.testing.assert_close(pixels, torch.tensor(expected).view(1, 3, 1, 1).expand(1, 3, 2, 2))
    assert evaluation_transform([], 8).shape == (0, 3, 8, 8)
