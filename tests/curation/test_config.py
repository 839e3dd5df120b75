"""The config: unknown keys are refused, messages are complete, and a round trip through TOML changes nothing."""

import importlib
import math
import pkgutil
import types
import typing
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
from pydantic import Field, ValidationError, model_validator

import curation
import evaluation
import pipelines
import training
from curation import config
from curation.config import IsPath, NotInPlan, Settings, plan_values
from curation.errors import ConfigError, InputError
from curation.files import paths
from curation.images.sources import SourceConfig
from curation.ingest import IngestConfig
from curation.pack import PackConfig
from curation.pairs import PairsConfig
from curation.retrieve import DatasetConfig, RetrieveConfig
from pipelines.main_path import CurateConfig


class Level(Settings):
    size: int = Field(ge=1)
    name: str = "level"


class Model(Settings):
    name: str
    kind: Literal["small", "large"] = "small"
    rate: float = Field(default=0.5, ge=0, le=1)
    scale: float = 1.0
    limit: int | None = None
    levels: tuple[Level, ...] = ()
    counts: dict[str, int] = Field(default_factory=dict)
    quick: bool = False


class Whole(Settings):
    model: Model
    seed: int = 0


def parse(tables: dict[str, object], *overrides: str) -> Whole:
    return config.parse(Whole, tables, overrides, origin="run.toml")


def values() -> dict[str, object]:
    return {"model": {"name": "vit", "levels": [{"size": 1}, {"size": 2}], "counts": {"a": 1}}}


# A file with mistakes, and the exact lines of the message on it.
PROBLEMS = [
    ('sede = 1\n[model]\nname = "a"', ["Unknown key: 'sede' (did you mean 'seed'?). Found: 1"]),
    (
        '[model]\nname = "a"\n[modle]\nx = 1\nz = [{secret = 2}]',
        ["Unknown key: 'modle' (did you mean 'model'?). Found: a table with the keys x, z"],
    ),
    ("model = {name = {x = 1}}", ["'model.name': Input should be a valid string. Found: a table with the keys x"]),
    ("model = {name = [[1], {x = 2}]}", ["'model.name': Input should be a valid string. Found: a list of 2"]),
    ('[[model]]\nname = "a"', ["'model': Input should be a table. Found: a list of 1"]),
    ('[model]\nname = "a"\ncounts = 7', ["'model.counts': Input should be a table. Found: 7"]),
    (
        '[model]\nname = "a"\n[model.counts]\n"x.y" = "one"',
        ["'model.counts.x.y': Input should be a valid integer. Found: 'one'"],
    ),
    ("[model]", ["Missing key: 'model.name'"]),
    ("", ["Missing key: 'model'"]),
    ("[model]\nname = 1", ["'model.name': Input should be a valid string. Found: 1"]),
    ('[model]\nname = "a"\nquick = 1', ["'model.quick': Input should be a valid boolean. Found: 1"]),
    ('seed = "1"\n[model]\nname = "a"', ["'seed': Input should be a valid integer. Found: '1'"]),
    ('seed = 1.5\n[model]\nname = "a"', ["'seed': Input should be a valid integer. Found: 1.5"]),
    ('seed = true\n[model]\nname = "a"', ["'seed': Input should be a valid integer. Found: True"]),
    ('[model]\nname = "a"\nkind = "huge"', ["'model.kind': Input should be 'small' or 'large'. Found: 'huge'"]),
    ('[model]\nname = "a"\nrate = 1.5', ["'model.rate': Input should be less than or equal to 1. Found: 1.5"]),
    ('[model]\nname = "a"\nrate = nan', ["'model.rate': Input should be a finite number. Found: nan"]),
    ('[model]\nname = "a"\nscale = inf', ["'model.scale': Input should be a finite number. Found: inf"]),
    ('[model]\nname = "a"\nlevels = [{}]', ["Missing key: 'model.levels.0.size'"]),
    ('[model]\nname = "a"\nlevels = 3', ["'model.levels': Input should be a valid array. Found: 3"]),
    (
        'seed = "x"\nsede = 2\n[model]\nrate = -1\nlevels = [{size = 1}, {size = 0, nmae = "b"}]',
        [
            "Missing key: 'model.name'",
            "'model.rate': Input should be greater than or equal to 0. Found: -1",
            "'model.levels.1.size': Input should be greater than or equal to 1. Found: 0",
            "Unknown key: 'model.levels.1.nmae' (did you mean 'name'?). Found: 'b'",
            "'seed': Input should be a valid integer. Found: 'x'",
            "Unknown key: 'sede' (did you mean 'seed'?). Found: 2",
        ],
    ),
]


