"""The report of a fine-tuning run: what tuning changed, the best crystals, and the course of the run.

What it says of before and after, it says of fresh crystals of both models (before.h5, after.h5). A step's batch would
be no such measure: it is small, and the policy that drew it was not yet the tuned one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cfrl.crystals.crystal import CrystalBatch
from cfrl.model.transformer import FACTORS
from cfrl.reports.course import course
from cfrl.reports.figures import Figure
from cfrl.reports.groups import comparison
from cfrl.reports.labels import chance_text, label, name_alone, number_text, slug
from cfrl.reports.monitor import shares_of
from cfrl.reports.page import Page
from cfrl.reports.pareto import pareto, quantities
from cfrl.reports.reading import crystals_if_any, metrics, reward_terms, settings
from cfrl.rl.makeup import halved
from cfrl.runs.folder import RunFolder

SHOWN_CRYSTALS = 12
SHOWN_ROWS = 1000

Groups = Mapping[str, CrystalBatch]  # "before" and "after"


def finetune_page(run: RunFolder) -> Page:
    """The page of a fine-tuning run. Raises UserError before its first step."""
    logged = metrics(run)
    terms = reward_terms(logged)
    rollouts = crystals_if_any(run.path / "rollouts.h5")
    fresh = {name: crystals_if_any(run.path / f"{name}.h5") for name in ("before", "after")}
    drawn = all(len(crystals) for crystals in fresh.values())
    page = Page.of(run, f"Fine-tuning: {settings(run)['finetune'].get('reward', '')}")
    page.verdict = verdict(fresh, terms, _tenth(logged, "kl")) if drawn else _verdict_of_batches(logged)
    page.tiles(_tiles(logged, rollouts, fresh if drawn else {}))
    if drawn:
        page.heading("Before and after", "Fresh crystals of the starting model and of the tuned one.")
        page.shares(_kept(fresh), "share of fresh crystals")
        _add_comparison(page, fresh, terms)
        if made := shares_of(run):
            page.heading("What they are made of", _lost(made, len(fresh["after"])))
            page.shares(made, "share of fresh crystals")
    elif len(rollouts):
        page.heading("Before and after", "Crystals of the first and of the last tenth of the run.")
        _add_comparison(page, _ends(rollouts), terms)
    if len(rollouts):
        page.heading(
            "Best crystals",
            "The highest rewards of the whole run. Pictures: one crystal of each formula and each prototype (kinds of "
            "atoms left aside); table: one per fingerprint (formula, space group, Wyckoff letters).",
        )
        _add_best(page, rollouts, ["reward", *terms], "step")
    page.heading("Course of the run")
    page.add_figures(*_courses(logged, terms))
    return page


def _lost(made: Mapping[str, tuple[float, float]], n: int) -> str:
    names = ", ".join(halved(made, n))
    return f"Less than half is left of {names}." if names else "No kind has lost half of its share."


# ---- what it comes to


def verdict(fresh: Groups, terms: Sequence[str], kl: float = math.nan) -> str:
    """What was gained, in what, and how far from the starting model. Beyond chance: Welch's t-test of the means."""
    from scipy.stats import ttest_ind

    before, after = (_known(fresh[name], "reward") for name in ("before", "after"))
    if min(len(before), len(after)) < 2:
        return "Too few fresh crystals have a reward to say whether anything was gained."
    p = float(ttest_ind(after, before, equal_var=False).pvalue) if np.ptp([*before, *after]) > 0 else 1.0
    means = f"from {number_text(float(before.mean()))} to {number_text(float(after.mean()))}"
    of = f"{len(before)} and {len(after)} fresh crystals"
    if not p < 0.05:
        start = f"No gain beyond chance: the mean reward went {means} ({of}, {chance_text(p)})"
    else:
        start = "Tuning " + ("raised" if after.mean() > before.mean() else "lowered")
        start += f" the mean reward {means} ({of}, {chance_text(p)})"
    changes = [_change(fresh, name) for name in quantities(terms)[:3]]
    medians = f"; medians: {', '.join(filter(None, changes))}" if any(changes) else ""
    return f"{start}{_distance(kl)}{medians}{_narrower(fresh)}."


def _change(fresh: Groups, name: str) -> str:
    before, after = (_known(fresh[key], name) for key in ("before", "after"))
    if not (len(before) and len(after)):
        return ""
    unit = label(name)[len(name_alone(name)) :].strip(" ()")
    return f"{name_alone(name)} {number_text(np.median(before))} → {number_text(np.median(after))} {unit}".strip()


def _distance(kl: float) -> str:
    return f", at a KL of {number_text(kl)} nats from the starting model" if math.isfinite(kl) else ""


def _narrower(fresh: Groups) -> str:
    """What the gain has cost in variety, where that is much."""
    before, after = _kept(fresh)["unique"]
    return f"; it draws fewer different crystals ({before:.0%} → {after:.0%})" if after < before - 0.05 else ""


def _verdict_of_batches(logged: Mapping[str, np.ndarray]) -> str:
    first, last = (number_text(_tenth(logged, "reward/mean", end)) for end in (0, -1))
    return (
        f"The mean reward of a batch went from {first} to {last}{_distance(_tenth(logged, 'kl'))} (first and last "
        "tenth of the steps); no fresh crystals were drawn to hold it against."
    )


