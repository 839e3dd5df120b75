"""The Vision Transformer: curation embeds with it, training trains it, evaluation scores it.

All three use this one model, with the key layout and the calling conventions of the released DINOv2 weights, so that
these load without renaming. The docstring of `build` has the options that a checkpoint needs.

Shapes:
    B  images        C  in_channels    H, W  pixels, multiples of P    P  patch_size
    h, w = H/P, W/P  N = h*w patches   R     register tokens         T = 1 + R + N tokens: [CLS | registers | patches]
                                                                     (R + N where there is no CLS token)
    D  embed_dim     A  heads          M     side of the square grid of the positional embedding

Source: Oquab et al., DINOv2 (arXiv 2304.07193); Darcet et al., Vision Transformers Need Registers (arXiv 2309.16588).
"""

# Calling a torch module is typed Any.
# mypy: disable-error-code="no-any-return"

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, NotRequired, TypedDict, overload

import torch
from torch import Tensor, nn
from torch.nn import functional

from curation.errors import ConfigError, InputError

Name = Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge", "vit_giant"]
FeedForward = Literal["mlp", "swiglu"]
PositionInterpolation = Literal["offset", "plain", "antialias"]
PackedAttention = Literal["grouped", "varlen"]
Kept = tuple[Sequence[Tensor], Sequence[Tensor]]  # for the two branches of a block: the kept images of each batch


@dataclass(frozen=True)
class Size:
    """The dimensions of a model. `feed_forward` is the released choice for that size."""

    embed_dim: int
    depth: int
    num_heads: int
    feed_forward: FeedForward


# Cited: Dosovitskiy et al. (arXiv 2010.11929) tables 1 and Touvron et al. (2012.12877) for tiny and small; the giant is
# DINOv2's own (1536 wide, 24 heads, SwiGLU), whose multiples of 64 and 256 suit GPU kernels.
SIZES: dict[Name, Size] = {
    "vit_tiny": Size(192, 12, 3, "mlp"),
    "vit_small": Size(384, 12, 6, "mlp"),
    "vit_base": Size(768, 12, 12, "mlp"),
    "vit_large": Size(1024, 24, 16, "mlp"),
    "vit_huge": Size(1280, 32, 16, "mlp"),
    "vit_giant": Size(1536, 40, 24, "swiglu"),
}

NORM_EPSILON = 1e-6  # cited: DINOv2 and the ViTs before it
# Cited: DINOv2's interpolation; a historical workaround, used when the released weights were scored.
POSITION_OFFSET = 0.1


def build(
    name: Name,
    *,
    patch_size: int,
    image_size: int,
    num_register_tokens: int = 0,
    cls_token: bool = True,
    in_channels: int = 3,
    feed_forward: FeedForward | None = None,
    layer_scale: float | None = 1e-5,
    position_interpolation: PositionInterpolation = "offset",
    depth: int | None = None,
    seed: int | None = 0,
) -> "VisionTransformer":
    """The Vision Transformer `name` with fresh weights, a pure function of the arguments. Raises ConfigError.

    image_size: side in pixels of the images for the positional embedding; other sizes interpolate it.
    cls_token: False leaves out the CLS token and its position (I-JEPA).
    feed_forward, depth: None selects the released choice for the name.
    layer_scale: the initial value of LayerScale; None leaves it out (MAE, I-JEPA).
    position_interpolation: "offset" scales by (h + 0.1) / M; "plain" resizes to (h, w), as transformers' Dinov2Model
        does; "antialias" resizes to (h, w) with antialiasing.
    seed: of the fresh weights; None leaves the memory uninitialised, for a checkpoint that fills all of it.

    The released DINOv2 weights need image_size=518, patch_size=14 and "offset"; those with registers need
    num_register_tokens=4 and "antialias".
    """
    if name not in SIZES:
        raise ConfigError(f"No backbone is called {name!r}. Choose from: {', '.join(SIZES)}.")
    if patch_size < 1 or image_size < patch_size or image_size % patch_size:
        raise ConfigError(f"{name}: image_size {image_size} is not a multiple of patch_size {patch_size}.")
    size = SIZES[name]
    with torch.device("meta"):  # allocates nothing and does not use the global generator
        model = VisionTransformer(
            embed_dim=size.embed_dim,
            depth=size.depth if depth is None else depth,
            num_heads=size.num_heads,
            feed_forward=feed_forward or size.feed_forward,
            patch_size=patch_size,
            grid_size=image_size // patch_size,
            num_register_tokens=num_register_tokens,
            cls_token=cls_token,
            in_channels=in_channels,
            layer_scale=layer_scale,
            position_interpolation=position_interpolation,
        )
    model.to_empty(device="cpu")
    if seed is not None:
        _initialize(model, layer_scale, torch.Generator().manual_seed(seed))
    return model


