"""The one decoder of every stage: encoded bytes in, RGB out.

Pool images are untrusted input. The signature of the bytes selects the one parser that may read them. The header is
checked against `ImageLimits` before any pixel is decoded. Every failure ends as one `ImageRejected` with a reason from
a closed list. Ingest decodes in a separate process (`sandbox.py`); later stages decode in their own process, and only
images that ingest accepted.

How each colour mode of Pillow becomes RGB:

    mode                    rule
    1, L, RGB, RGBX, HSV    as Pillow converts them
    P                       through the palette
    YCbCr, CMYK, LAB        as Pillow converts them: YCbCr in the decoder; CMYK as (1 - ink) * (1 - black), with a
                            JPEG's inverted inks (Adobe's convention) set right; LAB as D50 to sRGB
    LA, RGBA, RGBa, PA      composed onto white
    transparent colour      (tRNS of PNG, GIF) composed onto white, for P also with one alpha per palette entry
    16 bits per channel     the high byte, in every mode: I;16, the I of a PGM, and RGB and RGBA, where Pillow does it
    other I, F              stretched: the image's smallest value becomes 0, its largest 255; equal values become 0

ICC profiles and gamma are ignored, as in loaders like ImageFolder. Of several frames or pages, the first is decoded.
Orientation from EXIF (else from XMP) is applied; EXIF that cannot be parsed counts as absent.

Pillow decides which images are accepted. A caller that scales the image down afterwards gives a `target_side`. A plain
JPEG that passed Pillow's header parser and the limits is then decoded by libjpeg-turbo (simplejpeg), which is faster.
At its first warning, Pillow decodes the image instead.
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
from PIL import (  # importing a plugin registers its format; with these seven Pillow never imports the others
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

# The decoded formats, with the extension of their files. Left out on purpose: formats whose readers run other programs
# (EPS), formats that the web does not use (FITS, HDF5, ...), and formats whose codecs Pillow may be built without.
EXTENSION_OF_FORMAT = {
    BmpImagePlugin.BmpImageFile.format: "bmp",
    GifImagePlugin.GifImageFile.format: "gif",
    JpegImagePlugin.JpegImageFile.format: "jpg",
    PngImagePlugin.PngImageFile.format: "png",
    PpmImagePlugin.PpmImageFile.format: "ppm",
    TiffImagePlugin.TiffImageFile.format: "tiff",
    WebPImagePlugin.WebPImageFile.format: "webp",
}

# The first bytes of each format. Names that are not in EXTENSION_OF_FORMAT serve the message only.
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

# Vector graphics, documents and icons: a file without an image's name is not taken for an image because of them.
_NO_PHOTOGRAPHS = frozenset({"ICO", "PSD", "EPS", "PDF", "SVG"})

# Pillow itself refuses more pixels, by a global that this module does not change (twice PIL.Image.MAX_IMAGE_PIXELS).
_PILLOW_MAX_PIXELS = 178_956_970

# Characters of a decoder's message.
_MAX_DETAIL = 500

# The operation that turns stored pixels upright, by EXIF orientation (CIPA DC-008, tag 0x0112); 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The orientations for which the upright width is the stored height.
_SIDEWAYS = frozenset({5, 6, 7, 8})


class ImageLimits(Settings):
    """Limits on the cost of an image. An image beyond a limit is rejected, not repaired."""

    max_bytes: int = Field(default=100_000_000, gt=0)
    """Encoded size in bytes. Assumed: above any photograph on the web, far below a worker's memory."""
    max_pixels: int = Field(default=50_000_000, gt=0, le=_PILLOW_MAX_PIXELS)
    """Width times height in pixels. Assumed: covers cameras up to 50 megapixels."""
    max_frames: int = Field(default=1_000, gt=0)
    """Frames or pages in one file, though only the first is decoded. Assumed: more frames are a film."""
    min_side: int = Field(default=16, gt=0)
    """Shorter side in pixels. Assumed: one ViT patch; smaller images are spacers and tracking pixels."""
    decode_timeout_seconds: float = Field(default=20.0, gt=0)
    """Processor time for one image in seconds, so that a busy machine accepts the same images as an idle one. Enforced
    by `sandbox.py` only. Assumed: five times the 4 s measured for a PNG of 50 megapixels with transparency."""
    max_decode_memory_bytes: int = Field(default=1 << 30, gt=0)
    """Memory in bytes that the decoding process may take beyond its memory after its start. Enforced by `sandbox.py`
    only, on Linux. Assumed: above the 0.2 GB (JPEG) to 0.8 GB (WebP) measured at 50 megapixels."""


