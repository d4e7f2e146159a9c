"""report.html: what a run did, on one page; its figures also as PNG and SVG in plots/.

What each command's page shows is in the file of its name; others show their metrics (course.py). page.py makes pages,
figures.py draws figures.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cfrl.errors import UserError
from cfrl.files import atomic_file
from cfrl.reports.course import metrics_page
from cfrl.reports.figures import save
from cfrl.reports.finetune import finetune_page
from cfrl.reports.page import Page
from cfrl.reports.reading import command
from cfrl.reports.retrieve import retrieve_page
from cfrl.reports.screen import screen_page
from cfrl.runs.folder import RunFolder, newest_run
from cfrl.untrusted import fitting

REPORT = "report.html"

_PAGES: dict[str, Callable[[RunFolder], Page]] = {
    "finetune": finetune_page,
    "retrieve": retrieve_page,
    "screen": screen_page,
}


def write_report(run: RunFolder | str | Path, console: Any = None) -> Path:
    """`report.html` of a run folder, and its figures in `plots/`.

    Args:
        run: the folder.
        console: a rich console that is told what was written.

    Raises:
        UserError: no run folder, nothing in it to report, or files that were damaged since.
    """
    run = run if isinstance(run, RunFolder) else RunFolder.open(run)
    with fitting(run.path):
        page = _PAGES.get(command(run), metrics_page)(run)
    plots = run.path / "plots"
    plots.mkdir(exist_ok=True)
    for figure in page.figures:
        save(figure, plots)
    path = run.path / REPORT
    with atomic_file(path) as temp:
        temp.write_text(page.html(), encoding="utf-8")
    if console is not None:
        console.print(f"Written: {path} and {len(page.figures)} figures in {plots}", highlight=False, soft_wrap=True)
    return path


def newest_reportable(root: str | Path = "runs") -> RunFolder:
    """The newest run that has a page of its own.

    Raises:
        UserError: there is none.
    """
    run = newest_run(list(_PAGES), root)
    if run is None:
        raise UserError(f"there is no run of {', '.join(_PAGES)} in {root}; name a run folder")
    return run
