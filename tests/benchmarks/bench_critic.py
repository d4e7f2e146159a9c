"""What a critic learns from crystals that are relaxed by few or many evaluations: does it find real ones?

    python tests/benchmarks/bench_critic.py ../shared/data/mp_20.csv.gz --property band_gap --reward band_gap

New crystals of the embedded model are scored by the reward after k evaluations of a relaxation. A critic learns the
scores of some and is asked of the others (share of the variance told), and of labelled real crystals that it never saw
(ROC AUC and enrichment of the best 5%). See docs/rewards.md.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

import cfrl
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.refusal import REFUSED, Refusal
from cfrl.io.datasets import load_dataset
from cfrl.rewards import RewardContext, build_reward
from cfrl.rewards.guards import heeded
from cfrl.rl.critic import Critic
from cfrl.rl.loop import FIRST_PASSES
from cfrl.screening.ranking import is_good, rate_ranking


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset")
    parser.add_argument("--property", default="band_gap")
    parser.add_argument("--reward", default="band_gap")
    parser.add_argument("--caution", type=float, default=0.0)
    parser.add_argument("--guarded", action="store_true")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 4, 8, 16, 200])
    parser.add_argument("-n", type=int, default=1024)
    args = parser.parse_args()
    known = load_dataset(args.dataset)
    label = known.properties[args.property].numpy()
    rows = np.flatnonzero(np.isfinite(label) & (known.num_sites.numpy() < 21))
    rows = np.random.default_rng(0).permutation(rows)[:4000]
    good, known = is_good(label[rows]), known[torch.from_numpy(rows)]
    for k in args.steps:
        context = RewardContext(caution=args.caution, relax_steps=k)
        guards = heeded("known") if args.guarded else ()
        reward = build_reward(args.reward, context=context, guards=guards)
        crystals = wanted_crystals(args.n + 1000)
        began = time.monotonic()
        scores = [reward(crystals[rows]).total for rows in torch.arange(len(crystals)).split(256)]
        rate = len(crystals) / (time.monotonic() - began)
        told(k, crystals, np.concatenate(scores), rate, args.n, known, good)


def wanted_crystals(n: int) -> CrystalBatch:
    """n valid crystals that a tuning would score."""
    return cfrl.sample(cfrl.load_model(), n=n, seed=0, wanted=Refusal([name for name in REFUSED if name != "known"]))


def told(
    k: int, crystals: CrystalBatch, scores: np.ndarray, rate: float, n: int, known: CrystalBatch, good: np.ndarray
) -> None:
    """Teach, ask, print a line."""
    reward = torch.from_numpy(np.nan_to_num(scores) / np.nanstd(scores))
    critic, generator = Critic(0), torch.Generator().manual_seed(0)
    for _ in range(FIRST_PASSES):
        critic.learn(crystals[:n], reward[:n], generator)
    rest = reward[n:]
    explained = 1 - (critic(crystals[n:]) - rest).square().mean() / rest.var()
    verdict = rate_ranking("critic", critic(known).numpy(), good)
    print(
        f"{k:4d} evaluations  {rate:6.1f} crystals/s  explained {float(explained):5.2f}  ROC AUC {verdict.auc:.3f}  "
        f"enrichment at 100 {verdict.enrichment[100]:.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
