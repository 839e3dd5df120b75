"""Hostile images, through the decoding process of ingest: each gives the facts of an image or a reason.

Real files of every format are mutated by seed. For each of them the calling process continues, the decoder stays
within its memory limit, and the verdict does not depend on earlier files.
"""

import functools
import io
import resource
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from curation.images.decode import ImageLimits, ImageRejected, RejectReason
from curation.images.sandbox import ImageSandbox
from tests.curation.images.odd_files import P3_PRIMARIES, animated_webp, rgb_profile, tiff, tiff_page
from tests.curation.images.test_decode import photograph, png

LIMITS = ImageLimits()
EXIF = Image.Exif()
EXIF.update({0x0112: 6, 0x010E: "a description", 0x9286: b"ASCII\0\0\0a comment"})
ICC = bytes(36) + b"acsp" + bytes(84) + b"\0\0\0\1desc" + bytes(200)
P3 = rgb_profile(P3_PRIMARIES)
# Each of these is applied to every file.
MUTATIONS = "bits bytes cut hole repeat splice size size size blob insert wrap zeros".split()


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    later = [frame.copy() for frame in options.pop("append_images", ())]
    image.copy().save(buffer, image_format, append_images=later, **options)  # saving changes an image's settings
    return buffer.getvalue()


@functools.cache
def originals() -> tuple[bytes, ...]:
    """Every format, in variants that use different parts of the decoders."""
    image = photograph(80, 60)
    frames = {"save_all": True, "append_images": [photograph(80, 60, seed) for seed in (1, 2)]}
    metadata = {"exif": EXIF, "icc_profile": ICC}
    alpha = image.convert("RGBA")
    alpha.putalpha(photograph(80, 60, 3).convert("L"))
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (60, 80), dtype=np.uint16))
    return (
        encoded(image, "JPEG", quality=85, **metadata),
        encoded(image, "JPEG", progressive=True, subsampling="4:4:4"),
        encoded(image.convert("CMYK"), "JPEG", restart_marker_blocks=2),
        encoded(image, "MPO", **frames),
        encoded(image, "PNG", **metadata),
        encoded(image.convert("P"), "PNG", transparency=3),
        encoded(wide, "PNG"),
        encoded(image, "PNG", **frames),
        encoded(image, "WEBP", **metadata),
        encoded(alpha, "WEBP", lossless=True),
        encoded(image, "WEBP", **frames),
        encoded(image, "GIF"),
        encoded(image, "GIF", **frames),
        encoded(image, "TIFF", **metadata),
        encoded(image, "TIFF", compression="tiff_lzw", **frames),
        encoded(image, "TIFF", compression="tiff_adobe_deflate"),
        encoded(image, "TIFF", compression="jpeg"),
        encoded(image.convert("1"), "TIFF", compression="group4"),
        encoded(image, "BMP"),
        encoded(image.convert("P"), "BMP"),
        encoded(image, "PPM"),
        encoded(image, "AVIF", **metadata),
        encoded(alpha, "AVIF"),
        encoded(image, "AVIF", **frames),
        encoded(image, "JPEG", icc_profile=P3),
        encoded(image, "WEBP", icc_profile=P3),
        tiff(tiff_page(np.asarray(image).astype(np.uint16) * 16, 2)),
        animated_webp(image, encoded(image, "WEBP"), 6, 4, (100, 90)),
    )


def size_fields(data: bytes) -> list[tuple[int, str]]:
    """The fields of a file that state sizes: their offsets and their struct formats."""
    if data[:3] == b"\xff\xd8\xff":
        starts = [data.find(bytes([0xFF, marker])) for marker in (0xC0, 0xC1, 0xC2)]
        return [(start + offset, ">H") for start in starts if start > 0 for offset in (5, 7)]
    if data[:4] == b"\x89PNG":
        return [(16, ">I"), (20, ">I")]
    if data[:4] == b"RIFF":
        return [(4, "<I"), (16, "<I"), (21, "<I"), (24, "<H"), (26, "<H"), (27, "<H")]
    if data[:3] == b"GIF":
        frame = data.find(b"\x2c")
        return [(6, "<H"), (8, "<H"), (frame + 5, "<H"), (frame + 7, "<H")]
    if data[:2] == b"BM":
        return [(10, "<I"), (14, "<I"), (18, "<i"), (22, "<i"), (46, "<I")]
    if data[:2] in (b"II", b"MM"):
        (table,) = struct.unpack_from("<I", data, 4)
        (count,) = struct.unpack_from("<H", data, table)
        return [(table + 2 + 12 * entry + offset, "<I") for entry in range(count) for offset in (4, 8)]
    return [(3, ">I")]


