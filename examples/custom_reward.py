"""A reward of your own, in one function.

    cfrl finetune --reward examples/custom_reward.py:light_oxides
    cfrl finetune --reward "dielectric_bandgap + 5 * 'examples/custom_reward.py:light_oxides'"

The function gets a batch of crystals twice: as tensors (`CrystalBatch`) and as pymatgen structures. It returns one
number per crystal, larger is better; NaN marks a crystal that could not be scored, and costs that crystal only.
Registered under a name, it can stand in formulas without quotes once its module is imported, and a package can offer
it to everyone who installs the package:

    [project.entry-points."cfrl.rewards"]
    light_oxides = "my_package.rewards:light_oxides"
"""

import numpy as np

import cfrl

OXYGEN = 8


@cfrl.register_reward("light_oxides", unit="share of atoms")
def light_oxides(crystals, structures, *, heaviest: int = 40):
    """Share of oxygen; not scored for crystals with an element beyond `heaviest`."""
    atoms = crystals.multiplicity * (crystals.species > 0)  # (n, s) atoms per site
    oxygen = (atoms * (crystals.species == OXYGEN)).sum(1) / atoms.sum(1)  # (n,)
    return np.where(crystals.species.amax(1) <= heaviest, oxygen, np.nan)


if __name__ == "__main__":
    crystals = cfrl.load_dataset("prototypes")
    result = cfrl.build_reward("light_oxides(heaviest=30) - 0.01*density")(crystals)
    scored = ~np.isnan(result.total)
    best = np.argsort(-np.nan_to_num(result.total, nan=-np.inf))[:5]
    print(f"{scored.sum()} of {len(crystals)} prototypes scored; the best:")
    for i in best:
        print(f"{crystals.formulas()[i]:12s} {result.total[i]:6.3f}  (density {result.terms['density'][i]:.2f} g/cm3)")