@pytest.mark.parametrize(("text", "lines"), PROBLEMS, ids=[text.replace("\n", " ") or "empty" for text, _ in PROBLEMS])
def test_one_message_names_every_problem(tmp_path: Path, text: str, lines: list[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        config.load(Whole, str(path))
    first, *rest = str(caught.value).splitlines()
    assert first == f"{path}: {len(lines)} problem{'s' if len(lines) > 1 else ''} in the config:"
    assert rest == [f"  {line}" for line in lines]


class Alternatives(Settings):
    """Sections with a union, and with a check of the whole section."""

    protocol: Literal["linear", "multiscale"] | Level = "linear"
    low: int = Field(default=0, ge=0)
    high: int = 9

    @model_validator(mode="after")
    def _check(self) -> "Alternatives":
        problems = [f"{name} is odd" for name in ("low", "high") if getattr(self, name) % 2]
        if problems:
            raise ValueError("\n".join(problems))
        return self


class Nested(Settings):
    section: Alternatives


@pytest.mark.parametrize(
    ("section", "lines"),
    [
        (
            {"protocol": "lineer"},
            ["'section.protocol': Input should be 'linear' or 'multiscale' (did you mean 'linear'?), or: "
             "Input should be a table. Found: 'lineer'"],
        ),
        (
            {"protocol": {"size": 0}},
            ["'section.protocol': Input should be 'linear' or 'multiscale'. Found: a table with the keys size",
             "'section.protocol.size': Input should be greater than or equal to 1. Found: 0"],
        ),
        ({"low": -1}, ["'section.low': Input should be greater than or equal to 0. Found: -1"]),
        ({"low": 1}, ["'section': low is odd", "'section': high is odd"]),
    ],
)  # fmt: skip
def test_message_names_settings_and_nothing_else(section: dict[str, object], lines: list[str]) -> None:
    """No name of a class or a function, no dump of a section; a check of the section only after its ranges."""
    with pytest.raises(ConfigError) as caught:
        config.parse(Nested, {"section": section}, origin="x")
    assert str(caught.value).splitlines()[1:] == [f"  {line}" for line in lines]


def test_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(ConfigError) as caught:
        parse({"model": {"name": "a", "kind": "x" * 5000}})
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("seed=7", {"seed": 7}),
        (" seed = 7 ", {"seed": 7}),
        ("model.name=large one", {"name": "large one"}),
        ("model.name='3'", {"name": "3"}),
        ("model.name=a=b", {"name": "a=b"}),
        ("model.name=", {"name": ""}),
        ("model.rate=0.25", {"rate": 0.25}),
        ("model.rate=1", {"rate": 1.0}),
        ("model.quick=true", {"quick": True}),
        ("model.levels=[{size=9}]", {"levels": (Level(size=9),)}),
        ("model.levels.1.size=9", {"levels": (Level(size=1), Level(size=9))}),
        ("model.levels.0={size=3, name='x'}", {"levels": (Level(size=3, name="x"), Level(size=2))}),
        ("model.counts.b=2", {"counts": {"a": 1, "b": 2}}),
        ("model.counts={}", {"counts": {}}),
    ],
)
def test_override_changes_that_value_alone(override: str, changed: dict[str, object]) -> None:
    before = values()
    plain, overridden = parse(before), parse(before, override)
    assert before == values(), "the caller's values were changed"
    seed = changed.pop("seed", 0)
    assert overridden == plain.model_copy(update={"seed": seed, "model": plain.model.model_copy(update=changed)})