class Features(TypedDict):
    """The output of `forward_features`."""

    x_norm_clstoken: NotRequired[Tensor]
    """(B, D), after the last norm. Absent for a backbone without a CLS token."""
    x_norm_regtokens: Tensor
    """(B, R, D), after the last norm."""
    x_norm_patchtokens: Tensor
    """(B, N, D), after the last norm, row by row."""
    x_prenorm: Tensor
    """(B, T, D), before the last norm."""
    masks: Tensor | None
    """As given."""


class PatchEmbed(nn.Module):
    """(B, C, H, W) pixels to (B, N, D) patch tokens, row by row."""

    def __init__(self, patch_size: int, in_channels: int, embed_dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise InputError(f"Images of {height}x{width} pixels do not divide into patches of {self.patch_size}.")
        return self.proj(x).flatten(2).transpose(1, 2)


class Packing(NamedTuple):
    """The layout of several batches of tokens, concatenated into one matrix (S, D)."""

    shapes: tuple[tuple[int, int], ...]
    """(images, tokens an image) of each batch."""
    lengths: tuple[int, ...]
    """Rows of each batch; their sum is S."""


def _pack(groups: Sequence[Tensor]) -> tuple[Tensor, Packing]:
    """Concatenates batches (B, T, D) into one matrix (S, D)."""
    shapes = tuple((group.shape[0], group.shape[1]) for group in groups)
    return torch.cat([group.flatten(0, 1) for group in groups]), Packing(shapes, tuple(b * t for b, t in shapes))


def _unpack(tokens: Tensor, packing: Packing) -> list[Tensor]:
    """Splits the matrix (S, C) into batches (B, T, C)."""
    parts = torch.split(tokens, list(packing.lengths))
    return [part.reshape(*shape, -1) for part, shape in zip(parts, packing.shapes, strict=True)]


class Attention(nn.Module):
    """Self-attention within each image: over (B, T, D) tokens or, given a packing, over (S, D) tokens."""

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.packed: PackedAttention = "grouped"
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        qkv = self.qkv(x)
        if packing is None:
            return self.proj(self._attend(qkv))
        if self.packed == "varlen":
            return self.proj(self._attend_varlen(qkv, packing))
        return self.proj(torch.cat([self._attend(part).flatten(0, 1) for part in _unpack(qkv, packing)]))

    def _attend(self, qkv: Tensor) -> Tensor:
        """(B, T, 3D) to (B, T, D)."""
        queries, keys, values = qkv.reshape(*qkv.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(queries, keys, values)  # (B, A, T, D/A)
        return attended.transpose(1, 2).flatten(2)

    def _attend_varlen(self, qkv: Tensor, packing: Packing) -> Tensor:
        """(S, 3D) to (S, D) in one call, for images with different numbers of tokens."""
        from torch.nn.attention.varlen import varlen_attn  # its import looks for a GPU

        queries, keys, values = qkv.reshape(len(qkv), 3, self.num_heads, -1).unbind(1)  # each (S, A, D/A)
        starts, longest = _starts(packing.shapes, qkv.device), max(tokens for _, tokens in packing.shapes)
        attended = varlen_attn(queries, keys, values, starts, starts, longest, longest)
        assert isinstance(attended, Tensor)
        return attended.flatten(1)


@functools.lru_cache(maxsize=16)
def _starts(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Start of each image in the matrix, and the end of the last: int32, (images + 1,). Cached: all blocks use it."""
    tokens = torch.cat([torch.full((images,), tokens) for images, tokens in shapes])
    return functional.pad(tokens.cumsum(0), (1, 0)).to(device, torch.int32)


class Mlp(nn.Module):
    """Two linear layers, 4D wide, with GELU between them."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, 4 * embed_dim)
        self.fc2 = nn.Linear(4 * embed_dim, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class SwiGlu(nn.Module):
    """A SiLU-gated linear unit, 8/3 D wide, rounded up to a multiple of 8; about as many weights as the Mlp."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        hidden = (4 * embed_dim * 2 // 3 + 7) // 8 * 8
        self.w12 = nn.Linear(embed_dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, values = self.w12(x).chunk(2, dim=-1)
        return self.w3(functional.silu(gate) * values)


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch."""

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(embed_dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """One pre-norm layer of the transformer, (B, T, D) to (B, T, D)."""

    def __init__(self, embed_dim: int, num_heads: int, feed_forward: FeedForward, layer_scale: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=NORM_EPSILON)
        self.attn = Attention(embed_dim, num_heads)
        self.ls1 = LayerScale(embed_dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(embed_dim, eps=NORM_EPSILON)
        self.mlp = Mlp(embed_dim) if feed_forward == "mlp" else SwiGlu(embed_dim)
        self.ls2 = LayerScale(embed_dim) if layer_scale else nn.Identity()

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: list[Tensor], kept: Kept | None = None) -> list[Tensor]: ...
    def forward(self, x, kept=None):  # type: ignore[no-untyped-def]  # typed by the overloads
        if isinstance(x, Tensor):
            x = x + self.ls1(self.attn(self.norm1(x)))
            return x + self.ls2(self.mlp(self.norm2(x)))
        x = _add_branch(x, kept and kept[0], lambda tokens, packing: self.ls1(self.attn(self.norm1(tokens), packing)))
        return _add_branch(x, kept and kept[1], lambda tokens, packing: self.ls2(self.mlp(self.norm2(tokens))))


def _add_branch(
    groups: list[Tensor], kept: Sequence[Tensor] | None, branch: Callable[[Tensor, Packing], Tensor]
) -> list[Tensor]:
    """Adds a residual branch to every batch; the branch of all batches is computed as one matrix.

    With `kept`, the branch is computed for those images only and scaled by the inverse of their share of the batch.
    """
    chosen = groups if kept is None else [group.index_select(0, rows) for group, rows in zip(groups, kept, strict=True)]
    tokens, packing = _pack(chosen)
    parts = _unpack(branch(tokens, packing), packing)
    if kept is None:
        return [group + part for group, part in zip(groups, parts, strict=True)]
    return [
        group.index_add(0, rows, part.to(group.dtype), alpha=len(group) / len(rows))
        for group, rows, part in zip(groups, kept, parts, strict=True)
    ]


class VisionTransformer(nn.Module):
    """A Vision Transformer; `build` creates it. A call with (B, C, H, W) images gives their CLS tokens (B, D).

    A call with `is_training=True` gives the output of `forward_features`, as in DINOv2.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        feed_forward: FeedForward,
        patch_size: int,
        grid_size: int,
        num_register_tokens: int,
        cls_token: bool,
        in_channels: int,
        layer_scale: float | None,
        position_interpolation: PositionInterpolation,
    ) -> None:
        super().__init__()
        self.embed_dim = self.num_features = embed_dim
        self.n_blocks = depth
        self.num_heads = num_heads
        self.patch_size = patch_size
        self.num_register_tokens = num_register_tokens
        self.position_interpolation = position_interpolation

        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if cls_token else None
        # For the CLS token, if any, and the patches.
        self.pos_embed = nn.Parameter(torch.empty(1, int(cls_token) + grid_size**2, embed_dim))
        self.register_tokens = (
            nn.Parameter(torch.empty(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        )
        self.mask_token = nn.Parameter(torch.empty(1, embed_dim))
        self.patch_embed = PatchEmbed(patch_size, in_channels, embed_dim)
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, feed_forward, layer_scale is not None) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPSILON)
        self.head = nn.Identity()  # users may replace it; it has no weights

    @overload
    def forward(self, x: Tensor, *, is_training: Literal[False] = False, masks: Tensor | None = None) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, *, is_training: Literal[True], masks: Tensor | None = None) -> Features: ...
    @overload
    def forward(
        self,
        x: Sequence[Tensor],
        *,
        is_training: Literal[True],
        masks: Sequence[Tensor | None],
        kept: Sequence[Kept] | None = None,
    ) -> list[Features]: ...
    def forward(self, x, *, is_training=False, masks=None, kept=None):  # type: ignore[no-untyped-def]  # as above
        features = self.forward_features(x, masks, kept)
        if is_training:
            return features
        if self.cls_token is None:
            raise InputError("This backbone has no CLS token. Use x_norm_patchtokens of forward_features.")
        return self.head(features["x_norm_clstoken"])

    @overload
    def forward_features(self, x: Tensor, masks: Tensor | None = None, kept: None = None) -> Features: ...
    @overload
    def forward_features(
        self, x: Sequence[Tensor], masks: Sequence[Tensor | None], kept: Sequence[Kept] | None = None
    ) -> list[Features]: ...
    def forward_features(
        self,
        x: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
        kept: Sequence[Kept] | None = None,
    ) -> Features | list[Features]:
        """The tokens of (B, C, H, W) images. Where `masks` (B, N) is True, the mask token replaces the patch.

        A list of batches of several sizes, with a list of masks or Nones, gives a list. The batches pass the blocks
        together, in one matrix product. `kept` is stochastic depth: for each block and branch, the images of each
        batch for which the branch is computed; it is skipped for the others.
        """
        if isinstance(x, Tensor):
            assert (masks is None or isinstance(masks, Tensor)) and kept is None
            tokens = self._embed(x, masks)
            for block in self.blocks:
                tokens = block(tokens)
            return self._features(tokens, masks)
        assert masks is not None and not isinstance(masks, Tensor), "a list of batches comes with a list of masks"
        groups = [self._embed(batch, mask) for batch, mask in zip(x, masks, strict=True)]
        for index, block in enumerate(self.blocks):
            groups = block(groups, None if kept is None else kept[index])
        return [self._features(tokens, mask) for tokens, mask in zip(groups, masks, strict=True)]

    def _features(self, tokens: Tensor, masks: Tensor | None) -> Features:
        cls, registers, patches = self._split(self.norm(tokens))
        features: Features = {
            "x_norm_regtokens": registers,
            "x_norm_patchtokens": patches,
            "x_prenorm": tokens,
            "masks": masks,
        }
        if cls is not None:
            features["x_norm_clstoken"] = cls
        return features

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """The patch tokens after several blocks: the last `n`, or the blocks with the indices `n`, in block order.

        Each is (B, N, D), or with `reshape` (B, D, h, w); with `return_class_token` each is a pair with the CLS token
        (B, D). With `norm` the last norm is applied to each.
        """
        if return_class_token and self.cls_token is None:
            raise InputError("This backbone has no CLS token. Leave return_class_token False.")
        indices = range(self.n_blocks - n, self.n_blocks) if isinstance(n, int) else n
        absent = sorted(index for index in indices if not 0 <= index < self.n_blocks)
        if absent:
            raise InputError(f"Blocks {absent} were requested; this backbone has {self.n_blocks}, counted from 0.")
        grid = (x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size)
        patch_tokens: list[Tensor] = []
        class_tokens: list[Tensor] = []
        tokens = self._embed(x, None)
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            if index in indices:
                cls, _, patches = self._split(self.norm(tokens) if norm else tokens)
                if reshape:
                    patches = patches.transpose(1, 2).reshape(len(x), self.embed_dim, *grid)
                patch_tokens.append(patches)
                if cls is not None:
                    class_tokens.append(cls)
        return tuple(zip(patch_tokens, class_tokens, strict=True)) if return_class_token else tuple(patch_tokens)

    @torch.no_grad()
    def resize_positions(self, grid_size: int) -> None:
        """Resizes the positional embedding to grid_size x grid_size patches, by the interpolation for images of that
        size. For training that starts at another resolution."""
        positions = self._positions(grid_size, grid_size)
        self.pos_embed = nn.Parameter(positions.to(self.pos_embed.dtype).clone(), self.pos_embed.requires_grad)

    def _embed(self, x: Tensor, masks: Tensor | None) -> Tensor:
        """The (B, T, D) input of the first block. Registers have no position, so they are added after it."""
        height, width = x.shape[-2:]
        # The residual stream has the type of the tokens. Under autocast the projection's output is of a smaller type.
        patches = self.patch_embed(x).to(self.pos_embed.dtype)
        if masks is not None:
            patches = torch.where(masks.unsqueeze(-1), self.mask_token.to(patches.dtype).unsqueeze(0), patches)
        batch = len(patches)
        positions = self._positions(height // self.patch_size, width // self.patch_size).to(patches.dtype)
        if self.cls_token is not None:
            patches = torch.cat([self.cls_token.expand(batch, -1, -1), patches], dim=1)
        tokens = patches + positions
        if self.register_tokens is None:
            return tokens
        registers, first = self.register_tokens.expand(batch, -1, -1), self._first_register
        return torch.cat([tokens[:, :first], registers, tokens[:, first:]], dim=1)

    @property
    def _first_register(self) -> int:
        """Number of tokens before the registers: 1 with a CLS token, else 0."""
        return int(self.cls_token is not None)

    def _positions(self, rows: int, columns: int) -> Tensor:
        """The positional embedding (1, 1 + h*w, D) for rows x columns patches, interpolated in float32.

        Without a CLS token the shape is (1, h*w, D).
        """
        first = self._first_register
        side = math.isqrt(self.pos_embed.shape[1] - first)
        if rows == columns == side:
            return self.pos_embed
        positions = self.pos_embed.float()
        grid = positions[:, first:].transpose(1, 2).reshape(1, self.embed_dim, side, side)
        if self.position_interpolation == "offset":
            scale = ((rows + POSITION_OFFSET) / side, (columns + POSITION_OFFSET) / side)
            grid = functional.interpolate(grid, scale_factor=scale, mode="bicubic")
        else:
            antialias = self.position_interpolation == "antialias"
            grid = functional.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=antialias)
        assert grid.shape[-2:] == (rows, columns)
        return torch.cat([positions[:, :first], grid.flatten(2).transpose(1, 2)], dim=1)

    def _split(self, tokens: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        """(B, T, D) into CLS (B, D), registers (B, R, D) and patches (B, N, D)."""
        first_register = self._first_register
        first_patch = first_register + self.num_register_tokens
        cls = None if self.cls_token is None else tokens[:, 0]
        return cls, tokens[:, first_register:first_patch], tokens[:, first_patch:]


def _initialize(model: VisionTransformer, layer_scale: float | None, generator: torch.Generator) -> None:
    """Fills every parameter. Cited: DINOv2's initialisation; the patch projection has PyTorch's default for Conv2d."""
    for module in model.modules():
        match module:
            case nn.Linear():
                nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
                nn.init.zeros_(module.bias)
            case nn.Conv2d():
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
                bound = 1 / math.sqrt(module.weight[0].numel())
                assert module.bias is not None
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
            case nn.LayerNorm():
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            case LayerScale():
                assert layer_scale is not None
                nn.init.constant_(module.gamma, layer_scale)
    nn.init.trunc_normal_(model.pos_embed, std=0.02, generator=generator)
    if model.cls_token is not None:
        nn.init.normal_(model.cls_token, std=1e-6, generator=generator)
    nn.init.zeros_(model.mask_token)
    if model.register_tokens is not None:
        nn.init.normal_(model.register_tokens, std=1e-6, generator=generator)
