"""The copy detectors that ours is compared with: a similarity for each pair of files of a draw.

Hashes give minus the number of bits that differ. `pdqhash` is in the extra `bench`; without it, its rows are left out
with a message. fastdup runs in an environment of its own (fastdup_peer.py). All others come with Seedbed.
"""

import csv
import importlib
import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image

from curation.engine import progress
from curation.errors import InputError
from curation.files import paths
from curation.run_folder import read_vectors
from pipelines.bench.copy_scores import Truth, phash_of

# Files between two lines of progress.
FILES_PER_LINE = 500
FASTDUP = Path(__file__).with_name("fastdup_peer.py")


@dataclass(frozen=True)
class Detector:
    """A peer on the files of a draw."""

    name: str
    similarity: np.ndarray
    """(N, N) float32, -inf for pairs that the detector does not list."""
    usual: tuple[float, ...] = ()
    """Similarities that its users take as thresholds."""
    unit: str = "bits"


def detectors(truth: Truth, run: str, fastdup_python: Path | None = None) -> Iterator[Detector]:
    """All peers.

    run: a finished run on the draw, for the vectors and pHash of its files. fastdup_python: a Python with fastdup.
    """
    yield Detector("pHash", _bits(_unpack([phash_of(run).get(image_id, 0) for image_id in truth.image_ids])), (-4, -10))
    # Cited: 31 is the threshold that PDQ's authors recommend (ThreatExchange, hashing.pdf).
    if importlib.util.find_spec("pdqhash") is None:
        progress.say("PDQ: left out, since pdqhash is not installed (pip install pdqhash, or the extra bench)")
    else:
        yield Detector("PDQ", _pdq(truth), (-31,))
        yield Detector("PDQ, 8 orientations", _pdq_of_orientations(truth), (-31,))
    for name, hash_of in (
        ("average hash", imagehash.average_hash),
        ("dHash", imagehash.dhash),
        ("wavelet hash", imagehash.whash),
    ):
        bits = [hash_of(picture).hash.ravel() for picture in _pictures(truth, name)]
        yield Detector(name, _bits(np.stack(bits)), (-10,))
    yield Detector("crop-resistant hash", _crop_resistant(truth), (-10,))
    for stage, name in (("embed", "EfficientNet, GeM and bottleneck"), ("describe", "EfficientNet, GeM")):
        yield Detector(f"{name}: cosine", _cosine(truth, paths.join(run, stage)), (0.9,), unit="cosine")
    if fastdup_python is None:
        progress.say("fastdup: left out. Give --fastdup PYTHON, a Python where fastdup is installed.")
    else:
        yield Detector("fastdup", _fastdup(truth, fastdup_python), (0.9,), unit="cosine")


def _pictures(truth: Truth, name: str) -> Iterator[Image.Image]:
    for number, path in enumerate(truth.paths):
        if number % FILES_PER_LINE == 0:
            progress.say(f"{name}: {number:,} of {len(truth.paths):,} files")
        with Image.open(truth.folder / path) as picture:
            yield picture.convert("RGB")


def _unpack(hashes: list[int]) -> np.ndarray:
    """Hashes of 64 bits as (N, 64) bool."""
    values = np.array(hashes, np.uint64).reshape(-1, 1).view(np.uint8)
    return np.unpackbits(values, axis=1).astype(bool)


def _bits(first: np.ndarray, second: np.ndarray | None = None) -> np.ndarray:
    """Minus the number of bits that differ, (N, M) float32, between hashes (N, B) and (M, B) bool."""
    signs = [np.where(bits, 1, -1).astype(np.float32) for bits in (first, first if second is None else second)]
    similarity: np.ndarray = (signs[0] @ signs[1].T - first.shape[1]) / 2
    return similarity


def _pdq(truth: Truth) -> np.ndarray:
    pdqhash = importlib.import_module("pdqhash")
    return _bits(np.stack([pdqhash.compute(np.asarray(one))[0] for one in _pictures(truth, "PDQ")]).astype(bool))


def _pdq_of_orientations(truth: Truth) -> np.ndarray:
    """The nearest of the eight orientations of one side, as PDQ's dihedral hashes allow."""
    pdqhash = importlib.import_module("pdqhash")
    pictures = _pictures(truth, "PDQ, 8 orientations")
    hashes = np.stack([np.stack(pdqhash.compute_dihedral(np.asarray(picture))[0]) for picture in pictures]).astype(bool)
    similarity = np.max([_bits(hashes[:, 0], hashes[:, turn]) for turn in range(8)], axis=0)
    result: np.ndarray = np.maximum(similarity, similarity.T)
    return result


def _crop_resistant(truth: Truth) -> np.ndarray:
    """The nearest pair of segments: what `ImageMultiHash.matches` tests with its default of one region."""
    hashes = [
        [segment.hash.ravel() for segment in imagehash.crop_resistant_hash(picture).segment_hashes]
        for picture in _pictures(truth, "crop-resistant hash")
    ]
    starts = np.cumsum([0, *(len(segments) for segments in hashes)])[:-1]
    bits = np.stack([segment for segments in hashes for segment in segments])
    rows = [np.maximum.reduceat(_bits(np.stack(segments), bits).max(axis=0), starts) for segments in hashes]
    return np.stack(rows)


def _cosine(truth: Truth, folder: str) -> np.ndarray:
    """The cosine of the vectors of a stage; -inf for files that the run did not embed."""
    vectors: dict[str, np.ndarray] = {}
    for image_ids, matrix in read_vectors(folder):
        vectors.update(zip(image_ids, matrix.astype(np.float32), strict=True))
    width = len(next(iter(vectors.values())))
    there = np.array([image_id in vectors for image_id in truth.image_ids])
    matrix = np.stack([vectors.get(image_id, np.zeros(width, np.float32)) for image_id in truth.image_ids])
    similarity: np.ndarray = matrix @ matrix.T
    similarity[~there] = -np.inf
    similarity[:, ~there] = -np.inf
    return similarity


def _fastdup(truth: Truth, python: Path) -> np.ndarray:
    """The pairs of nearest neighbours; -inf for all others, and for files that fastdup does not read."""
    similarity = np.full((len(truth.paths), len(truth.paths)), -np.inf, np.float32)
    row_of = {str((truth.folder / path).resolve()): row for row, path in enumerate(truth.paths)}
    with tempfile.TemporaryDirectory() as work:
        pairs = Path(work) / "pairs.csv"
        command = [str(python), str(FASTDUP), str(truth.folder.resolve()), f"{work}/work", str(pairs)]
        # Without reports over the network.
        environment = {**os.environ, "SENTRY_OPT_OUT": "True"}
        progress.say(f"fastdup: {len(truth.paths):,} files")
        completed = subprocess.run(command, env=environment, capture_output=True, text=True)
        if completed.returncode:
            raise InputError(f"--fastdup '{python}' failed with status {completed.returncode}:\n{completed.stderr}")
        with pairs.open(newline="") as file:
            for one, other, cosine in csv.reader(file):
                ends = row_of[str(Path(one).resolve())], row_of[str(Path(other).resolve())]
                similarity[ends] = similarity[ends[::-1]] = max(similarity[ends], np.float32(cosine))
    return similarity