def test_overrides_apply_in_order_and_can_make_a_section() -> None:
    assert parse({}, "model.name=a", "model.name=b", "model.counts.x=1").model.counts == {"x": 1}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "--set seed: expected 'section.key=value'."),
        ("=3", "--set =3: expected 'section.key=value'."),
        ("model..name=a", "--set model..name=a: expected 'section.key=value'."),
        ("model.levels.2.size=1", "--set model.levels.2.size=1: '2' is not an index into a list of 2."),
        ("model.levels.-1.size=1", "--set model.levels.-1.size=1: '-1' is not an index into a list of 2."),
        ("model.levels.²=1", "--set model.levels.²=1: '²' is not an index into a list of 2."),
        ("model.levels.size=1", "--set model.levels.size=1: 'size' is not an index into a list of 2."),
        ("model.name.x=1", "--set model.name.x=1: 'x' lies inside a value ('vit'), not inside a section."),
    ],
)
def test_override_of_a_path_that_does_not_exist_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(values(), override)
    assert str(caught.value) == message


def test_override_of_an_unknown_key_is_an_unknown_key() -> None:
    with pytest.raises(ConfigError, match=r"Unknown key: 'model.nmae' \(did you mean 'name'\?\). Found: 'x'"):
        parse(values(), "model.nmae=x")


def random_whole(seed: int) -> Whole:
    rng = np.random.default_rng(seed)
    texts = ["", "a", 'quote " and \\ and \n line', "ünï ☃", "2024-01-01", "true", "a.b=c", "[x]"]

    def text() -> str:
        return str(rng.choice(texts))

    return Whole(
        seed=int(rng.integers(-(2**62), 2**62)),
        model=Model(
            name=text(),
            kind="large" if rng.random() < 0.5 else "small",
            rate=float(rng.random()),
            scale=float(rng.choice([1e-300, -1e300, 0.1, 3.0, rng.normal()])),
            limit=None if rng.random() < 0.5 else int(rng.integers(100)),
            levels=tuple(Level(size=int(rng.integers(1, 9)), name=text()) for _ in range(rng.integers(3))),
            counts={text(): int(rng.integers(9)) for _ in range(rng.integers(4))},
            quick=bool(rng.random() < 0.5),
        ),
    )


@pytest.mark.parametrize("seed", range(20))
def test_resolved_text_reads_back_equal(seed: int, tmp_path: Path) -> None:
    settings = random_whole(seed)
    path = str(tmp_path / "resolved.toml")
    paths.write_bytes(path, config.resolved_toml(settings).encode())
    assert config.load(Whole, path) == settings
    assert config.resolved_toml(config.load(Whole, path)) == config.resolved_toml(settings)


def test_stage_configs_read_back_equal(tmp_path: Path) -> None:
    source = SourceConfig(name="s", path="memory://s", role="seed", layout="parquet", label_column="label")
    dataset = DatasetConfig(name="s", as_is=True, retrieval="cluster", cap=7)
    for settings in (
        IngestConfig(sources=(source,)),
        RetrieveConfig(datasets=(dataset,), draw="random"),
        PackConfig(temperature=0.3),
        PairsConfig(),
    ):
        path = str(tmp_path / "resolved.toml")
        paths.write_bytes(path, config.resolved_toml(settings).encode())
        assert config.load(type(settings), path) == settings


def all_settings(model: type[Settings] = Settings) -> list[type[Settings]]:
    return [model] + [below for child in model.__subclasses__() for below in all_settings(child)]


def test_default_of_every_optional_setting_is_none() -> None:
    """TOML has no null: a setting of None is left out of the text, so its default must be None."""
    for package in (curation, training, evaluation, pipelines):
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    names = {model.__name__ for model in all_settings()}
    assert names >= {"PackConfig", "BackboneConfig", "KnnConfig"}
    for model in all_settings():
        for name, field in model.model_fields.items():
            union = typing.get_origin(field.annotation) in (typing.Union, types.UnionType)
            if union and type(None) in typing.get_args(field.annotation) and not field.is_required():
                assert field.get_default(call_default_factory=True) is None, f"{model.__name__}.{name}"


def test_settings_are_frozen_and_their_defaults_are_checked() -> None:
    settings = parse(values())
    with pytest.raises(ValidationError):
        settings.seed = 1

    class Wrong(Settings):
        rate: float = Field(default=2.0, le=1)

    with pytest.raises(ConfigError, match=r"'rate': Input should be less than or equal to 1\. Found: 2\.0"):
        config.parse(Wrong, {}, origin="x")


