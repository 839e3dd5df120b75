"""Checks the corpus against itself: a copy of an image of the corpus is not taken, and the next image takes its place.

    retrieve/.progress/
      gathered/  vectors-00000.parquet  ...     the descriptors of the images that may be looked at
                 thumbnails-00000.parquet  ...  their thumbnails, where pairs are verified
                 ids.npy                        their ids, ascending
      check0/    edges-00000.parquet  ...       EDGES: the copies among the images of round 0
                 state.npy  known.parquet       the state and the guards of each gathered row; the pairs with a score
                                                of `pairs`
      check1/    ...

Retrieval gives each seed its nearest images, and a copy that dedup missed is as near as the image itself. So retrieve
proposes more images than it needs, and this check chooses among them. Rows are visited by rank, then by dataset in the
order of the config, then by seed id and image id, until the quota of their group is full. An image is passed over when
it is a copy of an image taken before, of a packed seed, or of a holdout image; the next in rank takes its place:

    seed S, quota 2, proposed by rank: A, A', B      (A' is a copy of A)

    A is taken, A' is passed over for A, B is taken

Two images are compared when the cosine of their descriptors is at least the floor of `pairs`. Thumbnails are compared
by falling cosine, FOLLOWED at a time, while copies are among the last of them; those of holdout images always. So the
copies of an image are not capped, and hundreds of images that only look alike are not compared. A pair with a score of
the stage `pairs` is not compared again. Seeds and pool images that dedup never drops for one another are not compared
here either: images with different labels (`dedup.label_guard`), and images of sources that look alike
(`dedup.lookalikes = "exact"`).

Work goes in rounds of growing ranks, because most groups are full after the first. A round compares the images that
the groups still need with one another and with all images of earlier rounds that were not passed over. Ranks come first
in the order, so the choice is the same as with one round, where all near images are compared. Workers
compare; the driver chooses.

The driver holds the proposed rows (60 bytes each), their images, and the pairs of copies among them. A worker holds
the ids of the images (16 bytes each), the states and guards of the gathered rows (11 bytes each), one file of
descriptors, the pairs of its shard with that file, and PAIRS_PER_BATCH pairs with their thumbnails. The products of
descriptors grow with the square of the images that are looked at.

Legend: N images, R proposed rows, G groups with a quota each, P pairs. A place is a row of the gathered files, counted
through all of them.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from curation.config import Settings
from curation.copies.compare_thumbnails import VerificationConfig
from curation.copies.described import DescribedRows, Verifier
from curation.copies.duplicate_graph import labels_differ, read_origins
from curation.engine.device import require_device
from curation.engine.manifest import Manifest, ShardRecord, require_fact, require_manifest, step_folder
from curation.engine.run_log import Log
from curation.engine.runner import Runner, Shard, report
from curation.engine.stage import PREPARED, Stage, run_stage
from curation.errors import InputError
from curation.files import npy, parquet, paths, schemas, vectors
from curation.files.hashes import hash_json, sha256_of_bytes
from curation.files.image_ids import pack_ids, unpack_ids
from curation.search import exact

# Rows that are looked at, in multiples of a quota.
LOOKS = 4
# Images whose pairs one shard compares. Assumed: 20 pairs an image and 5 ms a pair make 25 s.
IMAGES_PER_SHARD = 250
# Pairs whose thumbnails are held at a time: 130 MB at 4 kB each. Assumed.
PAIRS_PER_BATCH = 16_384
# Pairs that are held without their thumbnails: 80 MB. Assumed.
PAIRS_HELD = 1 << 22
# Images of falling cosine that an image is compared with at a time. Without a copy among them the others are left out,
# but for holdout images. Assumed: among images that look alike, hundreds lie above the least cosine.
FOLLOWED = 64
# Pairs between two reports of progress. Assumed: less than a second.
PAIRS_PER_REPORT = 64
GATHERED, STATE_NAME, KNOWN_NAME, IDS_NAME = "gathered", "state.npy", "known.parquet", "ids.npy"

# Two places and the similarity of their images; `place` is that of an image of the round.
EDGES = pa.schema([("place", pa.int64()), ("other_place", pa.int64()), ("similarity", pa.float32())])
# The state of a place in a round: left out, compared with the images of the round, or such an image.
LEFT_OUT, EARLIER, ASKED = range(3)
# The state of an image. From TAKEN on, copies of it are passed over.
NEW, PASSED, TAKEN, SEED, HOLDOUT = range(5)


@dataclass(frozen=True)
class Comparison:
    """When two images are copies, as `pairs` and `dedup` of the run define it."""

    min_cosine: float
    """Minimum cosine of the descriptors of two images that are compared."""
    threshold: float
    """Minimum similarity of copies."""
    holdout_threshold: float
    """The same with a holdout image."""
    verification: VerificationConfig | None
    """None when the cosine is the similarity."""
    label_guard: bool
    """Whether seeds and pool images with different labels never count as copies."""
    lookalikes: tuple[str, ...]
    """Sources whose seeds and pool images are copies of holdout images alone."""
    device: str
    """Of the products of descriptors."""


@dataclass(frozen=True)
class Proposals:
    """Proposed rows, and the images that they are compared with."""

    image_ids: np.ndarray  # (R,) S16, packed
    rank: np.ndarray  # (R,) int32
    group: np.ndarray  # (R,) int64: the rows of a group fill one quota
    quota: np.ndarray  # (G,) int64
    order: np.ndarray  # (R,) int64: the rows as they are visited; ranks rise
    seed_ids: np.ndarray  # (S,) S16: the seeds that are packed
    holdout_ids: np.ndarray  # (H,) S16


@dataclass(frozen=True)
class Choice:
    """The result of the check."""

    is_taken: np.ndarray  # (R,) bool
    copies: pa.Table  # schemas.CORPUS_COPIES: the images that were passed over, by image_id
    totals: dict[str, int]
    """Counts for the manifest; see the facts of retrieve."""


@dataclass(frozen=True)
class Guards:
    """The properties of images by which dedup never drops one for another. N are images or places."""

    is_holdout: np.ndarray  # (N,) bool
    is_alike: np.ndarray  # (N,) bool: of a source in Comparison.lookalikes
    label: np.ndarray  # (N,) int64; 0 for none, and for all without Comparison.label_guard

    def may_be_copies(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Whether pairs, (P,) bool, are compared: with one holdout image, or with none where no guard keeps both."""
        num_holdout = self.is_holdout[one].astype(np.int8) + self.is_holdout[other]
        keeps_both = self.is_alike[one] | self.is_alike[other] | labels_differ(self.label[one], self.label[other])
        result: np.ndarray = (num_holdout == 1) | ((num_holdout == 0) & ~keeps_both)
        return result

    def at(self, place_of: np.ndarray, num_places: int) -> "Guards":
        """The guards of images by place; zero at places without an image."""
        columns = []
        for column in (self.is_holdout, self.is_alike, self.label):
            columns.append(np.zeros(num_places, column.dtype))
            columns[-1][place_of] = column
        return Guards(*columns)


