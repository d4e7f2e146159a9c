"""A submission to the leaderboard of LeMat-GenBench: exactly 2,500 CIFs, and the card that goes with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cfrl.errors import UserError
from cfrl.files import provenance
from cfrl.io.export import cif_texts
from cfrl.screening.dft import replaced_folder

if TYPE_CHECKING:
    from pymatgen.core import Structure

    from cfrl.screening.protocol import Figures

SIZE = 2500  # crystals, no more and no fewer
BLANK = "(to fill in)"
# What the leaderboard asks for and no screening knows.
ASKED = (
    "model",
    "paper",
    "code",
    "training data",
    "training: FLOPs and hours, on which hardware",
    "inference: time for 2,500 crystals on a reference GPU, and peak memory",
)


def check_submission(folder: str, readable: int, source: str) -> None:
    """Fail before anything is computed.

    Raises:
        UserError: there are not enough crystals, or the folder holds something that is no submission.
    """
    if readable < SIZE:
        raise UserError(f"--submission takes exactly {SIZE:,} crystals, and {source} has {readable:,} that can be read")
    path = Path(folder)
    if path.exists() and (not path.is_dir() or ({entry.name for entry in path.iterdir()} - {"cifs", "card.md"})):
        raise UserError(f"{path}: exists and is no submission; name another folder")


def write_submission(
    folder: str | Path, structures: Sequence[Structure], about: Mapping[str, str], figures: Figures
) -> None:
    """Writes `cifs/0000.cif` and so on, all atoms of each cell as they stand, and `card.md`.

    Args:
        structures: the crystals.
        about: what is known of their making, for the card.
        figures: of the protocol.
    """
    width = len(str(SIZE - 1))
    with replaced_folder(Path(folder)) as path:
        (path / "cifs").mkdir()
        for row, text in enumerate(cif_texts(structures, None)):
            (path / "cifs" / f"{row:0{width}d}.cif").write_text(text, encoding="utf-8")
        (path / "card.md").write_text(card(about, figures), encoding="utf-8")


def card(about: Mapping[str, str], figures: Figures) -> str:
    """The card as Markdown: what the leaderboard asks for, and this screening's own figures."""
    facts = {"task": "unconditional generation", "crystals": f"{SIZE:,}"} | dict.fromkeys(ASKED, BLANK) | dict(about)
    facts |= {"written by": f"cfrl {provenance()['version']}"}
    lines = ["# Submission to LeMat-GenBench", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    for geometry in figures.counts:
        lines += [f"## Crystals {geometry}", "", "| | crystals | of the valid | of all |", "| --- | --- | --- | --- |"]
        for name, (count, valid, whole) in figures.shares(geometry).items():
            lines.append(f"| {name} | {count} | {'' if valid != valid else f'{valid:.1%}'} | {whole:.1%} |")
        lines += ["", "| | |", "| --- | --- |"]
        lines += [f"| {name} | {value:.4g} |" for name, value in figures.numbers[geometry].items()]
        lines.append("")
    return "\n".join([*lines, figures.instead, ""])