def test_only_the_section_is_read_with_its_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[model]\nname = "a"\n[other]\nanything = "goes"\n')
    section = config.load(Model, str(path), ["model.rate=0.125", "other.more=1"], section="model")
    assert section == Model(name="a", rate=0.125)
    with pytest.raises(ConfigError) as caught:
        config.load(Model, str(path), ["model.rate=7"], section="model")
    assert str(caught.value).startswith(f"{path} [model]: 1 problem in the config:\n  'rate': Input should be less")


@pytest.mark.parametrize("text", ['[embed]\nname = "a"', "model = 3"])
def test_missing_section_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(
        ConfigError, match=r"run\.toml: no section \[model\]; this stage needs it. Found: (embed|model)"
    ):
        config.load(Model, str(path), section="model")


def test_missing_or_broken_config_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"No config file at '.*nothing\.toml'.*--config"):
        config.load(Whole, str(tmp_path / "nothing.toml"))
    with pytest.raises(ConfigError, match="a directory"):
        config.load(Whole, str(tmp_path))
    broken = tmp_path / "broken.toml"
    broken.write_text("[model\nname = 1")
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML: .*line 1"):
        config.load(Whole, str(broken))
    for text in ("a = " + "[" * 50_000 + "]" * 50_000, ".".join("a" * 2_000) + " = 1", "a = " + "[" * 33 + "]" * 33):
        broken.write_text(text)
        with pytest.raises(ConfigError, match=r"not valid TOML: tables and lists of more than 32 levels"):
            config.load(Whole, str(broken))
        with pytest.raises(ConfigError, match=r"not valid TOML|more than 32 levels|expected|valid string"):
            parse(values(), f"model.name={text.partition('= ')[2]}", f"{'.'.join('a' * 2_000)}=1")
    broken.write_bytes(b"\xff\xfe\x00binary")
    with pytest.raises(ConfigError, match=r"broken\.toml: not a text file"):
        config.load(Whole, str(broken))
    with pytest.raises(InputError, match="nosuch"):
        config.load(Whole, "nosuch://bucket/run.toml")


def test_byte_order_mark_of_a_config_is_read(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b'\xef\xbb\xbfseed = 3\n[model]\nname = "a"')
    assert config.load(Whole, str(tmp_path / "run.toml")).seed == 3


