"""Tests of visualize: components against NumPy, attention against the fused kernel, files byte for byte."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from curation import backbone, weights
from curation.errors import InputError
from evaluation import features, visualize
from evaluation.visualize import VisualizeConfig

RED, GREEN = (200, 30, 30), (30, 160, 60)


def blob(path: Path, color: tuple[int, int, int], center: tuple[int, int], size: int = 64) -> None:
    """Writes an image of a disc on white."""
    picture = Image.new("RGB", (size, size), "white")
    x, y = center
    ImageDraw.Draw(picture).ellipse((x - 14, y - 14, x + 14, y + 14), fill=color)
    picture.save(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> features.FrozenModel:
    network = backbone.build(
        "vit_tiny", patch_size=8, image_size=32, depth=2, num_register_tokens=2, layer_scale=1.0, seed=1
    )
    torch.nn.init.normal_(network.register_tokens, generator=torch.Generator().manual_seed(0))
    path = str(tmp_path_factory.mktemp("weights") / "teacher.pth")
    weights.save(network, path)
    return features.load_model(features.FrozenModelConfig(weights=path))


def scattered(seed: int, count: int = 80, width: int = 10) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=random) * torch.linspace(3, 0.5, width) + 5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_components_are_the_singular_vectors(seed: int) -> None:
    tokens = scattered(seed)
    mean, directions = visualize.principal_components(tokens, 3)
    matrix = tokens.double().numpy()
    _, _, rows = np.linalg.svd(matrix - matrix.mean(axis=0))
    for direction, expected in zip(directions.numpy(), rows, strict=False):
        assert np.allclose(direction, expected) or np.allclose(direction, -expected)
        assert direction[np.abs(direction).argmax()] > 0
    assert np.allclose(mean, matrix.mean(axis=0))
    shuffled = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))]
    torch.testing.assert_close(visualize.principal_components(shuffled, 3)[1], directions)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_the_part_away_from_the_border(sign: int) -> None:
    inside = torch.zeros(2, 6, 7, dtype=torch.bool)
    inside[0, 2:4, 2:5] = inside[1, 1:5, 3:5] = True
    noise = torch.randn(2, 5, 6, 7, generator=torch.Generator().manual_seed(0)) * 0.05
    tokens = noise + sign * inside[:, None] * torch.tensor([1.0, 2, 0, 1, 0])[None, :, None, None]
    assert torch.equal(visualize.foreground_mask(tokens), inside)
    assert visualize.foreground_mask(tokens, threshold=-100).all()
    assert not visualize.foreground_mask(tokens, threshold=100).any()


def test_colors_are_shared_by_images_and_stretched_over_all() -> None:
    tokens = scattered(0, count=2 * 4 * 5, width=6).reshape(2, 4, 5, 6).permute(0, 3, 1, 2)
    tokens = torch.cat([tokens, tokens[:1]])  # the third image is the first
    mask = torch.ones(3, 4, 5, dtype=torch.bool)
    mask[:, 0] = False
    colors = visualize.pca_colors(tokens, mask)
    assert colors.shape == (3, 4, 5, 3) and (colors[:, 0] == 0).all()
    assert np.array_equal(colors[0], colors[2]) and not np.array_equal(colors[0], colors[1])
    assert (colors[:, 1:].min(axis=(0, 1, 2)) == 0).all() and (colors.max(axis=(0, 1, 2)) == 255).all()
    assert (visualize.pca_colors(tokens, torch.zeros(3, 4, 5, dtype=torch.bool)) == 0).all()


def test_matches_are_mutually_nearest() -> None:
    first = torch.randn(12, 4, 5, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    second = (3 * first.flatten(1)[:, order]).reshape(12, 2, 10)  # shuffled, of another norm and grid
    pairs, cosines = visualize.match_patches(first, second)
    assert {(int(order[in_second]), in_first) for in_first, in_second in pairs.tolist()} == {(i, i) for i in range(20)}
    assert torch.allclose(cosines, torch.ones_like(cosines))
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 2] = mask[3, 4] = True
    pairs, _ = visualize.match_patches(first, second, first_mask=mask)
    assert sorted(in_first for in_first, _ in pairs.tolist()) == [7, 19]
    assert all(int(order[in_second]) == in_first for in_first, in_second in pairs.tolist())
    pairs, cosines = visualize.match_patches(first, second, second_mask=torch.zeros(2, 10, dtype=torch.bool))
    assert pairs.shape == (0, 2) and cosines.shape == (0,)


def test_a_match_must_be_mutual() -> None:
    first = torch.tensor([[1.0, 0.9], [0.0, 0.1]]).reshape(2, 1, 2)  # both are nearest to the first of the second
    second = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(2, 1, 2)
    pairs, _ = visualize.match_patches(first, second)
    assert pairs.tolist() == [[0, 0]]


def test_attention_is_that_of_the_fused_kernel(model: features.FrozenModel) -> None:
    network = model.backbone
    assert network is not None
    images = torch.randn(2, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    shares = visualize.attention(network, images)
    assert shares.shape == (2, 3, 3, 3, 5) and (shares >= 0).all()
    assert (shares.sum(dim=(-1, -2)) < 1).all()
    # The values of all tokens, weighted by hand, are the input of the projection of the attention.
    recorded = {}
    block = network.blocks[-1]
    handles = [
        block.attn.qkv.register_forward_hook(lambda module, inputs, output: recorded.update(qkv=output)),
        block.attn.proj.register_forward_hook(lambda module, inputs, output: recorded.update(attended=inputs[0])),
    ]
    network.forward_features(images)
    for handle in handles:
        handle.remove()
    qkv = recorded["qkv"].reshape(2, 18, 3, 3, 64)
    queries, keys, values = (qkv[:, :, part].transpose(1, 2) for part in range(3))
    whole = torch.softmax(queries @ keys.transpose(-1, -2) / 8, dim=-1)
    torch.testing.assert_close(shares.flatten(3), whole[:, :, :3, 3:])
    torch.testing.assert_close((whole @ values).transpose(1, 2).flatten(2), recorded["attended"])
    assert not block.attn.qkv._forward_hooks


def test_heat_maps_go_from_black_to_white() -> None:
    colors = visualize.heat_map(torch.tensor([[0.1, 0.2, 0.4]]))
    assert colors[0, 0].tolist() == [0, 0, 0] and colors[0, 2].tolist() == [255, 255, 255]
    assert colors[0, 1].tolist() == [255, 0, 0]
    assert (visualize.heat_map(torch.ones(2, 2)) == 0).all()


def test_neighbour_sheets_frame_neighbours_by_label() -> None:
    pictures = [np.full((20, 24, 3), 10 * number, np.uint8) for number in range(4)]
    sheet = visualize.neighbour_sheet(pictures[:1], [pictures[1:]], [[True, False, None]])
    assert sheet.shape == (20, 4 * 24 + 3 * visualize.GAP, 3)
    corners = [sheet[0, left].tolist() for left in (0, 28, 56, 84)]
    assert corners == [list(visualize.QUERY), list(visualize.SAME), list(visualize.OTHER), [30, 30, 30]]
    assert [int(sheet[10, left + 12, 0]) for left in (0, 28, 56, 84)] == [0, 10, 20, 30]
    assert sheet[0, 25].tolist() == [255, 255, 255]


def test_the_query_is_not_its_own_neighbour(tmp_path: Path, model: features.FrozenModel) -> None:
    vectors = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1.0], [1.0, 0]])  # the first and the last are equal
    pictures = [np.full((16, 16, 3), 40 * number, np.uint8) for number in range(4)]
    record = visualize.draw_neighbours(
        model, str(tmp_path), vectors, ["a", "a", "b", None], pictures.__getitem__, queries=[0, 3], k=2
    )
    drawn = np.asarray(Image.open(tmp_path / "pictures" / record.file))
    assert [int(drawn[8, left + 8, 0]) for left in (0, 20, 40)] == [0, 120, 40]
    assert [int(drawn[28, left + 8, 0]) for left in (0, 20, 40)] == [120, 0, 40]
    assert drawn[0, 40].tolist() == list(visualize.SAME) and drawn[0, 20].tolist() == [120, 120, 120]


def test_drawing_twice_gives_the_same_bytes(tmp_path: Path, model: features.FrozenModel) -> None:
    paths = [tmp_path / "red.png", tmp_path / "green.png"]
    blob(paths[0], RED, (32, 32))
    blob(paths[1], GREEN, (30, 36))
    config = VisualizeConfig(images=tuple(map(str, paths)), image_size=64, match=((0, 1),))
    drawn = visualize.run(config, model, str(tmp_path / "one"))
    assert [record.kind for record in drawn] == ["pca", "matches", "attention"]
    visualize.run(config, model, str(tmp_path / "other"))
    for record in drawn:
        one, other = (tmp_path / folder / "pictures" / record.file for folder in ("one", "other"))
        assert one.read_bytes() == other.read_bytes()
    sizes = [Image.open(tmp_path / "one/pictures" / record.file).size for record in drawn]
    gap = visualize.GAP
    assert sizes == [(128 + gap, 128 + gap), (128 + gap, 64), (128 + gap, 4 * 64 + 3 * gap)]  # CLS and two registers
    components = np.asarray(Image.open(tmp_path / "one/pictures" / drawn[0].file))[64 + gap :]
    assert components[:4, :4].max() == 0 and components[32, 32].max() > 0  # white is background, the disc is not
    visualize.run(config, model, str(tmp_path / "one"))
    assert visualize.read_pictures(str(tmp_path / "one")) == drawn  # each file once


def test_errors_are_reported(tmp_path: Path, model: features.FrozenModel) -> None:
    blob(tmp_path / "a.png", RED, (32, 32))
    good = {"images": (str(tmp_path / "a.png"),), "image_size": 64}
    with pytest.raises(InputError, match=r"image_size 60 is not a multiple.*Set it to 56"):
        visualize.run(VisualizeConfig(**good | {"image_size": 60}), model, str(tmp_path))
    with pytest.raises(InputError, match=r"match = \[0, 1\], and there are 1 images"):
        visualize.run(VisualizeConfig(**good, match=((0, 1),)), model, str(tmp_path))
    with pytest.raises(InputError, match=r"No file at .*none\.png"):
        visualize.run(VisualizeConfig(**good | {"images": (str(tmp_path / "none.png"),)}), model, str(tmp_path))
    pixels = features.load_model(features.FrozenModelConfig(name="pixels"))
    with pytest.raises(InputError, match="no patch tokens"):
        visualize.run(VisualizeConfig(**good), pixels, str(tmp_path))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/pictures.jsonl").write_text(
        '{"file": "../../secret.png", "kind": "pca", "model": "a", "caption": "b"}\n'
    )
    with pytest.raises(InputError, match="line 1: not a picture"):
        visualize.read_pictures(str(tmp_path))
