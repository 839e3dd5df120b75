"""Pictures of what a model sees: its patch tokens as colours, as matches and as attention, and nearest neighbours.

Numbers say which model is better, pictures say what it knows. All are pure functions of tokens and pixels; the signs of
principal components, which are arbitrary, are set by rules, so the same tokens give the same bytes.

<output>/pictures/
  pictures.jsonl                  one line a picture: the fields of Picture. Of two lines with one file the last counts
  <kind>-<model>-<hash>.png

Shapes:
    B  pictures    H, W  pixels, multiples of the patch size    h, w  patches    N = h*w    D  width of a token
    A  heads       R  register tokens

Sources: the PCA, its threshold and its shared components as in Oquab et al., DINOv2 (arXiv 2304.07193), 7.6; attention
of the CLS token as in Caron et al., DINO (arXiv 2104.14294), of registers as in Darcet et al. (arXiv 2309.16588).
"""

# Calling a torch module is typed Any, and so are many of its functions.
# mypy: disable-error-code="no-any-return"

import colorsys
import io
import re
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from curation.backbone import Block, VisionTransformer
from curation.config import Settings
from curation.errors import InputError
from curation.files import paths
from curation.images.decode import ImageLimits, decode_picture, to_shape
from evaluation import knn, records
from evaluation.data.image_files import read_bytes, rejects_named
from evaluation.features import FrozenModel
from evaluation.records import JsonRecord

PictureKind = Literal["pca", "matches", "attention", "neighbours"]
Pixels = NDArray[np.uint8]  # (H, W, 3)

PICTURES_FOLDER = "pictures"
PICTURES_FILE = "pictures.jsonl"
NUM_MATCHES = 20  # how many matches are drawn, the most alike first. Assumed.
GAP = 4  # pixels between pictures of a sheet
SAME, OTHER, QUERY = (46, 139, 98), (181, 56, 46), (32, 38, 43)  # colours of frames


class PictureRecord(JsonRecord):
    """One PNG of the report."""

    file: str = Field(pattern=r"^[A-Za-z0-9-]+\.png$")
    """Its name in the folder of pictures."""
    kind: PictureKind
    model: str
    """Name of the model, for people."""
    caption: str


class VisualizeConfig(Settings):
    """What is drawn of a few pictures."""

    images: tuple[str, ...] = Field(min_length=1)
    """Paths of pictures, drawn from left to right. Their principal components are shared."""
    image_size: int = Field(default=448, ge=16)
    """Side in pixels of the square that the model sees: the largest in the middle of the picture. A multiple of the
    patch size."""
    foreground: float = 0.0
    """Where the first component divides foreground from background, in standard deviations from its mean over all
    patches. -100 colours everything."""
    match: tuple[tuple[int, int], ...] = ()
    """Pairs of pictures, counted from 0, whose patches are matched."""
    attention: bool = True
    """Whether the attention of the CLS and register tokens is drawn."""


# ---- principal components


