"""Writes the report of a finished run again, for example after `[report]` of its `run.toml` was changed.

    python -m pipelines.report runs/demo

The page and its contents: curation/report/page.py. A report that is up to date is left as it is.
"""

from typing import Annotated

import typer

from curation.config import load
from curation.engine import command
from curation.engine.manifest import MANIFEST_NAME
from curation.errors import InputError
from curation.files import paths
from curation.report import page
from curation.report.page import ReportConfig
from curation.run_folder import STAGES, require_run


def write(run: str) -> str:
    """The path of the report of the finished run in the folder `run`. Raises InputError where a stage is not done."""
    require_run(run)
    if not paths.exists(paths.join(run, page.CONFIG_NAME)):
        raise InputError(f"'{run}' has no {page.CONFIG_NAME}: its stages were run alone, so it has no report.")
    if left := [stage for stage in STAGES if not paths.exists(paths.join(run, stage, MANIFEST_NAME))]:
        raise InputError(
            f"'{run}' has no report yet: not finished: {', '.join(left)}. Run the command that began the run again; "
            f"`seedbed status {run}` shows the work that is left."
        )
    config = load(ReportConfig, paths.join(run, page.CONFIG_NAME), section="report")
    page.run(config, run)
    return paths.join(run, page.REPORT_NAME)


def command_line(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a finished run, local or any fsspec URL.")],
) -> None:
    """Write the report of a finished run again.

    The last line is the path of the page. It has no script and loads nothing, so a browser opens it as it is.

    \b
    Examples:
      seedbed report runs/birds
    """
    print(f"The report is {write(run)}")


if __name__ == "__main__":
    from pipelines import report  # by its real name, or its classes would exist twice

    command.main(report.command_line)
