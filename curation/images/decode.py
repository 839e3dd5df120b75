"""Encoded bytes in, RGB out: the one decoder that every stage uses.

Pool images come from strangers, so the decoder trusts nothing: the signature of the bytes names the one parser that
may see them, the header is checked against `ImageLimits` before any pixel is decoded, and whatever goes wrong ends as
one `ImageRejected` with a reason from a closed list. Ingest runs this in a process apart (`sandbox.py`); later
stages run it in their own process, on images that ingest accepted.

How each colour mode of Pillow becomes RGB:

    mode                    rule
    1, L, RGB, RGBX, HSV    as Pillow converts them
    P                       through the palette
    YCbCr, CMYK, LAB        as Pillow converts them: YCbCr in the decoder; CMYK as (1 - ink) * (1 - black), with a
                            JPEG's inverted inks (Adobe's convention) set right; LAB as D50 to sRGB
    LA, RGBA, RGBa, PA      composed onto white
    transparent colour      (tRNS of PNG, GIF) composed onto white, for P also with one alpha per palette entry
    16 bits per channel     the high byte, in every mode: I;16, the I of a PGM, and RGB and RGBA, where Pillow does it
    other I, F              stretched: the image's smallest value becomes 0, its largest 255; one value alone becomes 0

ICC profiles and gamma are ignored, as ImageFolder-style loaders do. Of an animation or of several pages the first frame
counts. Orientation from EXIF (else from XMP) is applied; EXIF that cannot be parsed counts as absent.

Pillow decides what is accepted. Who will scale the picture down anyhow gives a `target_side`; then a plain JPEG that
Pillow's header parser and the limits have let pass goes to libjpeg-turbo through simplejpeg, which is faster, and comes
back to Pillow at the first warning.
"""

import io
import math
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import cast

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import (  # importing a plugin registers its format; with all seven here Pillow never imports the others
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)
from pydantic import Field

from curation.config import Settings
from curation.errors import SeedbedError

# The formats that are decoded, with the extension of their files. Left out on purpose: what runs other programs (EPS),
# what is no photograph or drawing of the web (FITS, HDF5, ...), and what needs codecs that Pillow may be built without.
EXTENSION_OF_FORMAT = {
    BmpImagePlugin.BmpImageFile.format: "bmp",
    GifImagePlugin.GifImageFile.format: "gif",
    JpegImagePlugin.JpegImageFile.format: "jpg",
    PngImagePlugin.PngImageFile.format: "png",
    PpmImagePlugin.PpmImageFile.format: "ppm",
    TiffImagePlugin.TiffImageFile.format: "tiff",
    WebPImagePlugin.WebPImageFile.format: "webp",
}

# The first bytes of each format; the names that are not in EXTENSION_OF_FORMAT only serve the message.
_SIGNATURES = re.compile(
    rb"""
      (?P<PNG>  \x89PNG\r\n\x1a\n)
    | (?P<JPEG> \xff\xd8\xff)
    | (?P<GIF>  GIF8[79]a)
    | (?P<WEBP> RIFF....WEBP)
    | (?P<BMP>  BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0)
    | (?P<TIFF> II[\x2a\x2b]\0 | MM\0[\x2a\x2b])
    | (?P<PPM>  P[1-6f][\s\x23])
    | (?P<AVIF> ....ftypavi[fs])
    | (?P<HEIF> ....ftyp(?:hei[cfmsvx]|hevc|mif1|msf1))
    | (?P<JPEG2000> \0\0\0\x0cjP\x20\x20 | \xff\x4f\xff\x51)
    | (?P<JPEGXL> \xff\x0a | \0\0\0\x0cJXL\x20)
    | (?P<ICO>  \0\0[\1\2]\0)
    | (?P<PSD>  8BPS)
    | (?P<EPS>  %!PS | \xc5\xd0\xd3\xc6)
    | (?P<PDF>  %PDF-)
    | (?P<SVG>  \s*(?:<\?xml[^>]*>\s*)?(?:<!--.{0,999}?-->\s*)?(?:<!DOCTYPE\ssvg[^>]*>\s*)?<svg)
    """,
    re.VERBOSE | re.DOTALL,
)

# Pillow refuses more on its own, through a global that this module leaves alone (twice PIL.Image.MAX_IMAGE_PIXELS).
_PILLOW_MAX_PIXELS = 178_956_970