def resized(data: bytes, rng: np.random.Generator) -> bytes:
    """The file with one or two of its sizes set to extreme values; a PNG's header keeps a valid checksum."""
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 3))):
        fields = size_fields(data)
        offset, kind = fields[rng.integers(len(fields))]
        values = [0, 1, 15, 16, 79, 81, 1000, 7000, 16_383, 32_767, 65_535, 2**31 - 1, 2**32 - 1, -1, -60]
        bits = 8 * struct.calcsize(kind)
        value = int(rng.choice(values)) % 2**bits
        struct.pack_into(kind.upper(), changed, offset, value)
    if data[:4] == b"\x89PNG":
        changed[29:33] = struct.pack(">I", zlib.crc32(changed[12:29]))
    return bytes(changed)


def metadata_blob(data: bytes, rng: np.random.Generator) -> bytes:
    """The file with EXIF or a profile of random bytes behind its header, with a right or a wrong length."""
    blob = rng.bytes(int(rng.integers(0, 3000)))
    blob = [b"Exif\0\0II*\0\x08\0\0\0" + blob, b"Exif\0\0MM\0*" + blob, b"ICC_PROFILE\0\1\1" + blob, blob][
        rng.integers(4)
    ]
    length = len(blob) if rng.random() < 0.7 else int(rng.integers(0, 65_000))
    if data[:3] == b"\xff\xd8\xff":
        marker = bytes([0xFF, int(rng.choice([0xE1, 0xE2, 0xEE, 0xFE, 0xC4, 0xDB]))])
        return data[:2] + marker + struct.pack(">H", min(length + 2, 65_535)) + blob + data[2:]
    if data[:4] == b"\x89PNG":
        name = [b"eXIf", b"iCCP", b"zTXt", b"iTXt", b"PLTE", b"tRNS", b"acTL", b"fcTL"][rng.integers(8)]
        content = blob if rng.random() < 0.5 else b"name\0\0" + zlib.compress(blob * 200)
        chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        return data[:33] + chunk + data[33:]
    if data[:4] == b"RIFF":
        name = [b"EXIF", b"ICCP", b"ANIM", b"ANMF", b"ALPH"][rng.integers(5)]
        return data + name + struct.pack("<I", length) + blob
    return data[: int(rng.integers(4, len(data)))] + blob + data[int(rng.integers(4, len(data))) :]


def mutated(seed: int) -> tuple[str, bytes]:
    """The mutation's name and the mutated file, determined by the seed."""
    rng = np.random.default_rng(seed)
    files = originals()
    data = files[seed % len(files)]
    kind = MUTATIONS[seed // len(files) % len(MUTATIONS)]
    values = np.frombuffer(data, np.uint8).copy()
    start = int(rng.integers(len(data)))
    span = int(rng.integers(1, 400))
    match kind:
        case "bits":
            for position in rng.integers(0, len(data), rng.integers(1, 20)):
                values[position] ^= 1 << rng.integers(8)
        case "bytes":  # half of them in the header
            end = min(len(data), 200) if rng.random() < 0.5 else len(data)
            count = int(rng.integers(1, 12))
            values[rng.integers(0, end, count)] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(256))], count)
        case "cut":
            return kind, data[:start]
        case "hole":
            return kind, data[:start] + data[start + span :]
        case "repeat":
            return kind, data[: start + span] + data[start : start + span] * int(rng.integers(1, 50)) + data[start:]
        case "splice":
            other = files[rng.integers(len(files))]
            return kind, data[:start] + other[int(rng.integers(len(other))) :]
        case "size":
            return kind, resized(data, rng)
        case "blob":
            return kind, metadata_blob(data, rng)
        case "insert":
            return kind, data[:start] + rng.bytes(span) + data[start:]
        case "wrap":  # the header of one format before another
            return kind, files[rng.integers(len(files))][: int(rng.integers(1, 40))] + data
        case "zeros":
            values[start : start + span] = 0
    return kind, values.tobytes()


