"""The one decoder of every stage: encoded bytes in, RGB out.

Pool images are untrusted input. The signature of the bytes selects the one parser that may read them. The header is
checked against `ImageLimits` before any pixel is decoded. Every failure ends as one `ImageRejected` with a reason from
a closed list. Ingest decodes in a separate process (`sandbox.py`); later stages decode in their own process, and only
images that ingest accepted. They run the same code on the same bytes, but for one step: ingest decodes a JPEG at full
size, a later stage at 1/2, 1/4 or 1/8 too. The parsers and the entropy decoding are then the same. The inverse
transforms of reduced size have not run on these bytes in a separate process.

How each colour mode of Pillow becomes RGB:

    mode                    rule
    1, L, RGB, RGBX, HSV    as Pillow converts them
    P                       through the palette
    YCbCr, CMYK, LAB        as Pillow converts them: YCbCr in the decoder; CMYK as (1 - ink) * (1 - black), with a
                            JPEG's inverted inks (Adobe's convention) set right; LAB as D50 to sRGB
    LA, RGBA, RGBa, PA      composed onto white; a BMP whose alpha is 0 everywhere is opaque
    transparent colour      (tRNS of PNG, GIF) composed onto white, for P also with one alpha per palette entry
    16 bits per channel     grey, RGB and RGBA: the highest 8 bits of the image's range, which has 8, 10, 12, 14 or 16
                            bits: the fewest that hold its largest value. So 12-bit values of a microscope become
                            value / 16. Alpha, CMYK and grey with alpha: the high byte. A PPM states its range
    I, F, signed TIFF       stretched: the image's smallest value becomes 0, its largest 255; equal values become 0
    WhiteIsZero (TIFF)      inverted
    ICC profile             RGB becomes sRGB (`color_profiles.py`); profiles of grey and of inks are ignored

Gamma is ignored, as in loaders like ImageFolder. Of an animation, the first frame is decoded; where it is smaller than
its canvas, it lies on white. A TIFF of several full pages is rejected. Orientation from EXIF (else from XMP) is
applied; EXIF that cannot be parsed counts as absent.

Pillow decides which images are accepted. A plain JPEG that passed Pillow's header parser and the limits is decoded by
libjpeg-turbo (simplejpeg), which is faster and gives the same pixels at full size. At its first warning, Pillow decodes
the image instead. A caller that scales the image down afterwards gives a `target_side`.
"""

import io
import logging
import math
import re
import struct
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Any, cast

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import (  # importing a plugin registers its format; with these eight Pillow never imports the others
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)
from PIL.ImageCms import ImageCmsTransform
from pydantic import Field

from curation.config import Settings
from curation.errors import SeedbedError
from curation.images.color_profiles import conversion_to_srgb, convert