def principal_components(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mean (D) and the `count` directions (count, D) of greatest variance of tokens (N, D), float64.

    Each has length 1, and its entry of greatest size, the first of equal ones, is positive.
    """
    tokens = tokens.double()
    mean = tokens.mean(dim=0)
    centred = tokens - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    directions = vectors.flip(1)[:, :count].T
    largest = directions.abs().argmax(dim=1, keepdim=True)
    return mean, directions * directions.gather(1, largest).sign()


def foreground_mask(tokens: Tensor, threshold: float = 0.0) -> Tensor:
    """Which patches (B, h, w) of tokens (B, D, h, w) show things, by the first component over all pictures.

    `threshold`: where it divides them, in standard deviations from the mean. Of the two sides the background is the one
    that has more of the pictures' borders, and the lower one if they have as much.
    """
    flat = tokens.permute(0, 2, 3, 1).flatten(0, 2)
    mean, (direction,) = principal_components(flat, 1)
    scores = ((flat.double() - mean) @ direction).reshape(tokens.shape[0], *tokens.shape[2:])
    border = torch.ones_like(scores, dtype=torch.bool)
    border[:, 1:-1, 1:-1] = False
    if (scores[border] > 0).double().mean() > 0.5:
        scores = -scores
    return scores > threshold * scores.std()


def pca_colors(tokens: Tensor, mask: Tensor) -> NDArray[np.uint8]:
    """Three principal components of the patches in `mask` as red, green and blue: (B, h, w, 3), black elsewhere.

    tokens: (B, D, h, w). mask: (B, h, w). The components are those of all pictures together, each stretched from its
    least to its greatest value.
    """
    chosen = tokens.permute(0, 2, 3, 1)[mask]
    colors = np.zeros((*mask.shape, 3), np.uint8)
    if len(chosen) < 4:  # three components need four points
        return colors
    mean, directions = principal_components(chosen, 3)
    scores = (chosen.double() - mean) @ directions.T
    low, high = scores.amin(dim=0), scores.amax(dim=0)
    stretched = (scores - low) / (high - low).clamp(min=1e-12)
    colors[mask.cpu().numpy()] = (255 * stretched).round().to(torch.uint8).cpu().numpy()
    return colors


# ---- matching


def match_patches(
    first: Tensor, second: Tensor, *, first_mask: Tensor | None = None, second_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The patches that are each other's most alike: places (M, 2) in two grids row by row, and cosines (M).

    first, second: tokens (D, h, w), of grids of any size. The masks (h, w) say which patches take part. The most alike
    come first; equal ones by place.
    """
    places = []
    units = []
    for tokens, mask in ((first, first_mask), (second, second_mask)):
        kept = torch.ones(tokens.shape[1:], dtype=torch.bool) if mask is None else mask.cpu()
        places.append(kept.flatten().nonzero()[:, 0])
        units.append(functional.normalize(tokens.flatten(1).T.double().cpu()[places[-1]], dim=1))
    if not len(places[0]) or not len(places[1]):
        return torch.empty(0, 2, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    cosines = units[0] @ units[1].T
    there, back = cosines.argmax(dim=1), cosines.argmax(dim=0)
    mutual = (back[there] == torch.arange(len(there))).nonzero()[:, 0]
    alike = cosines[mutual, there[mutual]]
    order = torch.argsort(alike, descending=True, stable=True)
    pairs = torch.stack([places[0][mutual], places[1][there[mutual]]], dim=1)
    return pairs[order], alike[order]


# ---- attention


@torch.no_grad()
def attention(network: VisionTransformer, images: Tensor) -> Tensor:
    """What CLS and the registers attend to in the last block: shares (B, A, 1 + R, h, w) float32.

    images: normalised (B, 3, H, W). Computed from the queries and keys of the block, since the fused kernel gives no
    weights. Shares of the patches are less than 1 in all: the rest goes to CLS and registers. Without a CLS token it is
    (B, A, R, h, w).
    """
    block = network.blocks[-1]
    assert isinstance(block, Block)
    caught: list[Tensor] = []
    handle = block.attn.qkv.register_forward_hook(lambda module, inputs, output: caught.append(output))
    try:
        network.forward_features(images)
    finally:
        handle.remove()
    (qkv,) = caught  # (B, T, 3D)
    special = int(network.cls_token is not None) + network.num_register_tokens
    if special == 0:
        raise InputError("This backbone has neither a CLS token nor registers. There is no attention to draw.")
    queries, keys, _ = qkv.float().reshape(*qkv.shape[:2], 3, network.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = queries[:, :, :special] @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
    grid = (images.shape[-2] // network.patch_size, images.shape[-1] // network.patch_size)
    return scores.softmax(dim=-1)[..., special:].unflatten(-1, grid)


def heat(shares: Tensor) -> NDArray[np.uint8]:
    """A map (h, w) from black over red and yellow to white, its least value to its greatest: (h, w, 3)."""
    low, high = shares.min(), shares.max()
    level = ((shares - low) / (high - low).clamp(min=1e-12)).cpu().numpy()
    return (255 * np.clip(np.stack([3 * level, 3 * level - 1, 3 * level - 2], axis=-1), 0, 1)).round().astype(np.uint8)


# ---- sheets


def enlarge(patches: NDArray[np.uint8], factor: int) -> Pixels:
    """(h, w, 3) with every patch as a square of `factor` pixels."""
    return patches.repeat(factor, axis=0).repeat(factor, axis=1)


def sheet(rows: Sequence[Sequence[Pixels | None]]) -> Pixels:
    """Pictures of one size in rows on white, with gaps; None leaves a place empty."""
    shapes = {cell.shape for row in rows for cell in row if cell is not None}
    assert len(shapes) == 1, shapes
    height, width, _ = shapes.pop()
    columns = max(len(row) for row in rows)
    whole = np.full((len(rows) * (height + GAP) - GAP, columns * (width + GAP) - GAP, 3), 255, np.uint8)
    for row, cells in enumerate(rows):
        for column, cell in enumerate(cells):
            if cell is not None:
                top, left = row * (height + GAP), column * (width + GAP)
                whole[top : top + height, left : left + width] = cell
    return whole


def match_picture(first: Pixels, second: Pixels, pairs: Tensor, *, patch_size: int, columns: tuple[int, int]) -> Pixels:
    """Two pictures side by side, lines between the middles of matched patches, each in its own colour.

    columns: the widths of the two grids in patches.
    """
    whole = Image.fromarray(sheet([[first, second]]))
    # Drawn at twice the size and scaled down, since Pillow's lines are not smooth.
    scale = 2
    large = whole.resize((whole.width * scale, whole.height * scale), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(large)
    offsets = (0, first.shape[1] + GAP)
    for number, pair in enumerate(pairs.tolist()):
        red, green, blue = colorsys.hsv_to_rgb(number / max(len(pairs), 1), 0.9, 0.95)
        color = (round(255 * red), round(255 * green), round(255 * blue))
        ends = [
            (
                scale * (offset + (place % width + 0.5) * patch_size),
                scale * (place // width + 0.5) * patch_size,
            )
            for place, width, offset in zip(pair, columns, offsets, strict=True)
        ]
        pen.line(ends, fill=color, width=2 * scale)
        for x, y in ends:
            pen.ellipse((x - 3 * scale, y - 3 * scale, x + 3 * scale, y + 3 * scale), fill=color)
    return np.asarray(large.resize(whole.size, Image.Resampling.BOX))


def neighbour_sheet(
    queries: Sequence[Pixels], neighbours: Sequence[Sequence[Pixels]], same: Sequence[Sequence[bool | None]]
) -> Pixels:
    """A row a query: the query, and behind it its neighbours, the nearest first; all pictures of one size.

    same: whether a neighbour has the query's label (green frame) or another (red); None draws no frame.
    """
    rows: list[list[Pixels | None]] = []
    for query, nearest, marks in zip(queries, neighbours, same, strict=True):
        frames = (
            cell if mark is None else framed(cell, SAME if mark else OTHER)
            for cell, mark in zip(nearest, marks, strict=True)
        )
        rows.append([framed(query, QUERY), *frames])
    return sheet(rows)


def framed(picture: Pixels, color: tuple[int, int, int], width: int = 4) -> Pixels:
    """The picture with a frame drawn over its edge."""
    result = np.empty_like(picture)
    result[:] = color
    result[width:-width, width:-width] = picture[width:-width, width:-width]
    return result


# ---- files


def read_square(path: str, size: int) -> Tensor:
    """The largest square in the middle of a picture, (3, size, size) uint8. Raises InputError."""
    with rejects_named(path):
        picture = decode_picture(read_bytes(path), ImageLimits(), target_side=size)
    return torch.from_numpy(to_shape(picture, (size, size), crop=True).copy())


def save(
    output: str, kind: PictureKind, model: FrozenModel, pixels: Pixels, caption: str, *, part: str = ""
) -> PictureRecord:
    """Write a PNG below `output` and note it for the report. `part` tells pictures of one kind apart."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", f"{kind}-{part}-{model.name}").strip("-")
    record = PictureRecord(file=f"{words[:80]}-{model.hash[:8]}.png", kind=kind, model=model.name, caption=caption)
    folder = paths.join(output, PICTURES_FOLDER)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    paths.write_bytes(paths.join(folder, record.file), buffer.getvalue())
    records.append(paths.join(folder, PICTURES_FILE), record)
    return record


def read_pictures(output: str) -> list[PictureRecord]:
    """The pictures below `output`, oldest first; none where there are none. Raises InputError for a damaged line."""
    path = paths.join(output, PICTURES_FOLDER, PICTURES_FILE)
    found: dict[str, PictureRecord] = {}
    for picture in records.read(path, PictureRecord, "picture"):
        found.pop(picture.file, None)
        found[picture.file] = picture
    return list(found.values())


def run(config: VisualizeConfig, model: FrozenModel, output: str) -> list[PictureRecord]:
    """Draw the principal components, the matches and the attention of `config`'s pictures below `output`."""
    network, patch_size = model.backbone, model.patch_size
    if network is None or patch_size is None or model.num_blocks is None:
        raise InputError(f"{model.name} has no patch tokens to draw. Pictures need a Vision Transformer.")
    if config.image_size % patch_size:
        raise InputError(
            f"image_size {config.image_size} is not a multiple of {model.name}'s patch size {patch_size}. Take "
            f"{config.image_size // patch_size * patch_size or patch_size}."
        )
    for one, other in config.match:
        if not 0 <= min(one, other) <= max(one, other) < len(config.images):
            raise InputError(f"match = [{one}, {other}], and there are {len(config.images)} pictures, counted from 0.")
    squares = [read_square(path, config.image_size) for path in config.images]
    shown = [square.permute(1, 2, 0).numpy() for square in squares]
    tokens = torch.cat([_patch_tokens(network, model.normalized(square[None])) for square in squares])
    mask = foreground_mask(tokens, config.foreground)
    colors = [enlarge(one, patch_size) for one in pca_colors(tokens, mask)]
    drawn = [
        save(output, "pca", model, sheet([shown, colors]), "Three principal components of the foreground's patches.")
    ]
    for one, other in config.match:
        pairs, alike = match_patches(tokens[one], tokens[other], first_mask=mask[one], second_mask=mask[other])
        pairs, alike = pairs[:NUM_MATCHES], alike[:NUM_MATCHES]
        width = tokens.shape[-1]
        pixels = match_picture(shown[one], shown[other], pairs, patch_size=patch_size, columns=(width, width))
        caption = f"The {len(pairs)} pairs of foreground patches most alike that are each other's nearest."
        drawn.append(save(output, "matches", model, pixels, caption, part=f"{one}-{other}"))
    if config.attention:
        columns = []
        for square, picture in zip(squares, shown, strict=True):
            (shares,) = attention(network, model.normalized(square[None])).mean(dim=1)  # over the heads
            columns.append([picture, *(enlarge(heat(one), patch_size) for one in shares)])
        what = ["the CLS token"] if network.cls_token is not None else []
        what += [f"register {number}" for number in range(1, network.num_register_tokens + 1)]
        caption = f"Attention in the last block, the mean of its heads: {', '.join(what)}."
        drawn.append(save(output, "attention", model, sheet(list(zip(*columns, strict=True))), caption))
    return drawn


def draw_neighbours(
    model: FrozenModel,
    output: str,
    features: Tensor,
    labels: Sequence[str | None],
    read: Callable[[int], Pixels],
    *,
    queries: Sequence[int],
    k: int = 8,
    name: str = "",
) -> PictureRecord:
    """A sheet of the `k` pictures nearest in cosine to each of `queries`, the picture itself apart.

    name: of the data, for the caption.
    features: (n, D), of all pictures. read: gives a picture by its row, all of one size. queries: rows. A neighbour has
    a frame where both labels are known.
    """
    _, rows = knn.neighbors([features], features[list(queries)], k=min(k + 1, len(features)))
    nearest = [
        [int(row) for row in found if row != query][:k] for query, found in zip(queries, rows.tolist(), strict=True)
    ]
    same = [
        [None if None in (labels[query], labels[row]) else labels[query] == labels[row] for row in found]
        for query, found in zip(queries, nearest, strict=True)
    ]
    pixels = neighbour_sheet(
        [read(query) for query in queries], [[read(row) for row in found] for found in nearest], same
    )
    of_data = f" in {name}" if name else ""
    caption = f"Left the query, behind it the {k} nearest{of_data}: green frames have its label, red ones another."
    return save(output, "neighbours", model, pixels, caption, part=name)


@torch.no_grad()
def _patch_tokens(network: VisionTransformer, images: Tensor) -> Tensor:
    """Of the last block, behind the last norm: (B, D, h, w) float32."""
    (tokens,) = network.get_intermediate_layers(images, 1, reshape=True)
    assert isinstance(tokens, Tensor)
    return tokens.float()