@dataclass(frozen=True)
class Images:
    """The images of the check, in the order of their ids, and their states."""

    ids: np.ndarray  # (N,) S16, ascending
    is_seed: np.ndarray  # (N,) bool
    guards: Guards
    state: np.ndarray  # (N,) int8, changed by the choice
    matched: np.ndarray  # (N,) int64: the image for which this one was passed over; -1 for none
    similarity: np.ndarray  # (N,) float32: of that pair

    def number_of(self, ids: np.ndarray) -> np.ndarray:
        """The number (M,) of each of `ids` (M,), or -1."""
        number = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        result: np.ndarray = np.where(self.ids[number] == ids, number, -1)
        return result


@dataclass
class _Pairs:
    """Pairs of images by their numbers, as columns (P,); `add` appends some."""

    one: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    other: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    similarity: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))

    def add(self, one: np.ndarray, other: np.ndarray, similarity: np.ndarray) -> None:
        self.one = np.concatenate([self.one, one])
        self.other = np.concatenate([self.other, other])
        self.similarity = np.concatenate([self.similarity, similarity])


def comparison_of(pairs: str, dedup: str, device: str) -> Comparison:
    """The comparison that the finished `pairs` and `dedup` publish. Raises InputError where they publish none."""
    paired, deduplicated = require_manifest(pairs), require_manifest(dedup)
    verification = require_fact(pairs, paired, "verification")
    return Comparison(
        min_cosine=require_fact(pairs, paired, "min_descriptor_similarity"),
        threshold=require_fact(dedup, deduplicated, "threshold"),
        holdout_threshold=require_fact(dedup, deduplicated, "holdout_threshold"),
        label_guard=require_fact(dedup, deduplicated, "label_guard"),
        lookalikes=tuple(alike["source"] for alike in require_fact(dedup, deduplicated, "lookalikes")),
        verification=verification and VerificationConfig.model_validate(verification, strict=False),
        device=device,
    )