def _kept(fresh: Groups) -> dict[str, tuple[float, float]]:
    """Shares of the fresh crystals before and after."""
    from cfrl.crystals.fingerprint import fingerprints

    def shares(crystals: CrystalBatch) -> dict[str, float]:
        return {
            "valid": _mean(crystals.properties["valid"].numpy()),
            "scored": float(np.isfinite(crystals.properties["reward"].numpy()).mean()),
            "unique": len(set(fingerprints(crystals))) / len(crystals),
        }

    before, after = (shares(fresh[name]) for name in ("before", "after"))
    return {name: (before[name], after[name]) for name in before}


def _tiles(logged: Mapping[str, np.ndarray], rollouts: CrystalBatch, fresh: Groups) -> dict[str, Any]:
    """Key numbers; the reward of batches only where there are no fresh crystals."""
    tiles: dict[str, Any] = {"steps": int(logged["step"][-1]), "crystals drawn": len(rollouts)}
    if fresh:
        name, ends = "mean reward, fresh crystals", [_mean(c.properties["reward"].numpy()) for c in fresh.values()]
    else:
        name, ends = "mean reward of a batch", [_tenth(logged, "reward/mean", end) for end in (0, -1)]
    tiles[name] = " → ".join(map(number_text, ends))
    if math.isfinite(kl := _tenth(logged, "kl")):
        tiles["KL to the start (nats)"] = kl
    return tiles


def _tenth(logged: Mapping[str, np.ndarray], name: str, end: int = -1) -> float:
    """Mean of a metric over the first (0) or the last (-1) tenth of the steps, at least one step."""
    values = logged.get(name, np.array([math.nan]))
    few = max(1, len(values) // 10)
    return _mean(values[:few] if end == 0 else values[-few:])


def _mean(values: np.ndarray) -> float:
    """Of those that are known; NaN where none is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _known(crystals: CrystalBatch, name: str) -> np.ndarray:
    """The values of a column that are no NaN; none where there is no such column."""
    values = crystals.properties[name].numpy() if name in crystals.properties else np.empty(0)
    return values[np.isfinite(values)]


# ---- what is shown


def _add_comparison(page: Page, groups: Groups, terms: Sequence[str]) -> None:
    """Fronts first: where two quantities are asked for, they are the answer."""
    columns = {name: {k: v.numpy() for k, v in crystals.properties.items()} for name, crystals in groups.items()}
    page.add_figures(*pareto(columns, terms), *comparison(groups, ["reward", *terms]))


def _ends(rollouts: CrystalBatch) -> dict[str, CrystalBatch]:
    """The first and the last tenth of a run."""
    step = rollouts.properties["step"]
    first, last = float(step.min()), float(step.max())
    tenth = max((last - first) / 10, 0.5)
    return {"before": rollouts[step <= first + tenth], "after": rollouts[step >= last - tenth]}


def _add_best(page: Page, crystals: CrystalBatch, quantities: Sequence[str], *more: str) -> None:
    """A table of the highest `quantities[0]`, one crystal per fingerprint, and cards of those that differ more."""
    from cfrl.crystals.fingerprint import fingerprints, firsts, varied

    score = crystals.properties[quantities[0]].numpy()
    order = np.argsort(-np.where(np.isfinite(score), score, -np.inf), kind="stable")
    order = order[np.isfinite(score[order])][: 20 * SHOWN_ROWS]
    best = crystals[order[firsts(fingerprints(crystals[order]))][:SHOWN_ROWS]]
    shown = [name for name in (*quantities, *more) if name in best.properties]
    cards = varied(best)[:SHOWN_CRYSTALS]
    facts = [{label(name): float(best.properties[name][i]) for name in shown} for i in cards]
    page.crystals(best[cards], facts)
    page.table(
        {
            "rank": list(range(1, len(best) + 1)),
            "formula": best.formulas(),
            "space_group": best.space_group.tolist(),
            "sites": best.num_sites.tolist(),
            **{name: best.properties[name].tolist() for name in shown},
        }
    )


def _courses(logged: Mapping[str, np.ndarray], terms: Sequence[str]) -> list[Figure | None]:
    lines: list[tuple[str, str, str, Mapping[str, str]]] = [
        ("reward", "Reward", "reward", {"reward/mean": "mean", "reward/median": "median"}),
        *((slug(f"term-{term}"), f"Term: {term}", label(term), {f"reward/{term}": ""}) for term in terms),
        ("kl", "Distance to the starting model", "KL (nats)", {"kl": "all"} | _by_factor("kl")),
        ("entropy", "Entropy of the policy", "nats per crystal", _by_factor("entropy")),
        ("uniqueness", "Variety", "share of a batch", {name: name for name in ("valid", "scored", "unique", "new")}),
        ("clipping", "Update", "share, or ratio", {"clip_fraction": "clipped", "ratio": "policy ratio"}),
        ("forgetting", "Forgetting", "validation loss (nats per crystal)", {"validation/loss": ""}),
        ("seconds", "Time", "seconds per step", {name: name[8:] for name in logged if name.startswith("seconds/")}),
    ]
    return [course(logged, *line) for line in lines]


def _by_factor(metric: str) -> dict[str, str]:
    return {f"{metric}/{factor}": factor for factor in (*FACTORS, "space_group")}
