"""How often the structure of a formula is found that the model never saw, among n candidates, relaxed.

    python scripts/make_training_set.py DATA train.h5
    python tests/benchmarks/bench_prediction.py train.h5 --crystals 200 --draws 20 --draws 100

Validation crystals of a dataset (of the embedded generator's: 1,212 crystals of mp_20) of which no training crystal has
the formula, of at most 20 atoms in the primitive cell. Matched with StructureMatcher, with the tolerances of MatterGen
and DiffCSP (ltol 0.3, stol 0.5, angle 10) and with pymatgen's own (0.2, 0.3, 5); RMSE is of the former's matches, in
(volume per atom)^(1/3).
"""

import time
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Structure

import cfrl
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.fingerprint import fingerprints
from cfrl.crystals.structure_types import StructureTypes
from cfrl.errors import UserError
from cfrl.io.datasets import load_dataset
from cfrl.model.options import Wishes
from cfrl.model.prediction import likelihoods, likely_crystals
from cfrl.potentials import load_potential
from cfrl.potentials.relax import RelaxResult, relax

WIDE = StructureMatcher(ltol=0.3, stol=0.5, angle_tol=10)
STRICT = StructureMatcher()


class Outcome(NamedTuple):
    """Of the candidates of a formula: whether the structure that is sought is among them, is the lowest in energy, the
    likeliest, is among them by the strict tolerances, had its letters among them as drawn; the least RMSE.
    """

    among_all: bool
    lowest: bool
    likeliest: bool
    strict: bool
    letters: bool
    rmse: float


MISSED = Outcome(*(False,) * 5, np.nan)


def main(
    dataset: str,
    crystals: Annotated[int, typer.Option(help="How many formulas.")] = 200,
    draws: Annotated[list[int] | None, typer.Option(help="Candidates of each.")] = None,
    model: str = "default",
    types: Annotated[bool, typer.Option(help="Known structure types beside the model's own draws.")] = True,
    seed: int = 0,
) -> None:
    draws, start = sorted(draws or [20]), time.monotonic()
    structure_types = StructureTypes.embedded() if types else None
    generator, potential = cfrl.load_model(model), load_potential("chgnet")
    found: dict[int, list[Outcome]] = {n: [] for n in draws}
    for done, (truth, target) in enumerate(islice(unseen(dataset, seed), crystals), 1):
        formula = truth.formulas()[0]
        try:
            drawn = likely_crystals(generator, draws[-1], Wishes(formula=formula), seed, structure_types)
        except UserError as error:
            print(formula, error, flush=True)
            for outcomes in found.values():
                outcomes.append(MISSED)
            continue
        result = relax(drawn.to_structures(), potential, steps=200)
        for n, outcomes in found.items():
            outcomes.append(judged(truth, target, drawn[:n], result[:n]))
        last = {n: outcomes[-1] for n, outcomes in found.items()}
        said = "; ".join(f"{n}: any {x.among_all}, lowest {x.lowest}, likeliest {x.likeliest}" for n, x in last.items())
        print(f"{done} {formula} ({int(truth.space_group)}) {said} {time.monotonic() - start:.0f} s", flush=True)
    print(f"| candidates | {' | '.join(Outcome._fields)} |\n" + "| --- " * 7 + "|")
    for n, outcomes in found.items():
        table = np.array(outcomes, dtype=float)
        print(f"| {n} | {' | '.join(f'{x:.1%}' for x in table[:, :5].mean(0))} | {np.nanmean(table[:, 5]):.3f} |")
    print(f"{len(found[draws[0]])} formulas, {torch.get_num_threads()} threads, {time.monotonic() - start:.0f} s")


def unseen(dataset: str, seed: int) -> Iterator[tuple[CrystalBatch, Structure]]:
    """Validation crystals of formulas that no training crystal has, at random, and their primitive cells."""
    known, learnt = load_dataset(dataset, split="validation"), set(load_dataset(dataset, split="train").formulas())
    rows = [row for row, formula in enumerate(known.formulas()) if formula not in learnt]
    for row in np.random.default_rng(seed).permutation(rows):
        truth = known[[int(row)]]
        target = truth.to_structures()[0].get_primitive_structure()
        if len(target) <= 20:
            yield truth, target


def judged(truth: CrystalBatch, target: Structure, drawn: CrystalBatch, result: RelaxResult) -> Outcome:
    energy = np.where([s is not None for s in result.structures], result.energy, np.nan)
    ended = np.flatnonzero(np.isfinite(energy))
    if not len(ended):
        return MISSED
    energy, ends = energy[ended], [result.structures[row] for row in ended]
    likely = likelihoods(drawn.properties["log_weight"].numpy()[ended], energy)
    matches = np.array([WIDE.fit(target, end) for end in ends])
    distances = [WIDE.get_rms_dist(target, end)[0] for end, fits in zip(ends, matches, strict=True) if fits]
    strict = any(STRICT.fit(target, end) for end, fits in zip(ends, matches, strict=True) if fits)
    letters = fingerprints(truth)[0] in fingerprints(drawn)
    first = matches[energy.argmin()], matches[likely.argmax()]
    return Outcome(bool(matches.any()), *map(bool, first), strict, letters, min(distances, default=np.nan))


if __name__ == "__main__":
    typer.run(main)
