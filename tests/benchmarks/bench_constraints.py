"""How fast crystals are drawn that meet what is asked, whether all of them do, and what weighing the choices is worth.

python tests/benchmarks/bench_constraints.py [-n 1000]
"""

import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer

import cfrl
from cfrl.crystals.compositions import fractions
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.elements import ATOMIC_NUMBERS
from cfrl.crystals.refusal import RADIOACTIVE
from cfrl.model.constraints import Composition
from cfrl.model.drawing import draw
from cfrl.model.options import Wishes
from cfrl.model.sampler import seeded, space_group_shares
from cfrl.model.wishes import sampler_options

LI_MN_O = {ATOMIC_NUMBERS[symbol] for symbol in ("Li", "Mn", "O")}


class MasksAlone(Composition):
    """Leaves open what can end as asked, and weighs nothing."""

    def _weights(self, state, group, letter):
        weights = super()._weights(state, group, letter)
        return torch.zeros_like(weights).masked_fill(weights.isneginf(), -torch.inf)


def same_formula(formula: str) -> Callable[[CrystalBatch], torch.Tensor]:
    wanted = torch.from_numpy(fractions([formula])[0])
    return lambda crystals: (torch.from_numpy(fractions(crystals)[0]) - wanted).abs().amax(1) < 1e-9


def elements(crystals: CrystalBatch) -> list[set[int]]:
    return [set(row) - {0} for row in crystals.species.tolist()]


CASES: dict[str, tuple[dict[str, str], Callable[[CrystalBatch], torch.Tensor]]] = {
    **{f: ({"formula": f}, same_formula(f)) for f in ("NaCl", "TiO2", "BaTiO3", "LiMn2O4", "LiFePO4", "MgB2")},
    "A2BO4": ({"formula": "A2BO4"}, lambda c: torch.tensor([len(e) == 3 and 8 in e for e in elements(c)])),
    "Li-Mn-O": ({"system": "Li-Mn-O"}, lambda c: torch.tensor([e == LI_MN_O for e in elements(c)])),
    "with Li": ({"require": "Li"}, lambda c: torch.tensor([3 in e for e in elements(c)])),
    "4 to 20 atoms": ({"num_atoms": "4-20"}, lambda c: (c.num_atoms >= 4) & (c.num_atoms <= 20)),
    "2 sites": ({"num_sites": "2"}, lambda c: c.num_sites == 2),
    "not radioactive": (
        {"exclude": "radioactive"},
        lambda c: torch.tensor([not e & RADIOACTIVE for e in elements(c)]),
    ),
}


def main(n: Annotated[int, typer.Option("-n", help="Crystals of each kind.")] = 1000) -> None:
    model = cfrl.load_model()
    print(
        f"{torch.get_num_threads()} threads\n| asked for | not met, of {n:,} | a second | before the first, s | sites |"
    )
    print("| --- | --- | --- | --- | --- |")
    for name, (wished, met) in CASES.items():
        asked, start = Wishes(**wished), time.perf_counter()
        options = sampler_options(asked, model.config.max_sites - 1)
        shares = space_group_shares(model, asked, options).exp()
        first, generator = time.perf_counter() - start, seeded(model.device, 0)
        groups = torch.multinomial(shares, n, replacement=True, generator=generator)
        start = time.perf_counter()
        crystals = CrystalBatch.cat([draw(model, part, options, generator) for part in groups.split(256)])
        rate, missed = n / (time.perf_counter() - start), int((~met(crystals)).sum())
        print(
            f"| {name} | {missed} | {rate:.0f} | {first:.1f} | {crystals.num_sites.double().mean():.1f} |", flush=True
        )
    print("\nSites of a crystal in Fd-3m, 256 draws: weighed, and masks alone")
    for formula in ("LiMn2O4", "MgAl2O4", "SiO2"):
        options = sampler_options(Wishes(formula=formula, space_group="227"), model.config.max_sites - 1)
        row = []
        for kind in (Composition, MasksAlone):
            options.constraint.__class__ = kind
            drawn = draw(model, torch.full((256,), 227), options, seeded(model.device, 0))
            row.append(f"{drawn.num_sites.double().mean():.1f}")
        print(formula, *row)


if __name__ == "__main__":
    typer.run(main)
