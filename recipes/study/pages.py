"""Puts what a study's results say into its pages: the tables between their comments, and the pictures beside them.

    python recipes/study/pages.py recipes/study

Run it after new lines of results.jsonl (run.py). The tests hold the pages to the results.
"""

import re
from pathlib import Path

import switch_report
import written
from report import study_report

from grow.checkpoint.files import write_text
from grow.cli.arguments import run_script
from grow.errors import UserError


def pages(folder: str) -> None:
    """Writes the tables and pictures of FOLDER/results.jsonl into the pages in FOLDER."""
    here = Path(folder)
    results = here / "results.jsonl"
    report = study_report(results, folder)
    _put(here / "README.md", "what report says", "up to here", report["text"])
    shown = (here / "README.md").read_text(encoding="utf-8")
    for left in (report["table"], *(plot for plot in report["plots"] if f"({Path(plot).name})" not in shown)):
        Path(left).unlink()  # no page shows it
    grids = switch_report.titled(results)
    switch_report.draw(grids, here / "switch.png")
    used = {name: switch_report.table(lines) for name, lines in grids.items()}
    _put(here / "switch.md", "trained", "end of trained", _titled(used))
    answers = {name: written.table(lines) for name, lines in written.titled(results).items()}
    _put(here / "generation.md", "written", "end of written", _titled(answers))


def _titled(tables: dict[str, str]) -> str:
    return "\n".join(f"### {name}\n\n{table}" for name, table in tables.items())


def _put(page: Path, begin: str, end: str, text: str) -> None:
    """Replaces what stands between two comments of a page."""
    before = page.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {begin} -->\n).*?(<!-- {end} -->)", re.DOTALL)
    if len(pattern.findall(before)) != 1:
        raise UserError(f"{page}: the comments <!-- {begin} --> and <!-- {end} --> must stand in it once")
    write_text(page, pattern.sub(lambda found: f"{found[1]}\n{text.rstrip()}\n\n{found[2]}", before))


if __name__ == "__main__":
    run_script(pages, str(__doc__))
