"""Checks every byte of a run against the manifests of its stages.

    seedbed verify runs/demo

Checked are the stages; `run.toml`, `report.html` and the log have no manifest. Every file that a manifest lists must be
there, with its size and its SHA-256. A file that no manifest lists is named too: a reader that goes by a pattern of
names would take it for a part of the run. Of an unfinished stage, the files of its finished shards are checked. Nothing
is changed.

Exit status 0, with one line of totals, where all is right; 2, with a line for each problem, where it is not.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import typer

from curation.engine import command, progress
from curation.engine.manifest import (
    MANIFEST_NAME,
    PROGRESS_NAME,
    ShardRecord,
    checked,
    plan_in,
    read_done,
    read_manifest,
    require_manifest,
)
from curation.errors import InputError
from curation.files import paths
from curation.run_folder import STAGES, require_run


@dataclass(frozen=True)
class Verified:
    """The files of a run that were checked, and the problems."""

    num_files: int
    num_bytes: int
    finished: tuple[str, ...]
    """The finished stages, in order."""
    unfinished: tuple[str, ...]
    """The stages with work that is not finished."""
    problems: tuple[str, ...]
    """One line each, with the path of the file."""


def verify(run: str) -> Verified:
    """Check every byte of the run in the folder `run`, local or any fsspec URL. Raises InputError where none is."""
    require_run(run)
    records: dict[str, Sequence[ShardRecord]] = {}
    unfinished = []
    num_files = num_bytes = 0
    problems: list[str] = []
    for stage in STAGES:
        folder = paths.join(run, stage)
        try:
            if read_manifest(folder) is not None:
                records[stage] = require_manifest(folder).shards
            elif plan_in(folder) is not None:
                unfinished.append(stage)
                records[stage] = list({record.name: record for record in read_done(folder)}.values())
            elif names := paths.list_names(folder):
                problems.append(f"{folder} holds {len(names):,} files and no {MANIFEST_NAME}. Delete it")
        except InputError as error:  # of a damaged manifest
            problems.append(str(error).removesuffix("."))
        except OSError as error:
            problems.append(f"{folder} cannot be read: {error.strerror or error}")
    if not records and not problems:
        raise InputError(f"'{run}' is no run: none of its folders {', '.join(STAGES)} holds a stage.")
    total = sum(len(record.files) for shards in records.values() for record in shards)
    with progress.bar("verify", total=total, unit="files") as advance:
        for stage, shards in records.items():
            for record, problems_of_record in checked(paths.join(run, stage), shards, hashes=True):
                size = sum(file.bytes for file in record.files)
                num_files, num_bytes = num_files + len(record.files), num_bytes + size
                problems += problems_of_record
                advance(len(record.files), "")
            if stage not in unfinished:
                problems += _unlisted(paths.join(run, stage), shards)
    finished = tuple(stage for stage in records if stage not in unfinished)
    return Verified(num_files, num_bytes, finished, tuple(unfinished), tuple(problems))


def _unlisted(folder: str, shards: Sequence[ShardRecord]) -> Iterator[str]:
    """A problem for each file or folder of a finished stage that its manifest does not list."""
    listed = set(itertools.chain.from_iterable((file.name for file in record.files) for record in shards))
    for name in paths.list_names(folder):
        if name not in listed | {MANIFEST_NAME, PROGRESS_NAME}:
            yield f"{paths.join(folder, name)} is in no manifest"


def command_line(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of the run, local or any fsspec URL.")],
) -> None:
    """Check every byte of a run against the manifests of its stages.

    Each file that is missing, has other bytes, or is in no manifest is named on a line. The exit status is then 2.
    Nothing is changed: the command that wrote the run, with --replace, does damaged shards again.

    \b
    Examples:
      seedbed verify runs/birds
      seedbed verify s3://bucket/runs/birds
    """
    verified = verify(run)
    for problem in verified.problems:
        print(progress.printable(problem))
    if verified.problems:
        raise InputError(
            f"'{run}': problems: {len(verified.problems):,}; files checked: {verified.num_files:,}. Delete what is in "
            "no manifest, then run the command that wrote the run again with --replace: it does damaged shards again."
        )
    left = f"; not finished: {', '.join(verified.unfinished)}" if verified.unfinished else ""
    print(
        f"{run}: {verified.num_files:,} files with {verified.num_bytes:,} bytes of {len(verified.finished)} finished "
        f"stages are as they were written{left}"
    )


if __name__ == "__main__":
    from pipelines.runs import verify as this  # by its real name, or its classes would exist twice

    command.main(this.command_line)