class RejectReason(StrEnum):
    """Why an image was not accepted: the closed list of the `reason` column."""

    UNREADABLE = "unreadable"
    """The bytes could not be read: no such file, no permission, a damaged archive member."""
    DAMAGED_ARCHIVE = "damaged_archive"
    """A tar or Parquet file that is cut off, damaged, compressed, or larger unpacked than its reader accepts. Images
    behind the damage are lost, so these files also have a budget of their own."""
    LINK_OUTSIDE_SOURCE = "link_outside_source"
    """A link whose target is outside its source's folder."""
    EMPTY = "empty"
    """No bytes."""
    TOO_MANY_BYTES = "too_many_bytes"
    """More bytes than `max_bytes`."""
    NOT_AN_IMAGE = "not_an_image"
    """The bytes begin like no known image format, such as a web page saved under an image's name."""
    UNSUPPORTED_FORMAT = "unsupported_format"
    """An image of a format that is not decoded; the detail names the format."""
    TOO_MANY_PIXELS = "too_many_pixels"
    """More pixels than `max_pixels`, by the header."""
    TOO_MANY_FRAMES = "too_many_frames"
    """More frames or pages than `max_frames`."""
    TOO_SMALL = "too_small"
    """The shorter side is below `min_side`."""
    TRUNCATED = "truncated"
    """The file ends before its pixels do."""
    CORRUPT = "corrupt"
    """The decoder could not read the header or the pixels."""
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
    """The properties of an image that its file states. `width` and `height` are in pixels, after EXIF orientation."""

    width: int
    height: int
    format: str
    """A key of EXTENSION_OF_FORMAT."""
    mode: str
    """Pillow's name of the stored colour mode."""
    num_frames: int


def read_header(data: bytes, limits: ImageLimits) -> ImageHeader:
    """The header of an encoded image, without decoding pixels. Raises ImageRejected for an image beyond a limit.

    A PNG may hold its orientation behind its pixels; only `decode` reads that.
    """
    with _rejections():
        image = _open(data, limits)
        # Pillow gives the upright size of a TIFF. For the others, the method of Image itself is called: that of
        # PngImageFile decodes every pixel in search of EXIF behind them.
        orientation = 1 if image.format == "TIFF" else _orientation(partial(Image.Image.getexif, image))
        return _upright_header(_stored_header(image), orientation)


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded image as an array, for `to_shape` and `upright`."""

    pixels: NDArray[np.uint8]
    """(H, W, 3), RGB, rows as stored: not turned upright yet."""
    width: float
    """The part of W that shows the image. A JPEG of 1117 pixels has 279.25 at a quarter of its size, and W is 280."""
    height: float
    """The same of H."""
    orientation: int
    """By EXIF; 1 is upright."""


def decode_rgb(data: bytes, limits: ImageLimits, *, target_side: int | None = None) -> Image.Image:
    """The image as RGB, upright, by the rules on top of this module, without its metadata. Raises ImageRejected.

    The same bytes always give the same pixels. `target_side`: the caller will scale the shorter side down to this many
    pixels. A JPEG is then decoded at 1/2, 1/4 or 1/8 of its size, if both sides stay at least `target_side`; other
    formats are decoded at full size. The same images are accepted with and without it.
    """
    return decode(data, limits, target_side=target_side)[1]


def decode(data: bytes, limits: ImageLimits, *, target_side: int | None = None) -> tuple[ImageHeader, Image.Image]:
    """The header, always of the full size, and the pixels of `decode_rgb`, from one decode. Raises ImageRejected."""
    decoded = _decode(data, limits, target_side)
    image = decoded.pixels if isinstance(decoded.pixels, Image.Image) else Image.fromarray(decoded.pixels)
    return _upright_header(decoded.header, decoded.orientation), _turned(image, decoded.orientation)


def decode_picture(data: bytes, limits: ImageLimits, *, target_side: int) -> Picture:
    """The pixels of `decode_rgb` as an array. Faster for a JPEG: it is not copied into Pillow's format."""
    decoded = _decode(data, limits, target_side)
    pixels = np.array(decoded.pixels) if isinstance(decoded.pixels, Image.Image) else decoded.pixels
    height, width = pixels.shape[:2]
    if decoded.divisor > 1:
        width, height = decoded.header.width / decoded.divisor, decoded.header.height / decoded.divisor
    return Picture(pixels, width, height, decoded.orientation)


