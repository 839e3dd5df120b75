"""Prices by the times of a finished run: they repeat the run itself, and grow with each amount of work."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from curation.config import load
from curation.copies.compare_photographs import PhotographComparer
from curation.copies.compare_thumbnails import VerificationConfig
from curation.copies.photographs import Photograph
from curation.engine.run_log import FOLDER, ShardLine, open_log
from curation.engine.runner import InlineRunner
from curation.errors import InputError
from curation.pairs import PairsConfig
from curation.report.self_check import IMAGES_PER_COPY, SelfCheckConfig
from curation.run_folder import STAGES
from pipelines import main_path
from pipelines.main_path import CurateConfig
from pipelines.planning import candidates, measured
from pipelines.planning.candidates import Described, VerificationCost, num_candidates, scored, verification_cost
from pipelines.planning.measured import StageEstimate, StepTimes, grown, makespan, verification_seconds
from pipelines.planning.plan import print_plan, total_rows
from pipelines.planning.price import count_sources
from tests.curation.builders import encoded_image, unit_vectors

# The log of a run on two workers: for each stage its steps, the start-up, the seconds of an image, and of the driver.
SECONDS_OF_IMAGE = {"ingest": 0.1, "embed": 0.5, "describe": 0.4, "pairs": 1.0, "dedup": 0.01, "cluster": 0.02}
START_UP = 3.0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[CurateConfig, Path]:
    """A finished run over 6 seeds, 2 holdout and 24 pool images of noise, whose log has the times above."""
    home = tmp_path_factory.mktemp("measured")
    for role, first, number in (("seeds", 0, 6), ("holdout", 10, 2), ("pool", 20, 24)):
        (home / role).mkdir()
        for index in range(first, first + number):
            (home / role / f"{index}.png").write_bytes(encoded_image(index))
    sources = "".join(
        f'[[ingest.sources]]\nname = "{name}"\nrole = "{role}"\npath = "{home}/{name}"\n'
        for name, role in (("seeds", "seed"), ("holdout", "holdout"), ("pool", "pool"))
    )
    model = '[{}.embedder]\nname = "efficientnet_lite0"\nimage_size = 32\n'
    text = f"{sources}{model.format('embed')}{model.format('describe')}[ingest]\nimages_per_shard = 4\n"
    text += "[[cluster.levels]]\nnum_clusters = 2\nnum_iterations = 5\n[describe]\nthumbnail_side = 32\n"
    text += "[pairs]\nnum_neighbors = 64\nmin_descriptor_similarity = 0.5\nimages_per_shard = 8\n[pairs.verification]\n"
    text += '[[retrieve.datasets]]\nname = "seeds"\nas_is = true\nretrieval = "sample"\nk = 2\n'
    (home / "config.toml").write_text(text)
    config = load(CurateConfig, str(home / "config.toml"))
    run = home / "run"
    with open_log(str(run)) as log:
        main_path.run(config, str(run), InlineRunner(), log=log)
    rewrite_log(run)
    return config, run


def rewrite_log(run: Path) -> None:
    """The log of the run with other times: each step begins when the one before ends."""
    (path,) = (run / FOLDER).glob("shards-*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    now, free, first = 1e9, [0.0, 0.0], {}
    for line in lines:
        match line["event"]:
            case "begin":
                line |= {"time": now, "workers": 1 if line["stage"] == "dedup" else 2}
            case "shard":
                if line["stage"] not in first:
                    now += START_UP
                    first[line["stage"]] = free = [now, now]
                worker = 0 if line["stage"] == "dedup" or free[0] <= free[1] else 1
                seconds = line["items"] * SECONDS_OF_IMAGE.get(line["stage"], 0.01)
                line |= {"started": free[worker], "seconds": seconds, "time": free[worker] + seconds}
                free[worker] += seconds
                now = max(free)
            case "end":
                line |= {"time": now}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def estimates(config: CurateConfig, run: Path, *, workers: int = 2) -> dict[str, StageEstimate]:
    counts = count_sources(config)
    measurements = measured.read_measurements(str(run))
    rows = total_rows(config.model_copy(update={"stated_counts": dict(counts.of_source)}))
    stages = measured.estimate_stages(config, counts, rows, measurements, workers=workers)
    return {stage.stage: stage for stage in stages}


def with_pool(config: CurateConfig, number: int) -> CurateConfig:
    """The config with that many images in the pool, as stated."""
    return config.model_copy(update={"stated_counts": {"seeds": 6, "holdout": 2, "pool": number}})


def test_the_price_of_the_measured_run_is_its_time(finished: tuple[CurateConfig, Path]) -> None:
    config, run = finished
    stages = estimates(config, run)
    assert stages.keys() >= set(STAGES)
    for stage in stages.values():
        assert stage.seconds == pytest.approx(stage.measured_seconds, rel=0.15), stage.stage
        assert 0 <= stage.start_seconds <= stage.seconds
    assert stages["embed"].start_seconds == pytest.approx(START_UP)


def test_work_grows_and_start_up_does_not(finished: tuple[CurateConfig, Path]) -> None:
    config, run = finished
    once, tenfold = estimates(config, run), estimates(with_pool(config, 240), run)
    for name in ("ingest", "embed", "describe"):
        work = [stages[name].seconds - stages[name].start_seconds for stages in (once, tenfold)]
        assert work[1] / work[0] == pytest.approx((240 + 8) / 32, rel=0.1), name
        assert tenfold[name].start_seconds == once[name].start_seconds
    assert tenfold["embed"].images == 248 and tenfold["embed"].measured_images == 32
    images = [stages["pairs"].images for stages in (once, tenfold)]
    work = [stages["pairs"].seconds - stages["pairs"].start_seconds for stages in (once, tenfold)]
    assert work[1] / work[0] > images[1] / images[0], "candidates grow faster than the images"


def test_the_self_check_grows_with_its_copies(finished: tuple[CurateConfig, Path]) -> None:
    config, run = finished
    configs = (config, with_pool(config, 240), with_pool(config, 9_000))
    once, tenfold, large = (estimates(each, run)["self_check"] for each in configs)
    copies = 19 * (9_008 // (IMAGES_PER_COPY * 19))
    assert (once.images, tenfold.images, large.images) == (38, 38, copies)
    assert tenfold.seconds == once.seconds and large.start_seconds == once.start_seconds
    work = [each.seconds - each.start_seconds for each in (once, large)]
    assert work[1] / work[0] == pytest.approx(copies / 38, rel=0.1)
    off = config.model_copy(update={"self_check": SelfCheckConfig()})
    assert estimates(off, run)["self_check"].images == 0
    measurements = measured.read_measurements(str(run))
    nothing = dataclasses.replace(measurements.manifests["self_check"], totals={})
    there = dataclasses.replace(measurements, manifests={**measurements.manifests, "self_check": nothing})
    stages = measured.estimate_stages(config, count_sources(config), None, there, workers=2)
    (priced,) = (each for each in stages if each.stage == "self_check")
    assert priced.seconds > 0, "where it was off there, the fixed rates price it"


def test_describe_is_priced_by_its_pass_there_and_here(finished: tuple[CurateConfig, Path], tmp_path: Path) -> None:
    """The log of the fixture says that describe took times of its own, in the pass of embed."""
    config, run = finished
    embedder = config.describe.embedder.model_copy(update={"image_size": 64})
    apart = config.model_copy(update={"describe": config.describe.model_copy(update={"embedder": embedder})})
    stages = estimates(apart, run)
    assert stages["describe"].seconds == stages["embed"].seconds, "a pass of its own, which was not measured"
    assert stages["describe"].measured_seconds < stages["embed"].measured_seconds
    measurements = measured.read_measurements(str(run))
    lines = [dataclasses.replace(line, ready=False) for line in measurements.steps["describe"].shards]
    step = dataclasses.replace(measurements.steps["describe"], shards=lines)
    two_passes = dataclasses.replace(measurements, steps={**measurements.steps, "describe": step})
    for here, costs in ((config, False), (apart, True)):
        described = measured.estimate_stages(here, count_sources(here), None, two_passes, workers=2)[2]
        assert described.stage == "describe" and (described.seconds > START_UP) == costs


def test_more_workers_take_less_time_until_the_shards_run_out(finished: tuple[CurateConfig, Path]) -> None:
    config, run = finished
    seconds = [estimates(config, run, workers=workers)["embed"].seconds for workers in (1, 2, 9, 64)]
    assert seconds[0] > seconds[1] > seconds[2] == seconds[3] == START_UP + 4 * 0.5


def test_plan_names_the_run_and_other_settings(
    finished: tuple[CurateConfig, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = finished
    monkeypatch.setenv("COLUMNS", "80")
    other = config.model_copy(update={"pairs": config.pairs.model_copy(update={"num_neighbors": 3})})
    print_plan(other, output=str(run), rates_from=str(run))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "measured on 32 images" in text and "on 2001-09-09" in text
    assert "Other settings than there: pairs.num_neighbors = 3 here, 64 there." in text


def test_an_unfinished_run_is_no_measurement(finished: tuple[CurateConfig, Path], tmp_path: Path) -> None:
    (tmp_path / "run.toml").touch()
    with pytest.raises(InputError, match="holds no finished stage"):
        measured.read_measurements(str(tmp_path))
    with pytest.raises(InputError, match="there is no such folder"):
        measured.read_measurements(str(tmp_path / "nowhere"))


# The parts


def shards(*seconds_of_worker: Sequence[float]) -> StepTimes:
    """The times of a step whose shards have 10 images each; a worker takes its shards one after another."""
    lines = [
        ShardLine("shard", 0, "embed", f"{worker}-{number}", seconds, 10, 0, started=number, worker=str(worker))
        for worker, seconds_of_shard in enumerate(seconds_of_worker)
        for number, seconds in enumerate(seconds_of_shard)
    ]
    return StepTimes(0, len(seconds_of_worker), shards=lines)


def test_the_first_shard_of_a_worker_holds_its_start() -> None:
    assert shards((5, 2, 2), (3, 2, 2)).seconds_of_image() == (0.2, 2.0)
    assert shards((2, 2, 2), (1, 2, 2)).seconds_of_image() == (0.2, 0.0)
    assert shards((5,), (3,)).seconds_of_image() == (0.4, 0.0), "all shards are first ones"


def test_makespan() -> None:
    assert makespan([1, 1, 1], 2) == 2
    assert makespan([3, 1, 1, 1], 2) == 3
    assert makespan([], 2) == 0
    assert makespan([1.0] * 100_000, 4) == 25_000


def test_growth_is_in_proportion_or_by_the_rate() -> None:
    assert grown(10, 100, 10, 1e-3) == pytest.approx(10.09), "a short time is mostly constant"
    assert grown(10, 100, 10, 1e3) == 100
    assert grown(10, 5, 10, 1) == 10


def test_a_candidate_costs_more_where_thumbnails_do_not_stay_prepared() -> None:
    cost = VerificationCost(prepare=2, compare=1)
    few, many = (verification_seconds(49 * images, images, 2, cost) / (49 * images) for images in (1_000, 50_000))
    assert few < 1.2 and many > 2.5


def test_features_of_photographs_grow_with_the_images(finished: tuple[CurateConfig, Path]) -> None:
    """The step is in the log of the fixture; a run of drawings has not measured it."""
    config, run = finished
    measurements = measured.read_measurements(str(run))
    step = measurements.steps["pairs/features"]
    assert step.items == 32 and measurements.config.pairs.verification is not None

    def pairs_seconds(number: int, steps: dict[str, StepTimes]) -> float:
        here = with_pool(config, number)
        there = dataclasses.replace(measurements, steps=steps)
        stages = measured.estimate_stages(here, count_sources(here), None, there, workers=2)
        return next(stage.seconds for stage in stages if stage.stage == "pairs")

    slow = dataclasses.replace(
        step, shards=[dataclasses.replace(shard, seconds=shard.seconds + 100 * shard.items) for shard in step.shards]
    )
    steps = dict(measurements.steps)
    once = pairs_seconds(2_400, steps)
    more = pairs_seconds(2_400, steps | {"pairs/features": slow}) - once
    assert more == pytest.approx(100 * 2_408 / 2, rel=0.05), "100 s more an image, on two workers"
    del steps["pairs/features"]
    assert pairs_seconds(2_400, steps) == pytest.approx(once, rel=0.5), "by the fixed rate"


def test_preparing_a_photograph_does_not_include_its_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step computes them once, so verification decodes the thumbnail alone."""
    thumbnails = {str(number): encoded_image(number, "WEBP", (128, 96)) for number in range(12)}
    images = Described(list(thumbnails), np.eye(12), np.ones(12), np.zeros(12, bool))
    clock, num_computed = iter(range(100)), [0]
    at_clock: list[int] = []
    features = PhotographComparer.features

    def counting(comparer: PhotographComparer, photograph: Photograph) -> np.void:
        num_computed[0] += 1
        return features(comparer, photograph)

    def process_time() -> float:
        at_clock.append(num_computed[0])
        return float(next(clock))

    monkeypatch.setattr(PhotographComparer, "features", counting)
    monkeypatch.setattr(candidates, "time", SimpleNamespace(process_time=process_time))
    pairs = [(number, number + 1) for number in range(11)]
    verification_cost(pairs, images, thumbnails, VerificationConfig(domain="photographs"))
    assert at_clock == [12] * 4, "all are computed before the clock starts, and none while it runs"


