"""Embedders give unit vectors that depend on the picture alone, and refuse what they cannot do."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from curation.backbone import build
from curation.embedders import EmbedderConfig, load_embedder
from curation.errors import DeviceError, WeightsError
from curation.sscd import Sscd


def pictures(count: int) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    small = [Image.fromarray(generator.integers(0, 256, (6, 8, 3), np.uint8)) for _ in range(count)]
    return [image.resize((300, 200), Image.Resampling.BICUBIC) for image in small]


def embed(config: EmbedderConfig, images: list[Image.Image]) -> np.ndarray:
    embedder = load_embedder(config)
    vectors = embedder.embed(np.stack([embedder.preprocess(image) for image in images]))
    assert vectors.shape == (len(images), embedder.dimensions) and vectors.dtype == np.float32
    return vectors


@pytest.fixture(scope="module")
def vit_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save(build("vit_tiny", patch_size=16, image_size=32).state_dict(), path)
    return str(path)


@pytest.mark.parametrize(("pooling", "dimensions"), [("average", 1280), ("gem", 1280)])
def test_efficientnet_reads_pictures(pooling: Any, dimensions: int) -> None:
    images = pictures(5)
    vectors = embed(EmbedderConfig(name="efficientnet_lite0", pooling=pooling, image_size=64), images)
    assert vectors.shape == (5, dimensions)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    brighter = [image.point(lambda value: min(255, int(value * 1.05))) for image in images]
    like = vectors @ embed(EmbedderConfig(name="efficientnet_lite0", pooling=pooling, image_size=64), brighter).T
    assert (like.argmax(1) == np.arange(5)).all()


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_vectors_do_not_depend_on_the_batch(batch_size: int) -> None:
    images = pictures(7)
    one = embed(EmbedderConfig(name="efficientnet_lite0", pooling="gem", image_size=64, batch_size=4), images)
    other = embed(
        EmbedderConfig(name="efficientnet_lite0", pooling="gem", image_size=64, batch_size=batch_size), images
    )
    assert np.abs(one - other).max() < 1e-3  # float16, in which vectors are stored, rounds by 5e-4


@pytest.mark.parametrize(("pooling", "dimensions"), [("cls", 192), ("patch_mean", 192), ("cls_patch_mean", 384)])
def test_vision_transformer_reads_pictures(pooling: Any, dimensions: int, vit_file: str) -> None:
    config = EmbedderConfig(name="vit_tiny_patch16", weights=vit_file, image_size=32, pooling=pooling)
    vectors = embed(config, pictures(3))
    assert vectors.shape == (3, dimensions)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_sscd_file_loads(tmp_path: Path) -> None:
    torch.save(Sscd().eval().state_dict(), tmp_path / "sscd.pt")
    config = EmbedderConfig(name="sscd_disc_mixup", weights=str(tmp_path / "sscd.pt"), image_size=64, pooling="gem")
    assert embed(config, pictures(2)).shape == (2, 512)


def test_resize_rules() -> None:
    image = Image.new("RGB", (300, 100), "white")
    image.paste("black", (0, 0, 100, 100))
    squash = load_embedder(EmbedderConfig(name="efficientnet_lite0", pooling="gem", image_size=64))
    crop = load_embedder(EmbedderConfig(name="efficientnet_lite0", pooling="gem", image_size=64, resize="center_crop"))
    assert squash.preprocess(image)[:, :, :18].max() < 10
    assert crop.preprocess(image).min() > 235


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "vit_tiny_patch16", "pooling": "cls"}, "needs weights"),
        ({"name": "efficientnet_lite0", "pooling": "cls"}, "pooling 'cls' is not one of"),
        ({"name": "efficientnet_lite0", "pooling": "gem", "image_size": 70}, "not a multiple of 32"),
        ({"name": "vit_tiny_patch14", "weights": "x", "pooling": "cls", "image_size": 32}, "patch size 14"),
        ({"name": "resnet50", "pooling": "gem"}, "Input should be"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EmbedderConfig(**values)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to be had here")
def test_gpu_is_never_replaced_by_the_processor() -> None:
    with pytest.raises(DeviceError, match="sees no GPU here"):
        load_embedder(EmbedderConfig(name="efficientnet_lite0", pooling="gem", device="cuda"))


def test_weights_of_another_size_are_refused(vit_file: str) -> None:
    with pytest.raises(WeightsError, match="pos_embed"):
        load_embedder(EmbedderConfig(name="vit_tiny_patch16", weights=vit_file, image_size=64, pooling="cls"))