# Characters of a decoder's message.
_MAX_DETAIL = 500

# What turns stored pixels upright, by EXIF orientation (CIPA DC-008, tag 0x0112); 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The orientations whose width is the height of what is stored.
_SIDEWAYS = frozenset({5, 6, 7, 8})


class ImageLimits(Settings):
    """What an image may cost. Anything beyond is rejected, not repaired."""

    max_bytes: int = Field(default=100_000_000, gt=0)
    """Encoded size in bytes. Assumed: above any photograph of the web, far below a worker's memory."""
    max_pixels: int = Field(default=50_000_000, gt=0, le=_PILLOW_MAX_PIXELS)
    """Width times height in pixels. Assumed: covers cameras up to 50 megapixels."""
    max_frames: int = Field(default=1_000, gt=0)
    """Frames or pages in one file, though only the first is decoded. Assumed: more is a film, not an image."""
    min_side: int = Field(default=16, gt=0)
    """Shorter side in pixels. Assumed: one ViT patch; below lie spacers and tracking pixels."""
    decode_timeout_seconds: float = Field(default=20.0, gt=0)
    """Processor time for one image in seconds: a busy machine rejects nothing that an idle one accepts. Enforced
    by `sandbox.py` only. Assumed: five times the 4 s
    measured for a PNG of 50 megapixels with transparency."""
    max_decode_memory_bytes: int = Field(default=1 << 30, gt=0)
    """Memory in bytes that the decoding process may take on top of what it has once started. Enforced by
    `sandbox.py` only, on Linux. Assumed: above the 0.2 GB (JPEG) to 0.8 GB (WebP) measured at 50 megapixels."""


class RejectReason(StrEnum):
    """Why an image is not in the data set: the closed list of the `reason` column."""

    UNREADABLE = "unreadable"
    """The bytes could not be read: no such file, no permission, a damaged archive member."""
    DAMAGED_ARCHIVE = "damaged_archive"
    """A tar or Parquet file that is cut off, damaged, compressed, or larger unpacked than its reader takes. What
    follows the damage is lost, so these count against the budget among such files, too."""
    LINK_OUTSIDE_SOURCE = "link_outside_source"
    """A link that leads out of its source's folder."""
    EMPTY = "empty"
    """No bytes."""
    TOO_MANY_BYTES = "too_many_bytes"
    """More bytes than `max_bytes`."""
    NOT_AN_IMAGE = "not_an_image"
    """The bytes begin like no image format known here, such as a web page saved under an image's name."""
    UNSUPPORTED_FORMAT = "unsupported_format"
    """An image, of a format that is not decoded; the detail names it."""
    TOO_MANY_PIXELS = "too_many_pixels"
    """More pixels than `max_pixels`, by the header."""
    TOO_MANY_FRAMES = "too_many_frames"
    """More frames or pages than `max_frames`."""
    TOO_SMALL = "too_small"
    """The shorter side is below `min_side`."""
    TRUNCATED = "truncated"
    """The file ends before its pixels do."""
    CORRUPT = "corrupt"
    """The decoder could not make sense of the header or of the pixels."""
    OUT_OF_MEMORY = "out_of_memory"
    """Decoding took more than `max_decode_memory_bytes`."""
    DECODER_TIMEOUT = "decoder_timeout"
    """Decoding took longer than `decode_timeout_seconds`."""
    DECODER_CRASHED = "decoder_crashed"
    """The decoding process died on this image, twice."""


class ImageRejected(SeedbedError):
    """One image cannot be used. Ingest turns it into a row of the rejects table."""

    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class ImageHeader:
    """What a file says of its image. `width` and `height` are in pixels as seen: after EXIF orientation."""

    width: int
    height: int
    format: str
    """A key of EXTENSION_OF_FORMAT."""
    mode: str
    """Pillow's name of the stored colour mode."""
    num_frames: int


