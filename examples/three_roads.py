"""Success rates as PODGen's authors count them (arXiv 2505.00076), of the base model, of chains and of a tuned model.

    python examples/three_roads.py --minutes 10     half an hour to an hour on one core
    python examples/three_roads.py --quick          two minutes, to see that it runs

Wanted: a band gap of 1.0 to 1.8 eV (by the embedded predictor), within 0.1 eV/atom of the hull (by CHGNet), both after
a full relaxation. PODGen samples P(C) P(y | C) by Markov chains; so does `cfrl sample --toward`. `cfrl finetune` learns
the same distribution, and the base model just draws. Chains and tuning get equally many minutes. A find is a success
whose formula the embedded models did not learn from, no element alone, that meets no guard of a screening; each once.

What a list of finds costs: the minutes before the first crystal, then for each find 1 / (finds per crystal) crystals,
each drawn and screened. For chains a crystal more costs its share of their sweeps, by how much the chains forget
between two of them (their effective draws). From that follows for how many finds which road is the shorter one.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import cfrl
from cfrl.commands.finetune import finetune
from cfrl.config import FinetuneConfig
from cfrl.crystals.known import KnownFormulas
from cfrl.model.files import load_extras

LOW, HIGH, NEAR = 1.0, 1.8, 0.1  # eV, eV, eV/atom
# log P(y | C), no less than that of 1 in 1,000; the guard `unstable` sees to the hull.
WANTED = f"log(max(in_range(of=band_gap, low={LOW}, high={HIGH}), 0.001))"
BETA = 0.5  # of the chains, in standard deviations of the reward, some 2 nats: P(y | C) counts about as it is
LISTS = (10, 30, 100, 300, 1000, 3000)  # finds


@dataclass(frozen=True)
class Road:
    """n crystals, and what more of their like would cost.

    minutes: before the first. seconds: for each crystal more, on the average.
    """

    crystals: cfrl.CrystalBatch
    minutes: float
    seconds: float


@dataclass(frozen=True)
class Told:
    """Shares of the crystals of a road; seconds: of the screening of one."""

    near: float
    in_window: float
    success: float
    finds: float
    seconds: float


def draws(model: str, n: int, minutes: float) -> Road:
    """As the model draws them: `cfrl sample`."""
    refusal, began = load_extras(model).refusal, time.monotonic()
    crystals = cfrl.sample(cfrl.load_model(model), n, seed=1, wanted=refusal if refusal.names else None)
    return Road(crystals, 0.0, (time.monotonic() - began) / n)


def chains(model: str, n: int, minutes: float) -> Road:
    """Of the model, times exp(reward / beta): `cfrl sample --toward`."""
    steered = cfrl.steer(
        cfrl.load_model(model), WANTED, min(n, 128), seed=1, beta=BETA, time_limit=minutes, budget=100_000
    )
    told = steered.numbers
    print("chains:", ", ".join(f"{name} {value:.3g}" for name, value in told.items()), flush=True)
    if not told["sweeps_at_beta"]:
        return Road(steered.crystals, told["seconds"] / 60, math.inf)
    sweep = (told["scored"] - 1024) / told["sweeps"] / told["scored_per_second"]  # seconds; 1,024 are the model's own
    draws_of_a_sweep = told["effective_draws"] / told["sweeps_at_beta"]
    return Road(steered.crystals, told["seconds"] / 60, sweep / draws_of_a_sweep)


def tuned(model: str, n: int, minutes: float) -> Road:
    """Drawn from what tuning made of the model: `cfrl finetune`, `cfrl sample --model last`."""
    began = time.monotonic()
    config = FinetuneConfig(reward=WANTED, model=model, seed=1, steps=100_000, time_limit=minutes, evaluate=0)
    run = finetune(config, quiet=True)
    taken = time.monotonic() - began
    print(f"tuned: {len(run.metrics()['step'])} steps in {taken / 60:.1f} minutes, {run.path}", flush=True)
    return replace(draws(str(run.path), n, 0), minutes=taken / 60)


def tell(name: str, road: Road, folder: Path) -> Told:
    """Screens the crystals, writes the table."""
    began = time.monotonic()
    table = cfrl.screen(road.crystals, properties=["band_gap"])
    seconds = (time.monotonic() - began) / len(road.crystals)
    table.to_csv(folder / f"{name}.csv")
    near = (table["e_above_hull"] <= NEAR).to_numpy()
    window = table["band_gap"].between(LOW, HIGH).to_numpy()
    sound = (table["flags"].fillna("") == "").to_numpy() & table["unique"].fillna(False).to_numpy(dtype=bool)
    new = ~KnownFormulas.embedded().holds(road.crystals.formulas())
    first = np.zeros(len(table), dtype=bool)
    first[np.unique(road.crystals.formulas(), return_index=True)[1]] = True
    success = near & window
    print(f"{name}: screened {len(table)} in {seconds * len(table):.0f} s", flush=True)
    return Told(near.mean(), window.mean(), success.mean(), (success & sound & new & first).mean(), seconds)


# A search for a property starts from `stable`, which is `small` tuned for new compounds near the hull.
ROADS: dict[str, tuple[Callable[[str, int, float], Road], str]] = {
    "small": (draws, "small"),
    "stable": (draws, "stable"),
    "chains": (chains, "stable"),
    "tuned": (tuned, "stable"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="for the chains, and for the tuning")
    parser.add_argument("-n", type=int, default=400, help="crystals of each that are screened (of chains, 128)")
    parser.add_argument("--quick", action="store_true", help="little of everything")
    parser.add_argument("--output", type=Path, default=Path("runs/three_roads"))
    options = parser.parse_args()
    n, minutes = (16, 0.5) if options.quick else (options.n, options.minutes)
    options.output.mkdir(parents=True, exist_ok=True)
    roads: dict[str, tuple[Road, Told]] = {}
    for name, (take, start) in ROADS.items():
        road = take(start, n, minutes)
        roads[name] = road, tell(name, road, options.output)
    print(shares_of(roads))
    print(lists_of(roads))


def shares_of(roads: dict[str, tuple[Road, Told]]) -> str:
    """As a table in Markdown."""
    lines = [
        "| | minutes before | crystals | near the hull | gap in the window | both | new finds |",
        "| --- " * 7 + "|",
    ]
    for name, (road, told) in roads.items():
        shares = " | ".join(f"{x:.1%}" for x in (told.near, told.in_window, told.success, told.finds))
        lines.append(f"| {name} | {road.minutes:.1f} | {len(road.crystals)} | {shares} |")
    return "\n".join(lines)


def lists_of(roads: dict[str, tuple[Road, Told]]) -> str:
    """Minutes until a list of so many new finds is drawn and screened."""

    def minutes(road: Road, told: Told, wanted: int) -> float:
        if not told.finds:
            return math.inf
        return road.minutes + wanted / told.finds * (road.seconds + told.seconds) / 60

    lines = [f"| finds | {' | '.join(roads)} |", "| --- " * (len(roads) + 1) + "|"]
    for wanted in LISTS:
        lines.append(f"| {wanted} | " + " | ".join(f"{minutes(*road, wanted):,.0f}" for road in roads.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