def estimate_candidates(vectors: np.ndarray, weight: np.ndarray, is_holdout: np.ndarray) -> float:
    images = Described([str(row) for row in range(len(vectors))], vectors, weight, is_holdout)
    return num_candidates(images, scored(images, CONFIG))


CONFIG = PairsConfig(num_neighbors=6, min_descriptor_similarity=0.3)


def brute_force(vectors: np.ndarray, is_holdout: np.ndarray) -> int:
    """The distinct pairs of all lists, and the pairs of full lists with the holdout."""
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -2)
    pairs: set[frozenset[int]] = set()
    for image, row in enumerate(similarity):
        near = [other for other in np.argsort(-row, kind="stable").tolist() if row[other] >= 0.3]
        pairs |= {frozenset((image, other)) for other in near[:6]}
        if len(near) >= 6 and not is_holdout[image]:
            pairs |= {frozenset((image, other)) for other in near if is_holdout[other]}
    return len(pairs)


def crowd(seed: int, count: int) -> np.ndarray:
    """Unit vectors in 40 groups of unequal sizes, and as many alone."""
    generator = np.random.default_rng(seed)
    group = (generator.random(count) ** 2 * 40).astype(int)
    return_to = unit_vectors(7, 40, 24)[group]
    spread = generator.uniform(0.1, 0.6, (count, 1)) * unit_vectors(seed + 1, count, 24) * 2
    vectors: np.ndarray = return_to + spread
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def test_candidates_of_the_same_images_are_those_of_the_search() -> None:
    vectors = crowd(0, 400)
    is_holdout = np.arange(400) % 7 == 0
    estimate = estimate_candidates(vectors, np.ones(400), is_holdout)
    assert estimate == pytest.approx(brute_force(vectors, is_holdout))


@pytest.mark.parametrize("choose", [lambda n: np.arange(n) % 5 == 0, lambda n: np.arange(n) % 8 == 0])
def test_candidates_of_a_whole_follow_from_a_part(choose: Callable[[int], np.ndarray]) -> None:
    vectors = crowd(0, 1500)
    is_holdout = np.zeros(1500, bool)
    chosen = choose(1500)
    weight = np.full(chosen.sum(), 1500 / chosen.sum())
    assert estimate_candidates(vectors[chosen], weight, is_holdout[chosen]) == pytest.approx(
        brute_force(vectors, is_holdout), rel=0.25
    )
