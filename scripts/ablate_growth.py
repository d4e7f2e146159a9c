"""What grown crystals do for a generator: ablate_growth.py TRAIN.h5 GROWN.h5 KNOWN.h5 HULL FOLDER

Trains a small network (WIDTH) on real crystals alone, beside those of the first two and of all rounds of growth (once
and three times in an epoch), and on grown ones without the real ones; each is shown as many crystals in all. Then 1,000
crystals of each are drawn, relaxed and judged, all against the same hull and the same known crystals: KNOWN and
everything grown. Run again, it goes on where it stopped.
"""

import subprocess
import sys
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.table import Table
from scaling import told, train

from cfrl.io.datasets import Dataset
from cfrl.io.storage import read_columns, read_crystals, write_crystals

WIDTH, SHOWN, DRAWS = 128, 160_000, 1000
ROUNDS = {"two rounds": 2, "all rounds": None}


def first_rounds(grown: str, last: int | None, folder: Path) -> str:
    """The crystals of the rounds up to the last one as a dataset."""
    part = folder / f"grown-{last or 'all'}.h5"
    if not part.exists():
        crystals, rounds = read_crystals(grown), read_columns(grown, ["round"])["round"]
        crystals.properties.clear()
        some = crystals if last is None else crystals[(rounds <= last).nonzero()[0]]
        write_crystals(part, some, split=[0] * len(some))
    return str(part.resolve())


def screened(model: Path, place: Path, judge: list[str]) -> pd.DataFrame:
    """The table of a screening of draws of a model, which is made if there is none."""
    run = place / "screen"
    if not (run / "finished").exists():
        drawn, cfrl = place / "drawn.h5", [sys.executable, "-m", "cfrl"]
        with (place / "screen.log").open("a") as log:
            options = ["-n", str(DRAWS), "--seed", "77", "--model", str(model), "-o", str(drawn)]
            subprocess.run([*cfrl, "sample", *options], check=True, stdout=log)
            again = ["--resume", str(run)] if run.exists() else [str(drawn), "-o", str(run), *judge]
            subprocess.run([*cfrl, "screen", *again], check=True, stdout=log)
    return pd.read_csv(run / "table.csv")


def figures(table: pd.DataFrame) -> list[str]:
    """Percent of metastable, novel, new and metastable, and the last without a flag and of two elements or more."""
    elements = table["formula"].str.findall("[A-Z][a-z]?").map(lambda symbols: len(set(symbols)))
    oxygen = table["formula"].str.contains("O(?![a-z])")
    asked = {
        name: table[name] == 1 for name in ("metastable", "novel", "meta_sun", "flagged")
    }  # empty: did not come so far
    wanted = asked["meta_sun"] & ~asked.pop("flagged") & (elements >= 2)
    shares = *asked.values(), wanted, oxygen
    return [f"{100 * share.mean():.1f}" for share in shares] + [f"{table['num_atoms'].mean():.1f}"]


if __name__ == "__main__":
    data, grown, known, hull, folder = *sys.argv[1:5], Path(sys.argv[5])
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: first_rounds(grown, last, folder) for name, last in ROUNDS.items()}
    real, every = str(Path(data).resolve()), parts["all rounds"]
    mixes = {"real alone": ([real], "1")} | {name: ([real, part], "1,1") for name, part in parts.items()}
    mixes |= {
        "all rounds three times": ([real, every], "1,3"),
        "all rounds, without the real ones": ([real, every], "0,1"),
    }
    columns = ("metastable", "novel", "meta-S.U.N.", "of these unflagged, 2+ elements", "with oxygen", "atoms")
    table = Table(
        "", "crystals", "letters + species", "sum", *columns, title="nats per validation crystal; percent of draws"
    )
    for name, (datasets, weights) in mixes.items():
        place = folder / name.replace(",", "").replace(" ", "-")
        sizes = (Dataset(part, "train").size for part in datasets)
        shown = sum(size * float(weight) for size, weight in zip(sizes, weights.split(","), strict=True))
        run = train(place, WIDTH, datasets, round(SHOWN / shown), weights=weights, keep="last")
        found = told(run, shown)
        judged = screened(run.path / "model.safetensors", place, ["--hull", hull, "--known", known, "--known", every])
        nats = (f"{found[name]:.2f}" for name in ("letters + species", "sum"))
        table.add_row(name, f"{shown:,.0f}", *nats, *figures(judged))
        Console().print(table)