def run(
    comparison: Comparison,
    proposals: Proposals,
    config: Settings,
    ingest: str,
    describe: str,
    pairs: str,
    output: str,
    runner: Runner,
    log: Log = None,
) -> Choice:
    """Choose among the proposed rows. `output` is the folder of the stage, whose progress folder holds the steps."""
    images = _images_of(comparison, proposals, ingest)
    inputs = {"descriptors": require_manifest(describe).content_hash, "pairs": require_manifest(pairs).content_hash}
    gathered_folder = step_folder(output, GATHERED)
    gathered = _gather(images.ids, comparison, config, describe, inputs, gathered_folder, runner, log)
    place_of, num_places = _places_of(images, gathered, gathered_folder)
    guards_at = images.guards.at(place_of, num_places)
    known = _known_pairs(images, pairs) if comparison.verification else _Pairs()
    copies = _Pairs()
    copies.add(known.one, known.other, known.similarity)

    image = images.number_of(proposals.image_ids)
    filled = np.zeros(len(proposals.quota), np.int64)
    is_taken, was_asked = np.zeros(len(image), bool), np.zeros(len(images.ids), bool)
    num_compared = number = start = 0
    stop = int(proposals.quota.min(initial=1))
    ranks = proposals.rank[proposals.order]
    while True:
        left = proposals.order[np.searchsorted(ranks, start) :]
        left = left[filled[proposals.group[left]] < proposals.quota[proposals.group[left]]]
        if number and not len(left):
            break
        rows = left[proposals.rank[left] < stop]
        is_asked = np.zeros(len(images.ids), bool)
        is_asked[image[rows]] = True
        is_asked[images.is_seed] = number == 0
        is_asked &= ~was_asked & ((images.state == NEW) | images.is_seed)
        if is_asked.any():
            is_earlier = (was_asked | images.guards.is_holdout) & (images.state != PASSED) & ~is_asked
            state = np.full(num_places, LEFT_OUT, np.int8)
            state[place_of[is_earlier]], state[place_of[is_asked]] = EARLIER, ASKED
            of_round = step_folder(output, f"check{number}")
            done = _compare(
                comparison, config, state, guards_at, place_of, known, gathered_folder, of_round, inputs, runner, log
            )
            num_compared += done.totals["pairs"]
            copies.add(*_read_edges(done, of_round, place_of, num_places))
            was_asked |= is_asked
            number += 1
        elif number == 0:
            break  # neither seeds nor proposals
        _choose(rows, image, proposals, filled, is_taken, images, _Neighbors.of(comparison, images, copies))
        start, stop = stop, 2 * stop
    passed = np.flatnonzero(images.state == PASSED)
    columns = [
        unpack_ids(images.ids[passed]),
        unpack_ids(images.ids[images.matched[passed]]),
        images.similarity[passed],
    ]
    totals = _totals(comparison, images, copies) | {
        "check_images": int(was_asked.sum()),
        "check_pairs": num_compared,
        "corpus_copies": len(passed),
    }
    return Choice(is_taken, pa.table(columns, schema=schemas.CORPUS_COPIES), totals)