def read_header(data: bytes, limits: ImageLimits) -> ImageHeader:
    """The header of an encoded image, without decoding pixels. Raises ImageRejected when it breaks a limit.

    A PNG may carry its orientation behind its pixels; only `decode` sees that.
    """
    with _rejections():
        image = _open(data, limits)
        # Pillow gives the size of a TIFF upright already. For the others the method of Image itself: PngImageFile's
        # decodes every pixel in search of EXIF behind them.
        orientation = 1 if image.format == "TIFF" else _orientation(partial(Image.Image.getexif, image))
        return _upright_header(_stored_header(image), orientation)


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded image as an array, for `to_shape` and `upright`."""

    pixels: NDArray[np.uint8]
    """(H, W, 3), RGB, rows as stored: not turned upright yet."""
    width: float
    """How much of W is picture. A JPEG of 1117 pixels has 279.25 at a quarter of its size, and W is 280."""
    height: float
    """The same of H."""
    orientation: int
    """By EXIF; 1 is upright."""


def decode_rgb(data: bytes, limits: ImageLimits, *, target_side: int | None = None) -> Image.Image:
    """The image as RGB, upright, by the rules on top of this module, without its metadata.

    The same bytes always give the same pixels. `target_side`: the caller will scale the shorter side down to this many
    pixels, so a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where both sides stay at or above that; other formats
    come whole. The same images are accepted with and without it. Raises ImageRejected.
    """
    return decode(data, limits, target_side=target_side)[1]


def decode(data: bytes, limits: ImageLimits, *, target_side: int | None = None) -> tuple[ImageHeader, Image.Image]:
    """The header, always of the full size, and the pixels of `decode_rgb`, from one decode. Raises ImageRejected."""
    decoded = _decode(data, limits, target_side)
    image = decoded.pixels if isinstance(decoded.pixels, Image.Image) else Image.fromarray(decoded.pixels)
    return _upright_header(decoded.header, decoded.orientation), _turned(image, decoded.orientation)


def decode_picture(data: bytes, limits: ImageLimits, *, target_side: int) -> Picture:
    """What `decode_rgb` decodes, in less time for a JPEG, since Pillow keeps pixels in a form of its own."""
    decoded = _decode(data, limits, target_side)
    pixels = np.array(decoded.pixels) if isinstance(decoded.pixels, Image.Image) else decoded.pixels
    height, width = pixels.shape[:2]
    if decoded.by > 1:
        width, height = decoded.header.width / decoded.by, decoded.header.height / decoded.by
    return Picture(pixels, width, height, decoded.orientation)


def upright(picture: Picture) -> Image.Image:
    """The picture as `decode_rgb` gives it."""
    return _turned(Image.fromarray(picture.pixels), picture.orientation)


def to_shape(picture: Picture, shape: tuple[int, int], *, crop: bool = False) -> NDArray[np.uint8]:
    """The picture, upright, at the `shape` (H, W) that a model sees, (3, H, W): all, or with `crop` its middle square.

    Bicubic with antialiasing, as `Image.resize` does it, but in vector instructions: from a picture that was decoded
    whole, 53 dB or more (PSNR) from Pillow's. From a JPEG that was scaled while it was decoded, on photographs of
    2000 x 1500 at 224, 52 dB in the mean and 45 at worst (measured 2026-11); 42 where it comes out at 224 already.
    """
    # Not on top of the module: the processes that decode for ingest would spend a second and 200 MB on it.
    import torch
    from torch.nn import functional

    pixels, width, height = picture.pixels, picture.width, picture.height
    if crop:
        shorter = min(width, height)
        left, top = int(width - shorter) // 2, int(height - shorter) // 2
        width = height = shorter
        pixels = pixels[top : top + math.ceil(shorter), left : left + math.ceil(shorter)]
    rows, columns = shape[::-1] if picture.orientation in _SIDEWAYS else shape
    # The part of the last row and column that is no picture goes beyond the shape. The millionth keeps the number of
    # rows and columns from being rounded down below it.
    scales = [rows / height * (1 + 1e-6), columns / width * (1 + 1e-6)]
    whole = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    shaped = functional.interpolate(whole, scale_factor=scales, mode="bicubic", antialias=True)[0].numpy()
    return _turned_pixels(shaped[:, :rows, :columns], picture.orientation)


def check_length(data: bytes, limits: ImageLimits) -> None:
    """Raise ImageRejected for no bytes, and for more than `max_bytes`."""
    if not data:
        raise ImageRejected(RejectReason.EMPTY, "0 bytes")
    if len(data) > limits.max_bytes:
        raise ImageRejected(RejectReason.TOO_MANY_BYTES, f"{len(data)} bytes; max_bytes is {limits.max_bytes}")


@contextmanager
def _rejections() -> Iterator[None]:
    """Turn whatever Pillow raises on a stranger's bytes into ImageRejected."""
    try:
        yield
    except ImageRejected:
        raise
    except MemoryError:
        raise ImageRejected(RejectReason.OUT_OF_MEMORY, "memory ran out while decoding") from None
    except Image.DecompressionBombError as error:
        raise ImageRejected(RejectReason.TOO_MANY_PIXELS, str(error)) from None
    # Pillow's parsers raise a dozen kinds on malformed bytes (OSError, SyntaxError, ValueError, KeyError, struct.error,
    # ...) and promise no list. Each becomes a counted row with its text, and rows spend the reject budget.
    except Exception as error:
        # What it quotes of the file may be long, and no text that can be written.
        detail = f"{type(error).__name__}: {error}"[:_MAX_DETAIL].encode(errors="backslashreplace").decode()
        if "truncated" in detail.lower():
            raise ImageRejected(RejectReason.TRUNCATED, detail) from None
        if "out of memory" in detail.lower():
            raise ImageRejected(RejectReason.OUT_OF_MEMORY, detail) from None
        raise ImageRejected(RejectReason.CORRUPT, detail) from None


