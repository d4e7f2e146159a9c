"""The generator improves the predictor: propose, compute, learn, tune, three rounds; against computing random crystals.

    python examples/close_the_loop.py            some ten minutes on one core
    python examples/close_the_loop.py --quick    half a minute, to see that it runs

A predictor of the magnetic moment (mu_B per atom, its mean size) that has seen few crystals is sought high values of.
Tuning finds crystals that it praises, for good reasons and for bad ones; 20 of them are computed, it learns from them,
and so on. The other arm computes 20 crystals of the untuned model each round. After each round both are asked for the
same fresh crystals of formulas that neither has seen: half from where tuning by the one leads, half from where tuning
by the other does.

What computes here is no DFT but a stand-in: CHGNet 0.2.0, of which the predictor sees nothing but the labels. Its
features are those of CHGNet 0.3.0, a kindred model, so moments are easier to learn than DFT's would be. With DFT,
`compute` becomes `cfrl screen tuned.h5 --dft pbe`, a queue, and `cfrl data import dft/ -o results.h5`; the rest stays
as it is (docs/dft.md).
"""

import argparse
import contextlib
import io
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from chgnet.model import CHGNet

import cfrl
from cfrl.commands.rewards_train import run_train
from cfrl.config import PredictorConfig
from cfrl.crystals.refusal import Refusal
from cfrl.potentials import load_potential
from cfrl.reports.figures import BLUE, ORANGE, Figure, Series, save
from cfrl.rewards.context import RewardContext
from cfrl.rewards.predictors import load_predictor

TARGET = "moment"  # mu_B per atom
REFUSED = Refusal(("element", "noble_gas", "radioactive", "not_neutral"))  # as tuning refuses them
SMALL = {"batch_size": 16, "hidden": 64, "folds": 3}  # a predictor of few crystals


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
    epochs: int = 60
    max_atoms: int = 10


QUICK = Size(rounds=1, start=52, each=6, test=12, steps=2, n=8, epochs=8, max_atoms=6)


class Bench:
    """Models that do not change from round to round."""

    def __init__(self, size: Size, folder: Path, seed: int) -> None:
        self.size, self.folder, self.seed = size, folder, seed
        self.model = cfrl.load_model()
        self.student = load_potential("chgnet", "cpu")
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its number of parameters
            self.judge = CHGNet.load(model_name="0.2.0", use_device="cpu", verbose=False)

    def draw(self, model: torch.nn.Module, n: int, seed: int, known: Iterable[str] = ()) -> cfrl.CrystalBatch:
        """At most n crystals of distinct formulas that are not known, with the property as the judge computes it."""
        drawn = cfrl.sample(model, 3 * n, seed=seed, max_atoms=self.size.max_atoms, wanted=REFUSED)
        first = {formula: row for row, formula in reversed(list(enumerate(drawn.formulas()))) if formula not in known}
        return self.compute(drawn[torch.tensor(sorted(first.values())[:n])])

    def compute(self, crystals: cfrl.CrystalBatch) -> cfrl.CrystalBatch:
        """The same with labels. THE STAND-IN FOR DFT."""
        warnings.simplefilter("ignore", UserWarning)  # of CHGNet's about tensors of its own
        results = [self.judge.predict_structure(structure, task="em") for structure in crystals.to_structures()]
        crystals.properties = {TARGET: torch.tensor([np.abs(result["m"]).mean() for result in results]).double()}
        return crystals

    def learn(self, labelled: cfrl.CrystalBatch, name: str) -> Path:
        """A predictor of all that was computed so far: `cfrl rewards train results.h5 --target moment`."""
        results = self.folder / f"{name}.h5"
        cfrl.write_crystals(results, labelled)
        config = PredictorConfig(
            target=TARGET, unit="mu_B/atom", epochs=self.size.epochs, **SMALL, device="cpu", seed=self.seed
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
            beta=0.05,
            max_atoms=size.max_atoms,
            allow="unstable,far_below_hull,sparse_reference,known",  # no hull, no relaxation: it is about the predictor
            critic="off",
            seed=self.seed,
        )
        return tuned.model

    def error(self, predictor: Path, crystals: cfrl.CrystalBatch) -> float:
        """Mean absolute error on computed crystals, mu_B per atom."""
        structures = crystals.to_structures()
        mean, _ = load_predictor(str(predictor)).predict(structures, self.student.compute(structures, features=True))
        return float(np.nanmean(np.abs(mean - crystals.properties[TARGET].numpy())))


def figure_of(errors: dict[str, list[float]], size: Size) -> Figure:
    """Errors by round of both arms."""
    rounds = range(size.rounds + 1)
    return Figure(
        "error",
        "Error on generated crystals",
        "round",
        "mean absolute error (mu_B per atom)",
        [
            Series(rounds, errors["random"], f"{size.each} random crystals a round", "line", ORANGE),
            Series(rounds, errors["loop"], f"{size.each} of the tuned model's a round", "line", BLUE),
        ],
        from_zero=True,
        note="Magnetic moments by CHGNet 0.2.0, a stand-in for DFT.",
    )


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
        seen = {formula for crystals in known.values() for formula in crystals.formulas()}
        places = [bench.draw(tuned[arm], size.test // 2, seed + i, seen) for i, arm in enumerate(("loop", "random"))]
        test = cfrl.CrystalBatch.cat(places)
        for arm in errors:
            errors[arm].append(bench.error(predictor[arm], test))
        mean = float(test.properties[TARGET].mean())
        print(
            f"round {round}, {len(known['loop'])} crystals known: on {len(test)} generated ones (mean {mean:.2f} mu_B) "
            f"error {errors['loop'][-1]:.3f} mu_B, of random choice {errors['random'][-1]:.3f}; "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
        for place, crystals in zip(known, places, strict=True):
            told = ", ".join(f"{arm} {bench.error(predictor[arm], crystals):.3f}" for arm in errors)
            print(f"  those where tuning by {place} led: {told}", flush=True)
        if round < size.rounds:
            new = {"loop": bench.draw(tuned["loop"], size.each, seed + 50, known["loop"].formulas())}
            new["random"] = bench.draw(bench.model, size.each, seed + 51, known["random"].formulas())
            for arm in known:
                known[arm] = cfrl.CrystalBatch.cat([known[arm], new[arm]])
                predictor[arm] = bench.learn(known[arm], f"{arm}-{round + 1}")
    saved = 1 - errors["loop"][-1] / errors["random"][-1]
    print(f"{abs(saved):.0%} {'less' if saved > 0 else 'more'} error than with random crystals")
    print(f"wrote {save(figure_of(errors, size), options.output)[0]}")


if __name__ == "__main__":
    main()
