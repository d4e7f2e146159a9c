"""cfrl from Python: sample, score, look at a symmetry, read and write. Run: python examples/library.py"""

import cfrl

model = cfrl.load_model()
crystals = cfrl.sample(model, n=20, space_group=[221, 225], elements=["Ba", "Ti", "O"], seed=0)

log_prob = model.log_prob(crystals)  # {"wyckoff": (n,), "species": ..., "coords": ..., "lattice": ...}
total = sum(log_prob.values())

print("log P(C | G) in nats, density in g/cm^3")
for i in total.argsort(descending=True)[:5].tolist():
    crystal = crystals[i]
    letters = "".join(cfrl.symmetry.letter_name(w) for w in crystal.wyckoff[0].tolist() if w)
    print(
        f"{crystal.formulas()[0]:12s} group {int(crystal.space_group)}  letters {letters:6s} "
        f"{float(total[i]):8.2f} {float(crystal.densities()):6.2f}"
    )

# To pymatgen and back: the symmetry is found again.
structures = crystals.to_structures()
again = cfrl.CrystalBatch.from_structures(structures)
kept = (again.space_group == crystals.space_group).double().mean()
print(f"{kept:.0%} of the crystals have exactly the space group that was asked for, the others a supergroup")
