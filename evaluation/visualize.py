"""Draws pictures of a model's patch tokens, as colours, matches and attention, and sheets of nearest neighbours.

All are pure functions of tokens and pixels. The signs of principal components are arbitrary; rules fix them, so the
same tokens give the same bytes.

<output>/pictures/
  pictures.jsonl                  one line a picture: the fields of PictureRecord. The last line of a file counts
  <kind>-<model>-<hash>.png

Shapes:
    B  images    H, W  pixels, multiples of the patch size    h, w  patches    N = h*w    D  width of a token
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
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from curation.backbone import Block, VisionTransformer
from curation.config import IsPath, Settings
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
NUM_MATCHES = 20  # matches drawn, the most similar first. Assumed.
GAP = 4  # pixels between images of a sheet
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
    """Images to draw, and how."""

    images: Annotated[tuple[str, ...], IsPath] = Field(min_length=1)
    """Paths of images, drawn from left to right. Their principal components are shared."""
    image_size: int = Field(default=448, ge=16)
    """Side in pixels to which the middle square of each image is scaled; a multiple of the patch size."""
    foreground: float = 0.0
    """Threshold on the first component between foreground and background, in standard deviations from its mean over
    all patches. -100 makes everything foreground."""
    match: tuple[tuple[int, int], ...] = ()
    """Pairs of images, counted from 0, whose patches are matched."""
    attention: bool = True
    """Whether the attention of the CLS and register tokens is drawn. Set it to false for a model without either."""


# ---- principal components


def principal_components(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The mean (D) and the `count` directions (count, D) of greatest variance of tokens (N, D), float64.

    Each direction has unit length. Its entry of greatest magnitude is positive; of equal ones, the first.
    """
    tokens = tokens.double()
    mean = tokens.mean(dim=0)
    centred = tokens - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    directions = vectors.flip(1)[:, :count].T
    largest = directions.abs().argmax(dim=1, keepdim=True)
    return mean, directions * directions.gather(1, largest).sign()


def foreground_mask(tokens: Tensor, threshold: float = 0.0) -> Tensor:
    """Foreground patches (B, h, w) of tokens (B, D, h, w), by the first component over all images.

    threshold: in standard deviations from the mean. The side with more of the images' border patches is the background;
    in a tie, the lower side.
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

    tokens: (B, D, h, w). mask: (B, h, w). The components are computed over all images together. Each is stretched from
    its minimum to its maximum.
    """
    masked = tokens.permute(0, 2, 3, 1)[mask]
    colors = np.zeros((*mask.shape, 3), np.uint8)
    if len(masked) < 4:  # three components need four points
        return colors
    mean, directions = principal_components(masked, 3)
    scores = (masked.double() - mean) @ directions.T
    low, high = scores.amin(dim=0), scores.amax(dim=0)
    stretched = (scores - low) / (high - low).clamp(min=1e-12)
    colors[mask.cpu().numpy()] = (255 * stretched).round().to(torch.uint8).cpu().numpy()
    return colors


# ---- matching


