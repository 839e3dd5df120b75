"""Writes image files that Pillow cannot write, and ICC profiles."""

import struct
from collections.abc import Sequence

import numpy as np
from PIL import Image

SRGB_PRIMARIES = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
P3_PRIMARIES = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
ADOBE_PRIMARIES = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))


def tiff_page(
    values: np.ndarray,
    photometric: int,
    *,
    sample_format: int = 1,
    planar: int = 1,
    **tags: int,
) -> tuple[dict[int, tuple[int, Sequence[int]]], list[np.ndarray]]:
    """A page of `values` (H, W) or (H, W, C), for `tiff`. Other tags of one number: `t254=1`."""
    height, width, *channels = values.shape
    samples = channels[0] if channels else 1
    bits = values.dtype.itemsize * 8
    entries: dict[int, tuple[int, Sequence[int]]] = {
        256: (4, [width]), 257: (4, [height]), 258: (3, [bits] * samples), 259: (3, [1]), 262: (3, [photometric]),
        277: (3, [samples]), 278: (4, [height]), 284: (3, [planar]), 339: (3, [sample_format] * samples),
    }  # fmt: skip
    extra = samples - (3 if photometric == 2 else 1)
    if extra:
        entries[338] = (3, [0] * extra)
    entries |= {int(name[1:]): (4, [value]) for name, value in tags.items()}
    return entries, [values[..., plane] for plane in range(samples)] if planar == 2 else [values]


def tiff(*pages: tuple[dict[int, tuple[int, Sequence[int]]], list[np.ndarray]], order: str = "<") -> bytes:
    """An uncompressed TIFF of one strip a page and plane."""
    data = bytearray((b"II*\0" if order == "<" else b"MM\0*") + bytes(4))
    link = 4
    for entries, strips in pages:
        offsets, lengths = [], []
        for strip in strips:
            content = strip.astype(strip.dtype.newbyteorder(order)).tobytes()
            offsets.append(len(data))
            lengths.append(len(content))
            data += content + bytes(len(content) % 2)
        fields = []
        for code, (kind, values) in sorted({**entries, 273: (4, offsets), 279: (4, lengths)}.items()):
            field = struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
            if len(field) > 4:
                data += field
                field = struct.pack(order + "I", len(data) - len(field))
            fields.append(struct.pack(order + "HHI", code, kind, len(values)) + field.ljust(4, b"\0"))
        struct.pack_into(order + "I", data, link, len(data))
        data += struct.pack(order + "H", len(fields)) + b"".join(fields)
        link = len(data)
        data += bytes(4)
    return bytes(data)


def animated_webp(frame: Image.Image, encoded_frame: bytes, left: int, top: int, canvas: tuple[int, int]) -> bytes:
    """An animation of one opaque frame, a WebP of one chunk, at even `left` and `top` of its canvas."""
    numbers = [left // 2, top // 2, frame.width - 1, frame.height - 1, 100]
    rectangle = b"".join(struct.pack("<I", number)[:3] for number in numbers)
    content = rectangle + b"\0" + encoded_frame[12:]
    size = b"".join(struct.pack("<I", side - 1)[:3] for side in canvas)
    chunks = [(b"VP8X", bytes([2, 0, 0, 0]) + size), (b"ANIM", bytes([0, 0, 255, 255, 0, 0])), (b"ANMF", content)]
    body = b"WEBP" + b"".join(name + struct.pack("<I", len(content)) + content for name, content in chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def rgb_profile(primaries: Sequence[tuple[float, float]], *, gamma: float | None = None, size: int = 0) -> bytes:
    """An ICC profile of RGB with white D65, by the matrix and one curve: `gamma`, or None for the curve of sRGB.

    size: bytes of padding behind it. Cited: ICC.1:2001-04; adaptation to D50 by Bradford's matrix.
    """

    def xyz(x: float, y: float) -> np.ndarray:
        return np.array([x / y, 1, (1 - x - y) / y])

    white, d50 = xyz(0.3127, 0.3290), np.array([0.9642, 1, 0.8249])
    columns = np.stack([xyz(*primary) for primary in primaries], axis=1)
    columns = columns * np.linalg.solve(columns, white)
    cone = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    columns = np.linalg.inv(cone) @ np.diag((cone @ d50) / (cone @ white)) @ cone @ columns

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def point(values: np.ndarray) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(number, values))

    if gamma is None:
        levels = np.arange(1024) / 1023
        linear = np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)
        curve = b"curv\0\0\0\0" + struct.pack(">I", 1024) + np.round(linear * 65535).astype(">u2").tobytes()
    else:
        curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = {b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(79), b"wtpt": point(d50)}
    for number_of_color, color in enumerate((b"r", b"g", b"b")):
        tags |= {color + b"XYZ": point(columns[:, number_of_color]), color + b"TRC": curve}
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    body += bytes(size)
    header = struct.pack(
        ">I4sI4s4s4s12s4s28x", start + len(body), b"", 0x02100000, b"mntr", b"RGB ", b"XYZ ", b"", b"acsp"
    )
    return (header + b"".join(map(number, d50))).ljust(128, b"\0") + table + body