@dataclass(frozen=True, eq=False)
class _Decoded:
    """An image as it is stored, not upright: its header, its pixels as they came, and by what they were scaled down."""

    header: ImageHeader
    pixels: Image.Image | NDArray[np.uint8]
    orientation: int
    by: int


def _decode(data: bytes, limits: ImageLimits, target_side: int | None) -> _Decoded:
    with _rejections():
        image = _open(data, limits)
        header = _stored_header(image)
        by = 1
        if target_side is not None and header.format == "JPEG" and _scalable_size(data) == image.size:
            by = next(by for by in (8, 4, 2, 1) if by == 1 or min(image.size) >= by * target_side)
            if image.mode in ("L", "RGB"):
                scaled = _decode_scaled(data, -(-header.width // by), -(-header.height // by))
                if scaled is not None:
                    return _Decoded(header, scaled, _orientation(image.getexif), by)
            image.draft(None, (target_side, target_side))  # Pillow scales by the same rule
        _scale_transparent_color(image)
        image.load()
        orientation = _orientation(image.getexif)
        return _Decoded(header, _to_rgb(image), orientation, by)


def _turned(pixels: Image.Image, orientation: int) -> Image.Image:
    """The stored image turned upright, without its metadata."""
    if orientation in _UPRIGHT:
        pixels = pixels.transpose(_UPRIGHT[orientation])
    pixels.info = {}
    return pixels


def _turned_pixels(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """The same for pixels (3, H, W)."""
    if orientation in _SIDEWAYS:
        pixels = pixels.transpose(0, 2, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, :, ::-1]
    return np.ascontiguousarray(pixels)


def _open(data: bytes, limits: ImageLimits) -> ImageFile.ImageFile:
    """The image with its header parsed and within limits, and no pixel decoded."""
    check_length(data, limits)
    signature = _SIGNATURES.match(data)
    if signature is None:
        raise ImageRejected(RejectReason.NOT_AN_IMAGE, f"begins with {data[:16]!r}")
    name = cast(str, signature.lastgroup)
    if name not in EXTENSION_OF_FORMAT:
        raise ImageRejected(RejectReason.UNSUPPORTED_FORMAT, name)
    try:
        image = Image.open(io.BytesIO(data), formats=[name])
    except UnidentifiedImageError:
        raise ImageRejected(RejectReason.CORRUPT, f"the {name} header cannot be parsed") from None
    width, height = image.size
    if width * height > limits.max_pixels:
        detail = f"{width} x {height} = {width * height} pixels; max_pixels is {limits.max_pixels}"
        raise ImageRejected(RejectReason.TOO_MANY_PIXELS, detail)
    if min(width, height) < limits.min_side:
        raise ImageRejected(RejectReason.TOO_SMALL, f"{width} x {height} pixels; min_side is {limits.min_side}")
    if _num_frames(image) > limits.max_frames:
        detail = f"{_num_frames(image)} frames; max_frames is {limits.max_frames}"
        raise ImageRejected(RejectReason.TOO_MANY_FRAMES, detail)
    return image


def _decode_scaled(data: bytes, width: int, height: int) -> NDArray[np.uint8] | None:
    """A JPEG at the size (H, W, 3), which is a 1/1, 1/2, 1/4 or 1/8 of its own; None where Pillow has to decode it.

    libjpeg-turbo knows other fractions, but for these alone it has vector instructions.
    """
    buffer = np.empty((height, width, 3), np.uint8)  # decode_jpeg refuses a picture that is larger
    try:
        pixels = simplejpeg.decode_jpeg(data, min_height=height, min_width=width, buffer=buffer)
    except ValueError:  # an error, or a mere warning of libjpeg: Pillow tells what is to be rejected, and why
        return None
    return pixels if pixels.shape == buffer.shape else None


def _scalable_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a baseline, extended or progressive JPEG in Huffman code; None for anything less plain."""
    position = 2
    while len(segment := data[position : position + 9]) == 9 and segment[0] == 0xFF:
        marker = segment[1]
        if marker in (0xC0, 0xC1, 0xC2):  # a frame header; lossless and hierarchical ones do not scale
            return int.from_bytes(segment[7:9]), int.from_bytes(segment[5:7])
        if not (marker in (0xC4, 0xDB, 0xDD, 0xFE) or 0xE0 <= marker <= 0xEF):  # tables, comments, application data
            return None
        position += 2 + int.from_bytes(segment[2:4])
    return None


def _num_frames(image: ImageFile.ImageFile) -> int:
    return int(getattr(image, "n_frames", 1))  # the classes of single-frame formats lack the attribute


def _stored_header(image: ImageFile.ImageFile) -> ImageHeader:
    # A JPEG with further pictures behind it (MPO: burst shots, stereo) is a JPEG to every reader but Pillow.
    name = "JPEG" if image.format == "MPO" else cast(str, image.format)
    return ImageHeader(*image.size, format=name, mode=image.mode, num_frames=_num_frames(image))


def _upright_header(header: ImageHeader, orientation: int) -> ImageHeader:
    return replace(header, width=header.height, height=header.width) if orientation in _SIDEWAYS else header


def _orientation(read_exif: Callable[[], Image.Exif]) -> int:
    """The EXIF orientation, 1 (upright) where there is none or where the EXIF cannot be parsed."""
    try:
        return cast(int, read_exif().get(ExifTags.Base.Orientation, 1))
    except (KeyError, SyntaxError, TypeError, ValueError, struct.error):  # what Pillow's JPEG reader takes for bad EXIF
        return 1


def _scale_transparent_color(image: ImageFile.ImageFile) -> None:
    """Bring the transparent colour of a grey or RGB PNG to the 8 bits that its pixels get.

    PNG states the colour at the file's bit depth and Pillow hands it on as it stands. Of 16 bits the high bytes count.
    """
    color = image.info.get("transparency")
    if image.format != "PNG" or color is None or not image.tile:
        return
    match image.tile[0].args:
        case "L;2":
            image.info["transparency"] = color * 0x55
        case "L;4":
            image.info["transparency"] = color * 0x11
        case "I;16B":
            image.info["transparency"] = color >> 8
        case "RGB;16B":
            image.info["transparency"] = tuple(channel >> 8 for channel in color)


def _to_rgb(image: Image.Image) -> Image.Image:
    """The decoded image as RGB, by the table on top of this module."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        image = _high_byte(image)
    elif image.mode in ("I", "F"):
        image = _stretched(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGB", layer.size, "white")
    white.paste(layer, mask=layer)
    return white


def _high_byte(image: Image.Image) -> Image.Image:
    """Values of 0..65535 as mode L. Exact for 8-bit values that were widened by 257."""
    grey = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    grey.info = image.info
    return grey


def _stretched(image: Image.Image) -> Image.Image:
    """Integer or float values as mode L, the smallest as 0 and the largest as 255."""
    if not np.isfinite(np.asarray(image)).all():
        raise ImageRejected(RejectReason.CORRUPT, "pixels that are not finite numbers")
    low, high = cast(tuple[float, float], image.getextrema())
    scale = 255 / (high - low) if high > low else 0.0
    # Image.point() on these modes takes a linear function; convert() cuts off decimals, hence the half.
    return image.point(lambda value: value * scale + (0.5 - low * scale)).convert("L")