def upright(picture: Picture) -> Image.Image:
    """The picture as an upright image, as `decode_rgb` gives it."""
    return _turned(Image.fromarray(picture.pixels), picture.orientation)


def to_shape(picture: Picture, shape: tuple[int, int], *, crop: bool = False) -> NDArray[np.uint8]:
    """The picture, or with `crop` its middle square, upright and scaled to `shape` (H, W): (3, H, W).

    Bicubic with antialiasing, as `Image.resize` does it, but in vector instructions. From a picture decoded at full
    size, the result is 53 dB or more (PSNR) from Pillow's. From a JPEG that was scaled while it was decoded:
    photographs of 2000 x 1500 at 224 are 52 dB from Pillow's on average and 45 at worst (measured 2026-11), and 42 dB
    where the decoder already gives 224 pixels.
    """
    # Imported here because the decoding processes of ingest would spend a second and 200 MB on it.
    import torch
    from torch.nn import functional

    pixels, width, height = picture.pixels, picture.width, picture.height
    if crop:
        shorter = min(width, height)
        left, top = int(width - shorter) // 2, int(height - shorter) // 2
        width = height = shorter
        pixels = pixels[top : top + math.ceil(shorter), left : left + math.ceil(shorter)]
    rows, columns = shape[::-1] if picture.orientation in _SIDEWAYS else shape
    # Padding in the last row and column of `pixels` is scaled to beyond the shape. The millionth prevents a number of
    # rows and columns that is rounded down to less than the shape.
    scales = [rows / height * (1 + 1e-6), columns / width * (1 + 1e-6)]
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    scaled = functional.interpolate(batch, scale_factor=scales, mode="bicubic", antialias=True)[0].numpy()
    return _turned_pixels(scaled[:, :rows, :columns], picture.orientation)


def check_length(data: bytes, limits: ImageLimits) -> None:
    """Raises ImageRejected for no bytes and for more than `max_bytes`."""
    if not data:
        raise ImageRejected(RejectReason.EMPTY, "0 bytes")
    if len(data) > limits.max_bytes:
        raise ImageRejected(RejectReason.TOO_MANY_BYTES, f"{len(data)} bytes; max_bytes is {limits.max_bytes}")


def begins_like_an_image(start: bytes) -> bool:
    """Whether the first bytes of a file (32 are enough) are those of an image of pixels, decoded or not."""
    signature = _SIGNATURES.match(start)
    return signature is not None and signature.lastgroup not in _NO_PHOTOGRAPHS


@contextmanager
def _rejections() -> Iterator[None]:
    """Turns every exception that Pillow raises on untrusted bytes into ImageRejected."""
    try:
        yield
    except ImageRejected:
        raise
    except MemoryError:
        raise ImageRejected(RejectReason.OUT_OF_MEMORY, "memory ran out while decoding") from None
    except Image.DecompressionBombError as error:
        raise ImageRejected(RejectReason.TOO_MANY_PIXELS, str(error)) from None
    # Pillow's parsers raise a dozen exceptions on malformed bytes (OSError, SyntaxError, ValueError, KeyError,
    # struct.error, ...) and document no list. Each becomes a counted reject with its text, within the reject budget.
    except Exception as error:
        # A message may quote long parts of the file, and characters that UTF-8 cannot encode.
        detail = f"{type(error).__name__}: {error}"[:_MAX_DETAIL].encode(errors="backslashreplace").decode()
        if "truncated" in detail.lower():
            raise ImageRejected(RejectReason.TRUNCATED, detail) from None
        if "out of memory" in detail.lower():
            raise ImageRejected(RejectReason.OUT_OF_MEMORY, detail) from None
        raise ImageRejected(RejectReason.CORRUPT, detail) from None


@dataclass(frozen=True, eq=False)
class _Decoded:
    """A decoded image as it is stored, not turned upright."""

    header: ImageHeader
    pixels: Image.Image | NDArray[np.uint8]
    orientation: int
    divisor: int
    """The sides of `pixels` are those of the header divided by this."""