@functools.cache
def bombs() -> tuple[bytes, ...]:
    """Files of about a megabyte or less with many pixels, frames, scans, texts or pages when unpacked."""
    flat = png(6_900, 7_200, 8, 0, bytes(6_900 * 7_200))
    text = png(40, 40, 8, 0, bytes(1600), zTXt=b"Comment\0\0" + zlib.compress(bytes(60_000_000)))
    profile = png(40, 40, 8, 0, bytes(1600), iCCP=b"name\0\0" + zlib.compress(bytes(60_000_000)))
    scan = encoded(photograph(80, 60), "JPEG", progressive=True)
    last = scan.rindex(b"\xff\xda")
    noise = np.random.default_rng(0).integers(0, 256, (1_100, 16, 16), dtype=np.uint8)
    frames = [Image.fromarray(values) for values in noise]
    gif = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    flat_gif = encoded(Image.new("P", (500, 500)), "GIF")
    screen = flat_gif[:6] + struct.pack("<HH", 7_000, 7_000) + flat_gif[10:]
    tiff = encoded(photograph(80, 60), "TIFF")
    (table,) = struct.unpack_from("<I", tiff, 4)
    (count,) = struct.unpack_from("<H", tiff, table)
    end = table + 2 + 12 * count
    ring = tiff[:end] + struct.pack("<I", table) + tiff[end + 4 :]  # the page names itself as the next page
    claimed = png(20, 20, 8, 0, bytes(400))
    huge = bytearray(claimed)
    huge[16:24] = struct.pack(">II", 7_000, 7_000)
    huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    webp = encoded(Image.new("RGB", (5_000, 5_000)), "WEBP", lossless=True)
    return (flat, text, profile, scan[:last] + scan[last:-2] * 3_000 + scan[-2:], gif, screen, ring, bytes(huge), webp)


def verdict_on(sandbox: ImageSandbox, data: bytes) -> str:
    """The facts of the image, or the reason for its rejection."""
    try:
        return str(sandbox.probe(data))
    except ImageRejected as rejected:
        assert len(rejected.detail.encode()) < 3_000, "it can be written to a table"
        return str(rejected.reason)


def peak_memory(process_id: int) -> tuple[int, int]:
    """The peak of a process's address space so far, and its limit, in bytes."""
    status = Path(f"/proc/{process_id}/status").read_text()
    (peak,) = (int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmPeak"))
    return peak, resource.prlimit(process_id, resource.RLIMIT_AS)[0]


def probe_all(files: list[tuple[str, bytes]]) -> list[str]:
    """The verdict on each file, from one decoding process and its successors; each keeps to its memory limit."""
    verdicts = []
    with ImageSandbox(LIMITS) as sandbox:
        for kind, data in files:
            verdicts.append(verdict_on(sandbox, data))
            if sandbox.process_id is not None:
                peak, allowed = peak_memory(sandbox.process_id)
                assert peak <= allowed < 1 << 34, (kind, peak, allowed)
        assert verdict_on(sandbox, originals()[0]).startswith("ImageFacts(width=60, height=80"), "it continues"
    return verdicts


def reason_of(verdict: str) -> str:
    return "accepted" if verdict.startswith("ImageFacts") else verdict


def test_the_verdict_on_a_mutated_file_does_not_depend_on_earlier_files() -> None:
    files = [mutated(seed) for seed in range(len(originals()) * len(MUTATIONS))]
    verdicts = probe_all(files)
    assert {reason_of(verdict) for verdict in verdicts} <= {"accepted", *map(str, RejectReason)}
    counts = Counter(map(reason_of, verdicts))
    assert counts["accepted"] > 30 and counts["corrupt"] > 30 and counts["truncated"] > 10 and len(counts) >= 6, counts
    assert probe_all(files[::-1])[::-1] == verdicts


@pytest.mark.slow
def test_bombs_are_accepted_within_the_limits_or_rejected() -> None:
    assert max(map(len, bombs())) < 1_300_000
    reasons = [reason_of(verdict) for verdict in probe_all([("bomb", data) for data in bombs()])]
    expected = {"accepted", "corrupt", "truncated", "out_of_memory", "decoder_timeout", "too_many_frames"}
    assert set(reasons) <= expected, reasons
    assert reasons[0] == "accepted" and reasons[1] == reasons[2] == "corrupt" and reasons[7] == "truncated", reasons
    assert reasons[4] == "too_many_frames", reasons


@pytest.mark.slow
def test_twenty_thousand_mutated_files(capsys: pytest.CaptureFixture[str]) -> None:
    first = len(originals()) * len(MUTATIONS)  # other seeds than above
    files = [mutated(seed) for seed in range(first, first + 20_400)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    verdicts = [reason_of(verdict) for verdict in probe_all(files)]
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    table = Counter((kind, verdict) for (kind, _), verdict in zip(files, verdicts, strict=True))
    reasons = Counter(verdicts)
    with capsys.disabled():
        print(f"\n{'':17}" + "".join(f"{kind:>8}" for kind in dict.fromkeys(MUTATIONS)) + f"{'all':>8}")
        for reason, count in reasons.most_common():
            row = "".join(f"{table[kind, reason]:8,}" for kind in dict.fromkeys(MUTATIONS))
            print(f"{reason:17}{row}{count:8,}")
    assert len(verdicts) == 20_400 and set(reasons) <= {"accepted", *map(str, RejectReason)}
    assert growth < 100_000_000, "the calling process keeps no files in memory"
