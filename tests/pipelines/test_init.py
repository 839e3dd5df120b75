"""`seedbed init`: the config is valid, its comments are settings that exist, and no file is overwritten."""

import re
import tomllib
from pathlib import Path

import pytest

from curation.config import parse
from curation.errors import ConfigError
from pipelines import init
from pipelines.main_path import CurateConfig
from tests.curation.builders import run_in_process


def test_it_writes_a_file_once_and_prints_the_next_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run_in_process(init.command_line)
    assert done.returncode == 0 and "seedbed curate --config seedbed.toml --output " in done.stdout
    text = Path("seedbed.toml").read_text()
    assert text == init.CONFIG and text.startswith('profile = "photos" ')
    Path("seedbed.toml").write_text("mine")
    done = run_in_process(init.command_line)
    assert done.returncode == 2 and "'seedbed.toml' exists" in done.stderr
    assert Path("seedbed.toml").read_text() == "mine"
    assert run_in_process(init.command_line, "configs/other.toml").returncode == 0
    assert Path("configs/other.toml").read_text() == init.CONFIG
    done = run_in_process(init.command_line, "seedbed.toml/other.toml")
    assert done.returncode == 2 and done.stderr.startswith("error: 'seedbed.toml/other.toml' cannot be written: ")


def test_the_sources_alone_are_set() -> None:
    values = tomllib.loads(init.CONFIG)
    assert values.keys() == {"profile", "ingest"} and values["ingest"].keys() == {"sources"}
    assert [source["role"] for source in values["ingest"]["sources"]] == ["seed", "pool"]
    assert max(map(len, init.CONFIG.splitlines())) <= 80


def test_every_setting_that_is_commented_out_exists_and_has_a_valid_value() -> None:
    text, num_settings = re.subn(r"^# (?=\[|[a-z_]+ = )", "", init.CONFIG, flags=re.MULTILINE)
    assert num_settings > 20
    values = tomllib.loads(text)
    assert [source["role"] for source in values["ingest"]["sources"]] == ["seed", "pool", "holdout"]
    parse(CurateConfig, values, origin="seedbed.toml")
    values["dedup"]["treshold"] = values["dedup"].pop("threshold")
    with pytest.raises(ConfigError, match="did you mean 'threshold'"):
        parse(CurateConfig, values, origin="seedbed.toml")
