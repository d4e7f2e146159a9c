"""The generator improves the predictor: propose, compute, learn, tune, three rounds; against computing random crystals.

    python examples/close_the_loop.py            some ten minutes on one core
    python examples/close_the_loop.py --quick    half a minute, to see that it runs

A predictor of the bulk modulus that has seen few crystals is sought high values of. Tuning finds crystals that it
praises, for good reasons and for bad ones; 20 of them are computed, it learns from them, and so on. The other arm
computes 20 crystals of the untuned model each round. Both are asked in the end for crystals that tuning now leads to.

What computes here is no DFT but a stand-in: the potential CHGNet 0.2.0, of which the predictor sees nothing but the
labels (its features are those of CHGNet 0.3.0). With DFT, `compute` becomes `cfrl screen tuned.h5 --dft pbe`, a queue,
and `cfrl data import dft/ -o results.h5`; the rest stays as it is (docs/dft.md).
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import cfrl
from cfrl.commands.rewards_train import run_train
from cfrl.config import PredictorConfig
from cfrl.crystals.refusal import Refusal
from cfrl.potentials import load_potential
from cfrl.reports.figures import BLUE, ORANGE, Figure, Series, save
from cfrl.rewards.context import RewardContext
from cfrl.rewards.predictors import load_predictor
from cfrl.rewards.stability import strained_bulk_modulus

TARGET = "bulk_modulus"  # GPa
REFUSED = Refusal(("element", "noble_gas", "radioactive", "not_neutral"))  # as tuning refuses them
SMALL = {"batch_size": 16, "hidden": 64, "folds": 3}  # a predictor of few crystals
SENSIBLE = (1.0, 600.0)  # GPa; what lies outside is a computation that failed


@dataclass(frozen=True)
class Size:
    """How much of everything.

    start: crystals that the first predictor knows. each: computed in a round. test: fresh crystals that errors are of.
    steps, n: of a tuning, and crystals a step. epochs: of a predictor.
    """

    rounds: int = 3
    start: int = 60
    each: int = 20
    test: int = 96
    steps: int = 15
    n: int = 32
    epochs: int = 80
    max_atoms: int = 10


QUICK = Size(rounds=1, start=52, each=6, test=12, steps=2, n=8, epochs=8, max_atoms=6)


class Bench:
    """Models that do not change from round to round."""

    def __init__(self, size: Size, folder: Path, seed: int) -> None:
        self.size, self.folder, self.seed = size, folder, seed
        self.model = cfrl.load_model()
        self.judge, self.student = load_potential("chgnet:0.2.0", "cpu"), load_potential("chgnet", "cpu")

    def draw(self, model: torch.nn.Module, n: int, seed: int) -> cfrl.CrystalBatch:
        """n crystals of distinct formulas with the property as the judge computes it."""
        drawn = cfrl.sample(model, 2 * n, seed=seed, max_atoms=self.size.max_atoms, wanted=REFUSED)
        first = sorted({formula: row for row, formula in reversed(list(enumerate(drawn.formulas())))}.values())
        crystals = self.compute(drawn[torch.tensor(first)])
        return crystals[:n]

    def compute(self, crystals: cfrl.CrystalBatch) -> cfrl.CrystalBatch:
        """Those that could be computed, labelled. THE STAND-IN FOR DFT."""
        values = strained_bulk_modulus(crystals.to_structures(), self.judge).values
        good = np.flatnonzero((values > SENSIBLE[0]) & (values < SENSIBLE[1]))
        chosen = crystals[torch.from_numpy(good)]
        chosen.properties = {TARGET: torch.from_numpy(values[good])}
        return chosen

    def learn(self, labelled: cfrl.CrystalBatch, name: str) -> Path:
        """A predictor of all that was computed so far: `cfrl rewards train results.h5 --target bulk_modulus`."""
        results = self.folder / f"{name}.h5"
        cfrl.write_crystals(results, labelled)
        config = PredictorConfig(
            target=TARGET, unit="GPa", epochs=self.size.epochs, **SMALL, device="cpu", seed=self.seed
        )
        return run_train([str(results)], results.with_suffix(".safetensors"), config)

    def tune(self, predictor: Path) -> torch.nn.Module:
        """The embedded model, tuned towards what the predictor praises."""
        size = self.size
        tuned = cfrl.finetune(
            self.model,
            f"property:{predictor}",
            context=RewardContext(self.student, device="cpu"),  # crystals as they were drawn, not relaxed
            steps=size.steps,
            n=size.n,
            scale_crystals=4 * size.n,
            replay=2 * size.n,
            lr=1e-3,
            max_atoms=size.max_atoms,
            allow="unstable,far_below_hull,sparse_reference,known",  # no hull, no relaxation: it is about the predictor
            critic="off",
            seed=self.seed,
        )
        return tuned.model

    def error(self, predictor: Path, crystals: cfrl.CrystalBatch) -> float:
        """Mean absolute error on computed crystals, GPa."""
        structures = crystals.to_structures()
        mean, _ = load_predictor(str(predictor)).predict(structures, self.student.compute(structures, features=True))
        return float(np.nanmean(np.abs(mean - crystals.properties[TARGET].numpy())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="little of everything")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/close_the_loop"))
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    size, began = QUICK if options.quick else Size(), time.monotonic()
    bench = Bench(size, options.output, options.seed)

    start = bench.draw(bench.model, size.start, seed=1000 * options.seed + 1)
    first = bench.learn(start, "start")
    known = {"loop": start, "random": start}
    predictor = {"loop": first, "random": first}
    errors: dict[str, list[float]] = {"loop": [], "random": []}
    for round in range(size.rounds + 1):
        seed = 1000 * options.seed + 100 * (round + 1)
        tuned = {"loop": bench.tune(predictor["loop"])}
        tuned["random"] = bench.tune(predictor["random"]) if round else tuned["loop"]
        # Both are asked for the same fresh crystals, half from where each of them leads.
        test = cfrl.CrystalBatch.cat(
            [bench.draw(tuned[arm], size.test // 2, seed + i) for i, arm in enumerate(("loop", "random"))]
        )
        for arm in errors:
            errors[arm].append(bench.error(predictor[arm], test))
        mean = float(test.properties[TARGET].mean())
        print(
            f"round {round}, {len(known['loop'])} crystals known: on {len(test)} generated ones (mean {mean:.0f} GPa) "
            f"error {errors['loop'][-1]:.1f} GPa, of random choice {errors['random'][-1]:.1f}; "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
        if round < size.rounds:
            new = {"loop": bench.draw(tuned["loop"], size.each, seed + 50)}
            new["random"] = bench.draw(bench.model, size.each, seed + 51)
            for arm in known:
                known[arm] = cfrl.CrystalBatch.cat([known[arm], new[arm]])
                predictor[arm] = bench.learn(known[arm], f"{arm}-{round + 1}")
    rounds = range(size.rounds + 1)
    figure = Figure(
        "error",
        "Error on generated crystals",
        "round",
        "mean absolute error (GPa)",
        [
            Series(rounds, errors["random"], f"{size.each} random crystals a round", "line", ORANGE),
            Series(rounds, errors["loop"], f"{size.each} of the tuned model's a round", "line", BLUE),
        ],
        from_zero=True,
        note="Bulk modulus by CHGNet 0.2.0, a stand-in for DFT.",
    )
    saved = 1 - errors["loop"][-1] / errors["random"][-1]
    print(f"{abs(saved):.0%} {'less' if saved > 0 else 'more'} error than with random crystals")
    print(f"wrote {save(figure, options.output)[0]}")


if __name__ == "__main__":
    main()