def _images_of(comparison: Comparison, proposals: Proposals, ingest: str) -> Images:
    ids = np.unique(np.concatenate([proposals.image_ids, proposals.seed_ids, proposals.holdout_ids]))
    is_seed, is_holdout = np.isin(ids, proposals.seed_ids), np.isin(ids, proposals.holdout_ids)
    origins = read_origins(ingest, ids)
    guards = Guards(
        is_holdout=is_holdout,
        is_alike=np.isin(origins.sources, comparison.lookalikes)[origins.source],
        label=origins.label if comparison.label_guard else np.zeros_like(origins.label),
    )
    state = np.where(is_holdout, HOLDOUT, np.where(is_seed, SEED, NEW)).astype(np.int8)
    return Images(ids, is_seed, guards, state, np.full(len(ids), -1, np.int64), np.full(len(ids), np.nan, np.float32))


# The descriptors of the images


def _gather(
    ids: np.ndarray,
    comparison: Comparison,
    config: Settings,
    describe: str,
    inputs: dict[str, str],
    output: str,
    runner: Runner,
    log: Log,
) -> Manifest:
    """Copy the rows of the images `ids` (N,) from describe, so that the rounds read nothing else."""
    described = require_manifest(describe)
    kinds = ("vectors", "thumbnails") if comparison.verification else ("vectors",)
    files = [described.paths(describe, kind) for kind in kinds]
    if any(len(of_kind) != len(files[0]) for of_kind in files):
        raise InputError(f"'{describe}' holds no thumbnails, and the check of the corpus compares them.")
    ids_path = paths.join(output, IDS_NAME)

    def write_ids() -> ShardRecord:
        return ShardRecord(name=PREPARED, files=(npy.write_arrays(ids_path, ids),))

    stage = Stage(
        name=GATHERED,
        config=config,
        inputs=inputs | {"ids": sha256_of_bytes(ids.tobytes())},
        output=output,
        shards=[
            Shard(f"{number:05d}", dict(zip(kinds, of_shard, strict=True)), vectors.num_rows(of_shard[0]))
            for number, of_shard in enumerate(zip(*files, strict=True))
        ],
        make_worker=functools.partial(_make_gatherer, ids_path, output),
        prepare=write_ids,
    )
    return run_stage(stage, runner, log=log)


def _make_gatherer(ids_path: str, output: str) -> Callable[[Shard], ShardRecord]:
    """A worker that copies the rows of the wanted images from the files of one shard of describe."""
    wanted = npy.read_array(ids_path)

    def process(shard: Shard) -> ShardRecord:
        ids = pack_ids(parquet.read_table_columns(shard.work["vectors"], ["image_id"]).column(0))
        rows = pa.array(np.flatnonzero(np.isin(ids, wanted)))
        files = []
        for kind, source in shard.work.items():
            columns = ["image_id", "vector" if kind == "vectors" else "thumbnail"]
            table = parquet.read_table_columns(source, columns).take(rows).combine_chunks()
            files.append(parquet.write_table(paths.join(output, f"{kind}-{shard.name}.parquet"), table))
        return ShardRecord(name=shard.name, files=tuple(files))

    return process


def _places_of(images: Images, gathered: Manifest, folder: str) -> tuple[np.ndarray, int]:
    """The place (N,) of each image, the first of several, and the number of places."""
    place_of, start = np.full(len(images.ids), -1, np.int64), 0
    for path in gathered.paths(folder, "vectors"):
        ids = pack_ids(parquet.read_table_columns(path, ["image_id"]).column(0))
        number = images.number_of(ids)
        is_first = place_of[number] < 0
        place_of[number[is_first]] = start + np.flatnonzero(is_first)
        start += len(ids)
    if len(missing := np.flatnonzero(place_of < 0)):
        raise InputError(
            f"Image {unpack_ids(images.ids[missing[:1]])[0]} has no descriptor. Run describe again with --replace."
        )
    return place_of, start


