"""How often the structure of a formula is found that the model never saw, among n candidates, relaxed.

    python scripts/make_training_set.py DATA train.h5
    python tests/benchmarks/bench_prediction.py train.h5 --crystals 200 --draws 20 --draws 100

Validation crystals of a dataset (of the embedded generator's: 1,212 crystals of mp_20) of which no training crystal has
the formula, of at most 20 atoms in the primitive cell. Matched with StructureMatcher, with the tolerances of MatterGen
and DiffCSP (ltol 0.3, stol 0.5, angle 10) and with pymatgen's own (0.2, 0.3, 5); RMSE is of the former's matches, in
(volume per atom)^(1/3).
"""

import time
from typing import Annotated

import numpy as np
import torch
import typer
from pymatgen.analysis.structure_matcher import StructureMatcher

import cfrl
from cfrl.crystals.fingerprint import fingerprints
from cfrl.crystals.structure_types import StructureTypes
from cfrl.errors import UserError
from cfrl.io.datasets import load_dataset
from cfrl.model.options import Wishes
from cfrl.model.prediction import likely_crystals
from cfrl.potentials import load_potential
from cfrl.potentials.relax import relax

WIDE = StructureMatcher(ltol=0.3, stol=0.5, angle_tol=10)
STRICT = StructureMatcher()


def main(
    dataset: str,
    crystals: Annotated[int, typer.Option(help="How many formulas.")] = 200,
    draws: Annotated[list[int] | None, typer.Option(help="Candidates of each.")] = None,
    model: str = "default",
    types: Annotated[bool, typer.Option(help="Known structure types beside the model's own draws.")] = True,
    seed: int = 0,
) -> None:
    draws = sorted(draws or [20])
    structure_types = StructureTypes.embedded() if types else None
    generator, potential = cfrl.load_model(model), load_potential("chgnet")
    known, learnt = load_dataset(dataset, split="validation"), set(load_dataset(dataset, split="train").formulas())
    unseen = [row for row, formula in enumerate(known.formulas()) if formula not in learnt]
    rows = np.random.default_rng(seed).permutation(unseen)
    found, done, start = {n: [] for n in draws}, 0, time.monotonic()
    for row in rows:
        if done == crystals:
            break
        truth = known[[int(row)]]
        target = truth.to_structures()[0].get_primitive_structure()
        if len(target) > 20:
            continue
        done += 1
        try:
            drawn = likely_crystals(generator, draws[-1], Wishes(formula=truth.formulas()[0]), seed, structure_types)
        except UserError as error:
            print(truth.formulas()[0], error, flush=True)
            for n in draws:
                found[n].append((False,) * 4 + (np.nan,))
            continue
        same = np.array(fingerprints(drawn)) == fingerprints(truth)[0]
        result = relax(drawn.to_structures(), potential, steps=200)
        for n in draws:
            found[n].append(_judged(target, result.structures[:n], result.energy[:n], bool(same[:n].any())))
        said = "; ".join(f"{n}: any {found[n][-1][0]}, lowest {found[n][-1][1]}" for n in draws)
        print(
            f"{done} {truth.formulas()[0]} ({int(truth.space_group)}) {said} {time.monotonic() - start:.0f} s",
            flush=True,
        )
    print("| candidates | among all | as lowest | strict, among all | letters as drawn | RMSE |\n" + "| --- " * 6 + "|")
    for n in draws:
        table = np.array(found[n], dtype=float)
        shares = " | ".join(f"{x:.1%}" for x in table[:, :4].mean(0))
        print(f"| {n} | {shares} | {np.nanmean(table[:, 4]):.3f} |")
    print(f"{len(found[draws[0]])} formulas, {torch.get_num_threads()} threads, {time.monotonic() - start:.0f} s")


def _judged(target, structures, energy, same: bool) -> tuple[bool, bool, bool, bool, float]:
    """Whether any candidate matches, the lowest does, any does strictly, any had the letters; the least RMSE."""
    ends = [(e, s) for e, s in zip(energy, structures, strict=True) if s is not None and np.isfinite(e)]
    ends.sort(key=lambda end: end[0])
    matches = [bool(WIDE.fit(target, end)) for _, end in ends]
    distances = [WIDE.get_rms_dist(target, end)[0] for (_, end), fits in zip(ends, matches, strict=True) if fits]
    strict = any(STRICT.fit(target, end) for (_, end), fits in zip(ends, matches, strict=True) if fits)
    return any(matches), matches[:1] == [True], strict, same, min(distances, default=np.nan)


if __name__ == "__main__":
    typer.run(main)
