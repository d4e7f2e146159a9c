"""Relaxed crystals per second: CHGNet's StructOptimizer one by one against ours, with the same convergence.

Real crystals of mp_20 (prototypes without it) in their conventional cells, scaled at random by -4% to +6%. CPU
seconds are given beside the clock, since other work on the machine stretches only the latter.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from bench_potentials import crystals
from pymatgen.core import Lattice, Structure
from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

from cfrl.potentials import load_potential
from cfrl.potentials.relax import relax


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-n", type=int, default=100, help="crystals relaxed by us")
    parser.add_argument("--own", type=int, default=20, help="how many of them by StructOptimizer too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="crystals a second, ours")
    parser.add_argument("--fmax", type=float, default=0.05, help="eV/angstrom")
    args = parser.parse_args()

    from chgnet.model import StructOptimizer

    rng = np.random.default_rng(0)
    structures = []
    for structure in crystals(args.n):
        cell = SpacegroupAnalyzer(structure, 0.01).get_conventional_standard_structure()
        lattice = Lattice(cell.lattice.matrix * rng.uniform(0.96, 1.06))
        structures.append(Structure(lattice, cell.species, cell.frac_coords))
    potential = load_potential("chgnet", args.device)
    optimiser = StructOptimizer(model=potential.model, use_device=args.device)

    clock, cpu = time.perf_counter(), time.process_time()
    ours = relax(structures, potential, fmax=args.fmax)
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    report("ours", len(structures), clock, cpu, ours.steps.mean(), ours.converged.mean())
    if args.json:
        args.json.write_text(json.dumps({"relaxed": len(structures) / clock}))
    if not args.own:
        return

    clock, cpu = time.perf_counter(), time.process_time()
    own = [optimiser.relax(s, fmax=args.fmax, verbose=False, assign_magmoms=False) for s in structures[: args.own]]
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    steps = np.array([len(o["trajectory"].energies) for o in own])
    report("StructOptimizer", len(own), clock, cpu, steps.mean(), (steps < 500).mean())

    energy = np.array([o["trajectory"].energies[-1] / len(s) for o, s in zip(own, structures, strict=False)])
    difference = 1000 * (ours.energy[: args.own] - energy)
    print(f"\nenergies, meV/atom: median difference {np.median(difference):+.2f}, largest", end=" ")
    print(f"{np.abs(difference).max():.2f}; within 2: {np.mean(np.abs(difference) <= 2):.0%}")


def report(name: str, n: int, clock: float, cpu: float, steps: float, converged: float) -> None:
    print(
        f"{name:16} {n:4} crystals  {n / clock:7.2f} /s by the clock  {n / cpu:7.2f} per CPU second"
        f"  {steps:5.1f} steps  {converged:.0%} converged",
        flush=True,
    )


if __name__ == "__main__":
    main()