# The comparison of a round


def _known_pairs(images: Images, pairs: str) -> _Pairs:
    """The pairs of the finished stage `pairs` among the images. It wrote those from its `min_similarity` on."""
    known = _Pairs()
    for path in require_manifest(pairs).paths(pairs, "pairs"):
        table = parquet.read_table(path, schemas.PAIRS, ["image_id", "other_image_id", "similarity"])
        one, other = (images.number_of(pack_ids(table[name])) for name in ("image_id", "other_image_id"))
        chosen = (one >= 0) & (other >= 0)
        known.add(one[chosen], other[chosen], table["similarity"].to_numpy()[chosen])
    return known


def _compare(
    comparison: Comparison,
    config: Settings,
    state: np.ndarray,
    guards: Guards,
    place_of: np.ndarray,
    known: _Pairs,
    gathered: str,
    output: str,
    inputs: dict[str, str],
    runner: Runner,
    log: Log,
) -> Manifest:
    """Compare the places that are ASKED with one another and with EARLIER ones. The totals count the `pairs`."""
    asked = np.flatnonzero(state == ASKED)
    starts = range(0, len(asked), IMAGES_PER_SHARD)
    shards = [
        Shard(f"{number:05d}", asked[start : start + IMAGES_PER_SHARD], min(IMAGES_PER_SHARD, len(asked) - start))
        for number, start in enumerate(starts)
    ]

    def prepare() -> ShardRecord:
        one, other = place_of[known.one], place_of[known.other]
        one, other = np.concatenate([one, other]), np.concatenate([other, one])  # either may be the image of the round
        chosen = (state[one] == ASKED) & (state[other] != LEFT_OUT)
        one, other = one[chosen], other[chosen]
        shard = np.searchsorted(asked, one) // IMAGES_PER_SHARD
        similarity = np.zeros(len(one), np.float32)

        def by_shard() -> Iterator[tuple[int, pa.Table]]:
            for number in np.unique(shard).tolist():
                rows = shard == number
                yield number, pa.table([one[rows], other[rows], similarity[rows]], schema=EDGES)

        return ShardRecord(
            name=PREPARED,
            files=(
                npy.write_arrays(
                    paths.join(output, STATE_NAME), state, guards.is_holdout, guards.is_alike, guards.label
                ),
                parquet.write_row_groups(paths.join(output, KNOWN_NAME), "shard", by_shard(), EDGES.empty_table()),
            ),
        )

    stage = Stage(
        name="check",
        config=config,
        inputs=inputs
        | {"gathered": require_manifest(gathered).content_hash, "state": sha256_of_bytes(state.tobytes())}
        | {"comparison": fingerprint(comparison)},
        output=output,
        shards=shards,
        make_worker=functools.partial(_make_comparer, comparison, gathered, output),
        prepare=prepare,
    )
    return run_stage(stage, runner, log=log)


def fingerprint(comparison: Comparison) -> str:
    """A hash of the settings that decide which images are copies."""
    verification = comparison.verification and comparison.verification.model_dump(mode="json")
    thresholds = [comparison.min_cosine, comparison.threshold, comparison.holdout_threshold]
    return hash_json([*thresholds, comparison.label_guard, list(comparison.lookalikes), verification])