def match_patches(
    first: Tensor, second: Tensor, *, first_mask: Tensor | None = None, second_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mutually nearest patches of two images: their indices (M, 2) in the two grids, row by row, and cosines (M).

    first, second: tokens (D, h, w), of grids of any size. The masks (h, w) select patches. The most similar pair comes
    first; ties are ordered by index.
    """
    indices = []
    units = []
    for tokens, mask in ((first, first_mask), (second, second_mask)):
        kept = torch.ones(tokens.shape[1:], dtype=torch.bool) if mask is None else mask.cpu()
        indices.append(kept.flatten().nonzero()[:, 0])
        units.append(functional.normalize(tokens.flatten(1).T.double().cpu()[indices[-1]], dim=1))
    if not len(indices[0]) or not len(indices[1]):
        return torch.empty(0, 2, dtype=torch.int64), torch.empty(0, dtype=torch.float64)
    cosines = units[0] @ units[1].T
    nearest_second, nearest_first = cosines.argmax(dim=1), cosines.argmax(dim=0)
    mutual = (nearest_first[nearest_second] == torch.arange(len(nearest_second))).nonzero()[:, 0]
    similarities = cosines[mutual, nearest_second[mutual]]
    order = torch.argsort(similarities, descending=True, stable=True)
    pairs = torch.stack([indices[0][mutual], indices[1][nearest_second[mutual]]], dim=1)
    return pairs[order], similarities[order]


# ---- attention


@torch.no_grad()
def attention(network: VisionTransformer, images: Tensor) -> Tensor:
    """Attention of CLS and the registers to the patches in the last block: (B, A, 1 + R, h, w) float32.

    images: normalised (B, 3, H, W). Computed from the queries and keys of the block, because the fused kernel gives no
    weights. The weights of the patches sum to less than 1; CLS and registers have the rest. Without a CLS token the
    shape is (B, A, R, h, w).
    """
    block = network.blocks[-1]
    assert isinstance(block, Block)
    outputs: list[Tensor] = []
    handle = block.attn.qkv.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        network.forward_features(images)
    finally:
        handle.remove()
    (qkv,) = outputs  # (B, T, 3D)
    num_special = int(network.cls_token is not None) + network.num_register_tokens
    if num_special == 0:
        raise InputError(
            "This backbone has neither a CLS token nor registers, so there is no attention to draw. Set attention to "
            "false."
        )
    queries, keys, _ = qkv.float().reshape(*qkv.shape[:2], 3, network.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = queries[:, :, :num_special] @ keys.transpose(-1, -2) / queries.shape[-1] ** 0.5
    grid = (images.shape[-2] // network.patch_size, images.shape[-1] // network.patch_size)
    return scores.softmax(dim=-1)[..., num_special:].unflatten(-1, grid)


def heat_map(weights: Tensor) -> NDArray[np.uint8]:
    """Colours (h, w, 3) of a map (h, w): its minimum is black, its maximum white, with red and yellow between."""
    low, high = weights.min(), weights.max()
    level = ((weights - low) / (high - low).clamp(min=1e-12)).cpu().numpy()
    return (255 * np.clip(np.stack([3 * level, 3 * level - 1, 3 * level - 2], axis=-1), 0, 1)).round().astype(np.uint8)


# ---- sheets


def enlarge(patches: NDArray[np.uint8], factor: int) -> Pixels:
    """A map of patches (h, w, 3) with each patch as a square of `factor` pixels."""
    return patches.repeat(factor, axis=0).repeat(factor, axis=1)


def sheet(rows: Sequence[Sequence[Pixels | None]]) -> Pixels:
    """Images of one size in rows on white, with gaps. None leaves a cell empty."""
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
    """Two images side by side, with lines of different colours between the centres of matched patches.

    columns: the widths of the two grids in patches.
    """
    whole = Image.fromarray(sheet([[first, second]]))
    # Drawn at twice the size and scaled down, because Pillow's lines are not smooth.
    scale = 2
    large = whole.resize((whole.width * scale, whole.height * scale), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(large)
    offsets = (0, first.shape[1] + GAP)
    for number, pair in enumerate(pairs.tolist()):
        red, green, blue = colorsys.hsv_to_rgb(number / max(len(pairs), 1), 0.9, 0.95)
        color = (round(255 * red), round(255 * green), round(255 * blue))
        ends = [
            (
                scale * (offset + (index % width + 0.5) * patch_size),
                scale * (index // width + 0.5) * patch_size,
            )
            for index, width, offset in zip(pair, columns, offsets, strict=True)
        ]
        pen.line(ends, fill=color, width=2 * scale)
        for x, y in ends:
            pen.ellipse((x - 3 * scale, y - 3 * scale, x + 3 * scale, y + 3 * scale), fill=color)
    return np.asarray(large.resize(whole.size, Image.Resampling.BOX))


def neighbour_sheet(
    queries: Sequence[Pixels], neighbours: Sequence[Sequence[Pixels]], same: Sequence[Sequence[bool | None]]
) -> Pixels:
    """One row for each query: the query, then its neighbours, nearest first. All images have one size.

    same: whether a neighbour has the query's label (green frame) or another (red frame); None draws no frame.
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
    """The image with a frame drawn over its edge."""
    result = np.empty_like(picture)
    result[:] = color
    result[width:-width, width:-width] = picture[width:-width, width:-width]
    return result


# ---- files


def read_square(path: str, size: int) -> Tensor:
    """The largest square in the middle of an image, scaled to (3, size, size) uint8. Raises InputError."""
    with rejects_named(path):
        picture = decode_picture(read_bytes(path), ImageLimits(), target_side=size)
    return torch.from_numpy(to_shape(picture, (size, size), crop=True).copy())


def save(
    output: str, kind: PictureKind, model: FrozenModel, pixels: Pixels, caption: str, *, part: str = ""
) -> PictureRecord:
    """Write a PNG below `output` and record it for the report. `part` distinguishes pictures of one kind."""
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
    last_by_file: dict[str, PictureRecord] = {}
    for picture in records.read(path, PictureRecord, "picture"):
        last_by_file.pop(picture.file, None)
        last_by_file[picture.file] = picture
    return list(last_by_file.values())


def run(config: VisualizeConfig, model: FrozenModel, output: str) -> list[PictureRecord]:
    """Draw the principal components, the matches and the attention of the images of `config` below `output`."""
    network, patch_size = model.backbone, model.patch_size
    if network is None or patch_size is None or model.num_blocks is None:
        raise InputError(f"{model.name} has no patch tokens to draw. Pictures need a Vision Transformer.")
    if config.image_size % patch_size:
        raise InputError(
            f"image_size {config.image_size} is not a multiple of {model.name}'s patch size {patch_size}. Set it to "
            f"{config.image_size // patch_size * patch_size or patch_size}."
        )
    for one, other in config.match:
        if not 0 <= min(one, other) <= max(one, other) < len(config.images):
            raise InputError(f"match = [{one}, {other}], and there are {len(config.images)} images, counted from 0.")
    squares = [read_square(path, config.image_size) for path in config.images]
    images = [square.permute(1, 2, 0).numpy() for square in squares]
    tokens = torch.cat([_patch_tokens(network, model.normalized(square[None])) for square in squares])
    mask = foreground_mask(tokens, config.foreground)
    colors = [enlarge(one, patch_size) for one in pca_colors(tokens, mask)]
    drawn = [
        save(output, "pca", model, sheet([images, colors]), "Three principal components of the foreground's patches.")
    ]
    for one, other in config.match:
        pairs, _ = match_patches(tokens[one], tokens[other], first_mask=mask[one], second_mask=mask[other])
        pairs = pairs[:NUM_MATCHES]
        width = tokens.shape[-1]
        pixels = match_picture(images[one], images[other], pairs, patch_size=patch_size, columns=(width, width))
        caption = f"The {len(pairs)} most similar pairs of mutually nearest foreground patches."
        drawn.append(save(output, "matches", model, pixels, caption, part=f"{one}-{other}"))
    if config.attention:
        columns = []
        for square, image in zip(squares, images, strict=True):
            (weights,) = attention(network, model.normalized(square[None])).mean(dim=1)  # over the heads
            columns.append([image, *(enlarge(heat_map(one), patch_size) for one in weights)])
        names = ["the CLS token"] if network.cls_token is not None else []
        names += [f"register {number}" for number in range(1, network.num_register_tokens + 1)]
        caption = f"Attention in the last block, the mean of its heads: {', '.join(names)}."
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
    """Draw a sheet of the `k` images nearest in cosine to each of `queries`; the query itself is left out.

    name: of the data, for the caption. features: (n, D), of all images. read: gives an image by its row, all of one
    size. queries: rows. A neighbour has a frame where both labels are known.
    """
    _, rows = knn.neighbors([features], features[list(queries)], k=min(k + 1, len(features)))
    nearest = [
        [int(row) for row in neighbors if row != query][:k]
        for query, neighbors in zip(queries, rows.tolist(), strict=True)
    ]
    same = [
        [None if None in (labels[query], labels[row]) else labels[query] == labels[row] for row in neighbors]
        for query, neighbors in zip(queries, nearest, strict=True)
    ]
    pixels = neighbour_sheet(
        [read(query) for query in queries], [[read(row) for row in neighbors] for neighbors in nearest], same
    )
    of_data = f" in {name}" if name else ""
    caption = f"Left: the query; then the {k} nearest{of_data}. Green frames mark its label, red frames another label."
    return save(output, "neighbours", model, pixels, caption, part=name)


@torch.no_grad()
def _patch_tokens(network: VisionTransformer, images: Tensor) -> Tensor:
    """Patch tokens of the last block after the last norm: (B, D, h, w) float32."""
    (tokens,) = network.get_intermediate_layers(images, 1, reshape=True)
    assert isinstance(tokens, Tensor)
    return tokens.float()


if __name__ == "__main__":
    from evaluation import without_command

    raise SystemExit(without_command("visualize"))