def _decode(data: bytes, limits: ImageLimits, target_side: int | None) -> _Decoded:
    with _rejections():
        image = _open(data, limits)
        header = _stored_header(image)
        divisor = 1
        if target_side is not None and header.format == "JPEG" and _scalable_size(data) == image.size:
            divisor = next(by for by in (8, 4, 2, 1) if by == 1 or min(image.size) >= by * target_side)
            if image.mode in ("L", "RGB"):
                scaled = _decode_scaled(data, -(-header.width // divisor), -(-header.height // divisor))
                if scaled is not None:
                    return _Decoded(header, scaled, _orientation(image.getexif), divisor)
            image.draft(None, (target_side, target_side))  # Pillow scales by the same rule
        _scale_transparent_color(image)
        image.load()
        orientation = _orientation(image.getexif)
        return _Decoded(header, _to_rgb(image), orientation, divisor)


def _turned(pixels: Image.Image, orientation: int) -> Image.Image:
    """The stored image turned upright, without its metadata."""
    if orientation in _UPRIGHT:
        pixels = pixels.transpose(_UPRIGHT[orientation])
    pixels.info = {}
    return pixels


def _turned_pixels(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Stored pixels (3, H, W) turned upright."""
    if orientation in _SIDEWAYS:
        pixels = pixels.transpose(0, 2, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, :, ::-1]
    return np.ascontiguousarray(pixels)


def _open(data: bytes, limits: ImageLimits) -> ImageFile.ImageFile:
    """The image with its header parsed and within the limits, and no pixel decoded."""
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
    """A JPEG at 1/1, 1/2, 1/4 or 1/8 of its size, (height, width, 3); None where Pillow has to decode it.

    libjpeg-turbo offers other fractions, but has vector instructions only for these.
    """
    buffer = np.empty((height, width, 3), np.uint8)  # decode_jpeg refuses an image that is larger
    try:
        pixels = simplejpeg.decode_jpeg(data, min_height=height, min_width=width, buffer=buffer)
    except ValueError:  # an error or only a warning of libjpeg; Pillow decides on the rejection and its reason
        return None
    return pixels if pixels.shape == buffer.shape else None


def _scalable_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a baseline, extended or progressive JPEG in Huffman code; None for any other JPEG."""
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
    # A JPEG followed by further images (MPO: burst shots, stereo) is a JPEG to every reader but Pillow.
    name = "JPEG" if image.format == "MPO" else cast(str, image.format)
    return ImageHeader(*image.size, format=name, mode=image.mode, num_frames=_num_frames(image))


def _upright_header(header: ImageHeader, orientation: int) -> ImageHeader:
    return replace(header, width=header.height, height=header.width) if orientation in _SIDEWAYS else header


def _orientation(read_exif: Callable[[], Image.Exif]) -> int:
    """The EXIF orientation; 1 (upright) without EXIF or where it cannot be parsed."""
    try:
        return cast(int, read_exif().get(ExifTags.Base.Orientation, 1))
    except (KeyError, SyntaxError, TypeError, ValueError, struct.error):  # as Pillow's JPEG reader treats bad EXIF
        return 1


def _scale_transparent_color(image: ImageFile.ImageFile) -> None:
    """Converts the transparent colour of a grey or RGB PNG to 8 bits, as its pixels are.

    PNG states the colour at the file's bit depth, and Pillow passes it on unchanged. Of 16 bits the high byte is kept.
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
    """Values of 0..65535 as mode L. Exact for 8-bit values that were multiplied by 257."""
    grey = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    grey.info = image.info
    return grey


def _stretched(image: Image.Image) -> Image.Image:
    """Integer or float values as mode L, the smallest as 0 and the largest as 255."""
    if not np.isfinite(np.asarray(image)).all():
        raise ImageRejected(RejectReason.CORRUPT, "pixels that are not finite numbers")
    low, high = cast(tuple[float, float], image.getextrema())
    scale = 255 / (high - low) if high > low else 0.0
    # Image.point() on these modes takes a linear function. The half rounds, because convert() cuts off decimals.
    return image.point(lambda value: value * scale + (0.5 - low * scale)).convert("L")
