"""`python -m tests.fuzz`: run cases, print what came of them by area, and each failure."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from tests.fuzz import children, flags, formulas, models, seeds, settings, stored, structures
from tests.fuzz.cases import Area
from tests.fuzz.children import BAD, GOOD, Limits, Result

_LAZY = (
    "cfrl.model.training",
    "cfrl.rewards.predictor_training",
    "cfrl.screening.retrieval",
    "cfrl.commands.data_hull",
    "cfrl.screening.ranking",
    "matplotlib.pyplot",
)


def areas(made: seeds.Seeds) -> dict[str, Area]:
    """By name; case k is of area k modulo their number."""
    return {
        "structure files": structures.case,
        "storage": partial(stored.case, seeds=made),
        "settings": partial(settings.case, seeds_=made),
        "models": partial(models.case, seeds=made),
        "flags": flags.case,
        "expressions": formulas.case,
    }


def table(results: Iterable[Result], names: Iterable[str]) -> str:
    """Counts of outcomes by area, as markdown."""
    counts = Counter((result.area, outcome) for result in results for outcome in ("cases", result.outcome))
    heads = ("cases", *GOOD, *BAD)
    rows = [(name, *(f"{counts[name, head]:,}" for head in heads)) for name in names]
    rows.append(("all", *(f"{sum(counts[name, head] for name in names):,}" for head in heads)))
    lines = [("area", *heads), ("---", *["---:"] * len(heads)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """Exit status 1 if any case failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="what they all follow from")
    parser.add_argument("--only", type=int, nargs="*", help="these numbers alone")
    parser.add_argument("--area", help="this area alone")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="child processes at once")
    given = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="cfrl-fuzz-") as folder:
        os.environ["CFRL_CACHE"] = str(Path(folder) / "cache")
        os.chdir(folder)
        for name in _LAZY:
            importlib.import_module(name)  # once, not in every child
        made = areas(seeds.make(Path(folder) / "seeds"))
        names = list(made)
        numbers = given.only if given.only is not None else range(given.cases)
        numbers = [k for k in numbers if given.area in (None, names[k % len(names)])]
        gc.collect()
        gc.freeze()  # what children share with this process stays shared
        results = []
        for result in children.run(made, numbers, given.seed, Path(folder) / "work", given.workers, Limits()):
            results.append(result)
            if result.outcome in BAD or given.only is not None:
                print(
                    f"case {result.number} ({result.area}): {result.outcome}: {result.line.strip()[-1500:]}", flush=True
                )
    print(table(results, names))
    slowest = sorted(results, key=lambda result: -result.seconds)[:5]
    print(f"seed {given.seed}, {len(results):,} cases in {time.monotonic() - start:.0f} s; the slowest: ", end="")
    print(", ".join(f"{result.number} ({result.seconds:.1f} s)" for result in slowest))
    print("\n".join(f"{outcome}: {meaning}" for outcome, meaning in BAD.items()))
    return int(any(result.outcome in BAD for result in results))


if __name__ == "__main__":
    sys.exit(main())