def test_home_folder_takes_the_place_of_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the outputs, which hold paths of images, have the absolute path. In a name a tilde stays."""
    monkeypatch.setenv("HOME", "/home/ada")
    tables = {"ingest": {"sources": [{"name": "a~", "role": "pool", "path": "~/images"}]}}
    (source,) = config.parse_section(IngestConfig, tables, [], section="ingest", origin="x").sources
    assert (source.name, source.path) == ("a~", "/home/ada/images")
    changed = config.parse_section(IngestConfig, tables, ["ingest.sources.0.path=~/more"], section="ingest", origin="x")
    assert changed.sources[0].path == "/home/ada/more"


@pytest.mark.parametrize(("override", "head"), [("modle.rate=1", "modle"), ("rate=1", "rate")])
def test_override_outside_the_known_sections_is_refused(override: str, head: str) -> None:
    """It would have no effect, in silence."""
    with pytest.raises(ConfigError, match=rf"--set {override}: there is no section '{head}' in x"):
        config.parse_section(Model, {"model": {"name": "a"}}, [override], section="model", origin="x")


def test_stage_alone_refuses_an_unknown_profile() -> None:
    with pytest.raises(ConfigError, match=r"no profile is named 'papr'.* Choose from: photos, drawings, paper, exact"):
        config.parse_section(Model, {"profile": "papr", "model": {"name": "a"}}, [], section="model", origin="x")
    with pytest.raises(ConfigError, match=r"x: there is no profile 'default' any more. Take 'photos'"):
        config.parse_section(Model, {"profile": "default", "model": {"name": "a"}}, [], section="model", origin="x")


def test_config_is_read_from_any_filesystem() -> None:
    paths.write_bytes("memory://configs/run.toml", b'seed = 3\n[model]\nname = "a"')
    assert config.load(Whole, "memory://configs/run.toml") == Whole(seed=3, model=Model(name="a"))
    paths.delete("memory://configs")


def test_large_and_exact_numbers_survive() -> None:
    settings = parse(values() | {"seed": 2**62 + 1}, "model.scale=0.1")
    assert settings.seed == 2**62 + 1
    assert math.nextafter(settings.model.scale, 1) > 0.1 == settings.model.scale


class GuardSettings(Settings):
    limit: Annotated[int, NotInPlan] = 1
    power: int = 2


class NestedSettings(Settings):
    threads: Annotated[int | None, NotInPlan] = None
    section: GuardSettings = GuardSettings()
    optional: GuardSettings | None = None
    left_out: Annotated[GuardSettings, NotInPlan] = GuardSettings()
    several: tuple[GuardSettings, ...] = (GuardSettings(limit=5),)
    name: str = "a"


def test_a_plan_leaves_out_the_fields_that_are_marked_in_all_sections() -> None:
    expected = {"section": {"power": 2}, "optional": None, "several": [{"power": 2}], "name": "a"}
    assert plan_values(NestedSettings()) == plan_values(NestedSettings(threads=3)) == expected
    filled = NestedSettings(optional=GuardSettings(limit=9), left_out=GuardSettings(power=9))
    assert plan_values(filled) == expected | {"optional": {"power": 2}}
    assert plan_values(GuardSettings()) == {"power": 2}


# Paths


class Place(Settings):
    path: Annotated[str, IsPath]
    name: str = ""


class Places(Settings):
    weights: Annotated[str | None, IsPath] = None
    images: Annotated[tuple[str, ...], IsPath] = ()
    sources: tuple[Place, ...] = ()
    by_name: dict[str, Place] = Field(default_factory=dict)


PATHS = """
weights = "weights.pth"
images = ["a.png", "/b.png", "s3://bucket/c.png", "../d.png"]
sources = [{ path = "pool", name = "a/b" }, { path = "./seeds/" }]
[by_name.x]
path = "x"
"""


def test_paths_of_a_config_begin_at_its_folder_and_typed_ones_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/mine.toml").write_text(PATHS)
    monkeypatch.chdir(tmp_path)
    there = f"{tmp_path}/configs"
    settings = config.load(Places, "configs/mine.toml", ["sources.0.path=typed"])
    assert settings.weights == f"{there}/weights.pth"
    assert settings.images == (f"{there}/a.png", "/b.png", "s3://bucket/c.png", f"{tmp_path}/d.png")
    assert [(place.path, place.name) for place in settings.sources] == [
        (f"{tmp_path}/typed", "a/b"),
        (f"{there}/seeds", ""),
    ]
    assert settings.by_name["x"].path == f"{there}/x"
    assert set(config.paths_in(settings)) == {
        f"{there}/weights.pth",
        *settings.images,
        f"{tmp_path}/typed",
        f"{there}/seeds",
        f"{there}/x",
    }
    saved = tmp_path / "out" / "run.toml"
    saved.parent.mkdir()
    config.write_resolved(settings, str(saved))
    assert config.load(Places, str(saved)) == settings
    monkeypatch.chdir("/")
    assert config.load(Places, str(saved)) == settings


def test_paths_of_a_remote_config_begin_at_its_folder() -> None:
    paths.write_bytes("memory://configs/mine.toml", PATHS.encode())
    settings = config.load(Places, "memory://configs/mine.toml")
    assert (settings.weights, settings.images[1]) == ("memory://configs/weights.pth", "/b.png")


def test_a_section_with_typed_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.toml").write_text("[places]\n" + PATHS.replace("[by_name", "[places.by_name"))
    monkeypatch.chdir("/")
    settings = config.load(Places, f"{tmp_path}/mine.toml", ["places.weights=w"], section="places")
    assert (settings.weights, settings.sources[0].path) == ("/w", f"{tmp_path}/pool")


@pytest.mark.parametrize("name", ["demo", str(config.SHIPPED_CONFIGS / "demo.toml")])
def test_a_shipped_config_has_a_name_and_begins_at_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = config.load(CurateConfig, name)
    assert settings.demo_data == f"{tmp_path}/data/demo"
    assert settings.report.concepts == str(config.SHIPPED_CONFIGS / "clipart_concepts.toml")
    (tmp_path / "demo").write_text("seed = 1\n[model]\nname = 'mine'")
    if name == "demo":
        assert config.load(Whole, "demo").seed == 1


def test_an_unknown_name_lists_the_shipped_configs() -> None:
    with pytest.raises(
        ConfigError, match=r"No config file at 'demmo'.*: clipart, demo, evaluate/demo, lvd142m, train/"
    ):
        config.load(Whole, "demmo")