# The decoded formats, with the extension of their files. Left out on purpose: formats whose readers run other programs
# (EPS), formats that the web does not use (FITS, HDF5, ...), and formats that Pillow does not carry (HEIF, JPEG XL).
EXTENSION_OF_FORMAT = {
    AvifImagePlugin.AvifImageFile.format: "avif",
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
    | (?P<AVIF> ....ftyp(?:avi[fs] | (?:mif1|msf1).{4}(?:.{4}){0,9}?avi[fs]))
    | (?P<HEIF> ....ftyp(?:hei[cfmsvx]|hevc|hevx|mif1|msf1))
    | (?P<JPEG2000> \0\0\0\x0cjP\x20\x20 | \xff\x4f\xff\x51)
    | (?P<JPEGXL> \xff\x0a | \0\0\0\x0cJXL\x20)
    | (?P<ICO>  \0\0[\1\2]\0)
    | (?P<PSD>  8BPS)
    | (?P<EPS>  %!PS | \xc5\xd0\xd3\xc6)
    | (?P<PDF>  %PDF-)
    | (?P<FITS> SIMPLE\x20\x20=)
    | (?P<HDF5> \x89HDF\r\n\x1a\n)
    | (?P<SVG>  \s*(?:<\?xml[^>]*>\s*)?(?:<!--.{0,999}?-->\s*)?(?:<!DOCTYPE\ssvg[^>]*>\s*)?<svg)
    | (?P<DICOM> .{128}DICM)
    """,
    re.VERBOSE | re.DOTALL,
)

# Vector graphics, documents, icons and containers of any data: a file without an image's name is not taken for an
# image because of them.
_NO_PHOTOGRAPHS = frozenset({"ICO", "PSD", "EPS", "PDF", "SVG", "HDF5"})

# Pillow warns of many pixels, of bad EXIF and of odd tags, by Python's warnings and by its log. No warning is lost
# information: `ImageLimits` rejects what is too large, an exception becomes a reject with its text, and bad EXIF counts
# as absent. The filter is set once, when this module is imported, because `warnings.catch_warnings` is not safe in
# threads, and threads decode. It covers Pillow's modules only. A handler of the user still gets the log.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())

# Otherwise Pillow starts a thread for each core, and their memory would count as memory of the image.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

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

# The stored modes to which an ICC profile of RGB applies.
_MODES_OF_RGB = frozenset({"RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "YCbCr"})

# Pillow decodes the high byte of colours of 16 bits, by these raw modes. Read in the other order of bytes, the same
# files give the low byte. "N" is the order of this machine.
_OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
_LOW_BYTE_OF = {
    f"{channels};16{order}": f"{channels};16{other}"
    for channels in ("RGB", "RGBX", "RGBA")
    for order, other in _OTHER_ORDER.items()
}

# Rows of an image that are scaled at once. Assumed.
_ROWS_OF_STRIP = 256

# Tags of TIFF 6.0.
_SUBFILE_TYPE, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANAR, _SAMPLE_FORMAT = 254, 258, 259, 262, 277, 284, 339
_WHITE_IS_ZERO, _SEPARATE_PLANES, _UNSIGNED, _SIGNED = 0, 2, 1, 2
# Bits of SubfileType: a page that is a smaller copy of another one, and a page that is a mask.
_SMALLER_COPY, _MASK = 1, 4


class ImageLimits(Settings):
    """Limits on the cost of an image. An image beyond a limit is rejected, not repaired."""

    max_bytes: int = Field(default=100_000_000, gt=0)
    """Encoded size in bytes. Assumed: above any photograph on the web, far below a worker's memory."""
    max_pixels: int = Field(default=50_000_000, gt=0, le=_PILLOW_MAX_PIXELS)
    """Width times height in pixels. Assumed: covers cameras up to 50 megapixels."""
    max_frames: int = Field(default=1_000, gt=0)
    """Frames of an animation, though only the first is decoded, or pages. Assumed: more frames are a film."""
    min_side: int = Field(default=16, gt=0)
    """Shorter side in pixels. Assumed: one ViT patch; smaller images are spacers and tracking pixels."""
    decode_timeout_seconds: float = Field(default=20.0, gt=0)
    """Processor time for one image in seconds, so that a busy machine accepts the same images as an idle one. Enforced
    by `sandbox.py` only. Assumed: five times the 4 s measured for a PNG of 50 megapixels with transparency."""
    max_decode_memory_bytes: int = Field(default=1 << 30, gt=0)
    """Memory in bytes that the decoding process may take beyond its memory after its start. Enforced by `sandbox.py`
    only, on Linux. Assumed: above the 0.4 GB (JPEG) to 0.8 GB (WebP) measured at 50 megapixels."""


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
    UNSUPPORTED_PIXELS = "unsupported_pixels"
    """A TIFF with pixels that are not decoded, such as five channels; the detail names their layout."""
    SEVERAL_PAGES = "several_pages"
    """A TIFF of several full pages, such as a stack of a microscope; only the first would be decoded."""
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
    """Whether the first bytes of a file (132 are enough) are those of an image of pixels, decoded or not."""
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
        # Made before any pixel is decoded, so that pixels leave it enough memory.
        profile = image.info.get("icc_profile") if image.mode in _MODES_OF_RGB else None
        conversion = conversion_to_srgb(profile) if isinstance(profile, bytes) else None
        divisor = 1
        if header.format == "JPEG" and _scalable_size(data) == image.size:
            target = target_side or min(image.size)
            divisor = next(by for by in (8, 4, 2, 1) if by == 1 or min(image.size) >= by * target)
            if image.mode in ("L", "RGB"):
                scaled = _decode_scaled(data, -(-header.width // divisor), -(-header.height // divisor))
                if scaled is not None:
                    if conversion is not None:
                        scaled = np.array(convert(Image.fromarray(scaled), conversion))
                    return _Decoded(header, scaled, _orientation(image.getexif), divisor)
            image.draft(None, (target, target))  # Pillow scales by the same rule
        raw_mode, box = _raw_mode(image), _first_frame_box(image, data)
        _scale_transparent_color(image)
        image.load()
        orientation = _orientation(image.getexif)
        if raw_mode in _LOW_BYTE_OF:
            _scale_dark_colors(image, data, raw_mode)
        rgb = _to_rgb(image, conversion)
        if box != (0, 0, *rgb.size):
            canvas = Image.new("RGB", rgb.size, "white")
            canvas.paste(rgb.crop(box), box[:2])
            rgb = canvas
        return _Decoded(header, rgb, orientation, divisor)


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
        raise ImageRejected(RejectReason.UNSUPPORTED_FORMAT, f"{name}; convert such files to PNG or JPEG")
    try:
        image = Image.open(io.BytesIO(data), formats=[name])
    except UnidentifiedImageError:
        if name == "TIFF":
            _reject_unknown_pixels(data)
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
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiff(image)
    return image


def _check_tiff(image: TiffImagePlugin.TiffImageFile) -> None:
    """Raises ImageRejected for a TIFF of several full pages, and for planes that Pillow would misread."""
    num_pages = 1
    for page in range(1, _num_frames(image)):
        image.seek(page)
        num_pages += not image.tag_v2.get(_SUBFILE_TYPE, 0) & (_SMALLER_COPY | _MASK)
    image.seek(0)
    if num_pages > 1:
        detail = f"TIFF of {num_pages} pages, of which only the first would be decoded; write each page to its own file"
        raise ImageRejected(RejectReason.SEVERAL_PAGES, detail)
    separate = image.tag_v2.get(_PLANAR) == _SEPARATE_PLANES and not image.use_load_libtiff
    if separate and not set(image.tag_v2.get(_BITS, (1,))) <= {1, 8}:
        _reject_pixels(image.tag_v2)  # Pillow reads such planes as if they had 8 bits


def _reject_unknown_pixels(data: bytes) -> None:
    """Raises ImageRejected if the tags of the first page of this TIFF can be read, from its size to its last strip."""
    tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if data[2] == 43 else 8])  # 43: a BigTIFF
    file = io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    size = tags.get(TiffImagePlugin.IMAGEWIDTH), tags.get(TiffImagePlugin.IMAGELENGTH)
    complete = any(tag in tags for tag in (TiffImagePlugin.STRIPBYTECOUNTS, TiffImagePlugin.TILEBYTECOUNTS))
    if complete and all(isinstance(side, int) and side > 0 for side in size):
        _reject_pixels(tags)


def _reject_pixels(tags: TiffImagePlugin.ImageFileDirectory_v2) -> None:
    def first(tag: int, default: int) -> str:
        value = tags.get(tag, default)
        return str(value[0] if isinstance(value, tuple) and value else value)[:20]

    detail = (
        f"TIFF of {first(_SAMPLES, 1)} channels of {first(_BITS, 1)} bits (SampleFormat {first(_SAMPLE_FORMAT, 1)}, "
        f"PhotometricInterpretation {first(_PHOTOMETRIC, 0)}, PlanarConfiguration {first(_PLANAR, 1)}, Compression "
        f"{first(_COMPRESSION, 1)}); convert such files to PNG"
    )
    raise ImageRejected(RejectReason.UNSUPPORTED_PIXELS, detail)


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


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """Pillow's name for the layout of the stored pixels; "" where it has none."""
    arguments = image.tile[0].args if image.tile else ""
    raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return raw_mode if isinstance(raw_mode, str) else ""


def _first_frame_box(image: ImageFile.ImageFile, data: bytes) -> tuple[int, int, int, int]:
    """The part of the canvas that the first frame covers: left, top, right, bottom."""
    if image.format == "GIF" and image.tile:
        return cast(tuple[int, int, int, int], image.tile[0].extents)
    if image.format == "WEBP" and data[12:16] == b"VP8X" and data[20] & 2:  # the bit of an animation
        position = 12
        while len(chunk := data[position : position + 20]) == 20:
            if chunk[:4] == b"ANMF":
                left, top, width, height = (int.from_bytes(chunk[at : at + 3], "little") for at in (8, 11, 14, 17))
                return 2 * left, 2 * top, 2 * left + width + 1, 2 * top + height + 1
            position += 8 + int.from_bytes(chunk[4:8], "little") + chunk[4] % 2
    return 0, 0, *image.size


def _scale_transparent_color(image: ImageFile.ImageFile) -> None:
    """Converts the transparent colour of a grey PNG of 2 or 4 bits to 8 bits, as its pixels are.

    PNG states the colour at the file's bit depth, and Pillow passes it on unchanged.
    """
    color = image.info.get("transparency")
    if image.format != "PNG" or color is None:
        return
    match _raw_mode(image):
        case "L;2":
            image.info["transparency"] = color * 0x55
        case "L;4":
            image.info["transparency"] = color * 0x11


def _excess_bits(largest: int) -> int:
    """The bits beyond 8 of the range that holds a value of 16 bits: 0, 2, 4, 6 or 8."""
    return next(bits for bits in (0, 2, 4, 6, 8) if largest < 1 << (8 + bits))


def _scale_dark_colors(image: ImageFile.ImageFile, data: bytes, raw_mode: str) -> None:
    """Replaces the colours of 16 bits, whose high bytes Pillow decoded, by the highest 8 bits of their range.

    Works in place and by strips: the image in memory twice would exceed the limit at 50 megapixels.
    """
    largest = max(high for _, high in _extrema(image)[:3])
    excess = _excess_bits(largest << 8)
    if "transparency" in image.info:
        image.info["transparency"] = tuple(channel >> excess for channel in image.info["transparency"])
    if excess == 8:
        return
    low = Image.open(io.BytesIO(data), formats=[cast(str, image.format)])
    low.tile = [tile._replace(args=_with_raw_mode(tile.args, _LOW_BYTE_OF[raw_mode])) for tile in low.tile]
    low.load()
    for top in range(0, image.height, _ROWS_OF_STRIP):
        box = (0, top, image.width, min(top + _ROWS_OF_STRIP, image.height))
        values, low_values = np.array(image.crop(box)), np.asarray(low.crop(box))
        values[..., :3] = (values[..., :3] << (8 - excess)) | (low_values[..., :3] >> excess)
        image.paste(Image.fromarray(values), box)


def _with_raw_mode(arguments: tuple[Any, ...] | str | None, raw_mode: str) -> tuple[Any, ...] | str:
    return (raw_mode, *arguments[1:]) if isinstance(arguments, tuple) else raw_mode


def _extrema(image: Image.Image) -> tuple[tuple[int, int], ...]:
    """The smallest and the largest value of each channel of an image of several."""
    return cast(tuple[tuple[int, int], ...], image.getextrema())


def _to_rgb(image: Image.Image, conversion: ImageCmsTransform | None) -> Image.Image:
    """The decoded image as RGB, by the table on top of this module."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    sample_format = tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0]
    wide = image.mode.startswith("I;16") or image.mode in ("I", "F")
    if image.mode == "I" and image.format == "PPM":
        image = _shifted(image, 8)
    elif image.mode.startswith("I;16"):
        image = _shifted(image, _excess_bits(int(np.asarray(image).max())))
    elif image.mode in ("I", "F"):
        image = _stretched(image, unsigned=bool(tags) and sample_format == _UNSIGNED)
    elif image.mode == "L" and sample_format == _SIGNED:
        image = _stretched(Image.fromarray(np.asarray(image).view(np.int8).astype(np.int32)), unsigned=False)
    elif image.mode == "RGBA" and image.format == "BMP" and _extrema(image)[3] == (0, 0):
        image = image.convert("RGB")
    if wide and tags and tags.get(_PHOTOMETRIC, _WHITE_IS_ZERO) == _WHITE_IS_ZERO:
        image = ImageOps.invert(image)
    if not image.has_transparency_data:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        return rgb if conversion is None else convert(rgb, conversion)
    layer = image.convert("RGBA")
    white = Image.new("RGB", layer.size, "white")
    white.paste(layer if conversion is None else convert(layer.convert("RGB"), conversion), mask=layer)
    return white


def _shifted(image: Image.Image, bits: int) -> Image.Image:
    """Values of 0..65535, and their transparent colour, shifted right by `bits` to mode L.

    Exact for 8-bit values that were multiplied by 257.
    """
    grey = Image.fromarray((np.asarray(image) >> bits).astype(np.uint8))
    grey.info = dict(image.info)
    if "transparency" in grey.info:
        grey.info["transparency"] >>= bits
    return grey


def _stretched(image: Image.Image, *, unsigned: bool) -> Image.Image:
    """Integer or float values as mode L, the smallest as 0 and the largest as 255.

    unsigned: values of 32 bits, which Pillow gives as signed.
    """
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ImageRejected(RejectReason.CORRUPT, "pixels that are not finite numbers")
    if unsigned and image.mode == "I" and values.min() < 0:
        exact = values.view(np.uint32).astype(np.float64)
        low, high = exact.min(), exact.max()
        return Image.fromarray(((exact - low) * (255 / max(high - low, 1)) + 0.5).astype(np.uint8))
    low, high = cast(tuple[float, float], image.getextrema())
    scale = 255 / (high - low) if high > low else 0.0
    # Image.point() on these modes takes a linear function. The half rounds, because convert() cuts off decimals.
    return image.point(lambda value: value * scale + (0.5 - low * scale)).convert("L")