def _make_comparer(comparison: Comparison, gathered: str, output: str) -> Callable[[Shard], ShardRecord]:
    """A worker that finds the copies of some images of the round."""
    require_device(comparison.device)
    manifest = require_manifest(gathered)
    files, thumbnails = manifest.paths(gathered, "vectors"), manifest.paths(gathered, "thumbnails")
    described = DescribedRows(files, thumbnails)
    starts = np.cumsum([0, *(vectors.num_rows(file) for file in files)])
    state, *of_guards = npy.read_arrays(paths.join(output, STATE_NAME), 4)
    guards = Guards(*of_guards)
    score = _make_scorer(comparison, described)
    min_similarity = min(comparison.threshold, comparison.holdout_threshold)

    def process(shard: Shard) -> ShardRecord:
        places: np.ndarray = shard.work
        known = parquet.read_row_groups(paths.join(output, KNOWN_NAME), "shard", int(shard.name), EDGES)
        known_keys = _keys(known["place"].to_numpy(), known["other_place"].to_numpy(), len(state))
        queries = described.vectors(places)
        tables: list[pa.Table] = [EDGES.empty_table()]
        num_pairs = 0

        def compare(one: np.ndarray, other: np.ndarray, cosine: np.ndarray) -> np.ndarray:
            """Write the copies among some pairs (P,); returns whether each is one, (P,)."""
            nonlocal num_pairs
            is_copy = np.zeros(len(one), bool)
            for first in range(0, len(one), PAIRS_PER_BATCH):
                part = slice(first, first + PAIRS_PER_BATCH)
                similarity = score(np.stack([one[part], other[part]]), cosine[part])
                is_copy[part] = similarity >= np.float32(min_similarity)
                table = pa.table([one[part], other[part], similarity], schema=EDGES)
                tables.append(table.filter(pa.array(is_copy[part])))
            num_pairs += len(one)
            return is_copy

        def follow(held: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> None:
            """Compare the pairs of each image by falling cosine, while copies are among the last FOLLOWED."""
            one, other, cosine = (np.concatenate(column) for column in zip(*held, strict=True))
            order = np.lexsort((other, -cosine, guards.is_holdout[other], one))
            one, other, cosine = one[order], other[order], cosine[order]
            to_holdout = guards.is_holdout[other] | guards.is_holdout[one]
            first_of = np.searchsorted(one, one)
            step = np.where(
                to_holdout | (comparison.verification is None), 0, (np.arange(len(one)) - first_of) // FOLLOWED
            )
            followed = np.unique(one)
            for number in range(int(step.max(initial=0)) + 1):
                part = np.flatnonzero((step == number) & np.isin(one, followed))
                part = part[np.lexsort((other[part], one[part]))]
                followed = np.unique(one[part[compare(one[part], other[part], cosine[part])]])
                if not len(followed):
                    break

        held: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for path, start, end in zip(files, starts, starts[1:], strict=False):
            active = np.flatnonzero(state[start:end] != LEFT_OUT)
            if len(active):
                matrix = vectors.read_file(path)[1][active]
                query, row, cosine = exact.pairs_above(queries, matrix, comparison.min_cosine, device=comparison.device)
                one, other = places[query], start + active[row]
                # Each pair of images of the round is compared once, and no image with itself.
                chosen = ((state[other] == EARLIER) | (other > one)) & guards.may_be_copies(one, other)
                chosen &= ~np.isin(_keys(one, other, len(state)), known_keys)
                held.append((one[chosen], other[chosen], cosine[chosen]))
            if sum(len(cosine) for _, _, cosine in held) >= PAIRS_HELD:
                follow(held)
                held = []
            report(1, total=len(files))
        if held:
            follow(held)
        file = parquet.write_table(
            paths.join(output, f"edges-{shard.name}.parquet"), pa.concat_tables(tables).combine_chunks()
        )
        return ShardRecord(name=shard.name, files=(file,), totals={"pairs": num_pairs})

    return process


def _make_scorer(comparison: Comparison, described: DescribedRows) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The similarity (P,) float32 of pairs of places (2, P), given the cosines (P,) of their descriptors."""
    if comparison.verification is None:
        return lambda places, cosine: cosine.clip(-1, 1)
    verifier = Verifier(comparison.verification)

    def score(places: np.ndarray, cosine: np.ndarray) -> np.ndarray:
        thumbnails = described.thumbnails(places)
        similarity, _ = verifier.compare(places, thumbnails)
        return similarity

    return score


def _keys(one: np.ndarray, other: np.ndarray, num_places: int) -> np.ndarray:
    """A number (P,) int64 for each pair of places."""
    keys: np.ndarray = one * num_places + other
    return keys


def _read_edges(
    done: Manifest, folder: str, place_of: np.ndarray, num_places: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The edges of a finished round, by the numbers of their images."""
    number_at = np.full(num_places, -1, np.int64)
    number_at[place_of] = np.arange(len(place_of))
    table = pa.concat_tables(
        [EDGES.empty_table(), *(parquet.read_table(path, EDGES) for path in done.paths(folder, "edges"))]
    )
    one, other = (number_at[table[name].to_numpy()] for name in ("place", "other_place"))
    return one, other, table["similarity"].to_numpy()


# The choice


@dataclass(frozen=True)
class _Neighbors:
    """The copies of each image: by image, the most similar first, ties by id."""

    starts: np.ndarray  # (N + 1,)
    other: np.ndarray  # (2P,)
    similarity: np.ndarray  # (2P,)

    @classmethod
    def of(cls, comparison: Comparison, images: Images, pairs: _Pairs) -> "_Neighbors":
        one, other, similarity = _copies(comparison, images, pairs)
        one, other = np.concatenate([one, other]), np.concatenate([other, one])
        similarity = np.concatenate([similarity, similarity])
        order = np.lexsort((other, -similarity, one))
        starts = np.searchsorted(one[order], np.arange(len(images.ids) + 1))
        return cls(starts, other[order], similarity[order])


def _copies(comparison: Comparison, images: Images, pairs: _Pairs) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs that are copies, by the threshold of the two."""
    with_holdout = images.guards.is_holdout[pairs.one] | images.guards.is_holdout[pairs.other]
    threshold = np.where(with_holdout, comparison.holdout_threshold, comparison.threshold).astype(np.float32)
    chosen = (pairs.similarity >= threshold) & images.guards.may_be_copies(pairs.one, pairs.other)
    return pairs.one[chosen], pairs.other[chosen], pairs.similarity[chosen]


def _choose(
    rows: np.ndarray,
    image: np.ndarray,
    proposals: Proposals,
    filled: np.ndarray,
    is_taken: np.ndarray,
    images: Images,
    neighbors: _Neighbors,
) -> None:
    """Visit `rows` in their order. Changes `filled` (G,), `is_taken` (R,) and the states of the images."""
    state = images.state
    for row in rows.tolist():
        group, number = proposals.group[row], image[row]
        if filled[group] >= proposals.quota[group]:
            continue
        if state[number] == NEW:
            near = slice(neighbors.starts[number], neighbors.starts[number + 1])
            blocking = np.flatnonzero(state[neighbors.other[near]] >= TAKEN)
            if len(blocking):
                state[number] = PASSED
                images.matched[number] = neighbors.other[near][blocking[0]]
                images.similarity[number] = neighbors.similarity[near][blocking[0]]
            else:
                state[number] = TAKEN
        if state[number] == TAKEN:
            is_taken[row] = True
            filled[group] += 1


def _totals(comparison: Comparison, images: Images, pairs: _Pairs) -> dict[str, int]:
    """The images of the corpus that are copies of another of its images, or of a holdout image."""
    one, other, _ = _copies(comparison, images, pairs)
    one, other = np.concatenate([one, other]), np.concatenate([other, one])
    is_retrieved = images.state == TAKEN
    in_corpus = is_retrieved | images.is_seed
    near = one[in_corpus[one] & in_corpus[other]]
    seeds_alike = one[images.is_seed[one] & images.is_seed[other]]
    of_holdout = one[in_corpus[one] & images.guards.is_holdout[other]]
    return {
        "retrieved_copies": len(np.unique(near[is_retrieved[near]])),
        "seed_copies": len(np.unique(seeds_alike)),
        "holdout_copies": len(np.unique(of_holdout)),
    }
