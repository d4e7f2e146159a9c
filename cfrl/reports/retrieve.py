"""The report of a retrieval: the first of the ranking, whether it finds what was asked for, what sampling met."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from cfrl.io.storage import read_crystals
from cfrl.reports.figures import AMBER, BLUE, GREEN, GREY, ORANGE, PALETTE, Figure, Series, histogram
from cfrl.reports.groups import elements
from cfrl.reports.labels import chance_text, label, name_alone, number_text, title
from cfrl.reports.page import Page
from cfrl.reports.reading import read_result
from cfrl.runs.folder import RunFolder
from cfrl.tables import read_csv
from cfrl.untrusted import open_hdf5

SHOWN_CRYSTALS = 12
SHOWN_ROWS = 1000
BY = {
    "critic": "what the critic of the tuning expects of crystals of these Wyckoff letters and elements",
    "implied_reward": "the reward that the tuned model implies: the likelihood ratio, and log Z",
    "log_ratio": "how much likelier tuning has made them: log P<sub>tuned</sub>(C|G) − log P<sub>base</sub>(C|G)",
}
SHOWN_POINTS = 4000
_UNLABELLED = ("base model's likelihood", "composition near best rollouts")  # what else ranks without labels


def retrieve_page(run: RunFolder) -> Page:
    """The page of a retrieval. Raises UserError where it did not come to its end."""
    result = read_result(run.path / "retrieval.json")
    page = Page.of(
        run,
        "Retrieval: what the tuned model points at",
        f"{result['tuned']} on {result['dataset']}",
        verdict(result)[0],
    )
    best, table = read_crystals(run.path / "retrieved.h5"), read_csv(run.path / "retrieved.csv")
    key, wanted = result["ranked_by"], result["property"].lstrip("-")
    verdicts, sampling = result.get("verdicts", []), result.get("sampling")
    page.tiles(_tiles(result))

    page.heading(
        "The first of the ranking",
        Markup(
            f"{result['scored']:,} known crystals, ranked by {BY.get(key, BY['log_ratio'])}. Labels of the dataset "
            "played no part."
        ),
    )
    shown = [name for name in (key, wanted) if name]
    facts = [{label(name): table[name][i] for name in shown} for i in range(min(len(best), SHOWN_CRYSTALS))]
    page.crystals(best[: len(facts)], facts)
    columns = ["rank", "id", "formula", "space_group", "sites", *shown]
    columns += [name for name in table if name not in columns and not name.startswith("log_ratio") and name != "atoms"]
    page.table({name: table[name][:SHOWN_ROWS] for name in columns})

    page.heading("Is it right?", _judgement(result))
    page.add_figures(_reward_scatter(run, result), _enrichment(verdicts, result), *_ranking_figures(run, result, table))
    if verdicts:
        page.table(_verdict_columns(verdicts), sortable=False)
    if sampling:
        intro = f"{sampling['draws']:,} draws of each model; whether one is a known material, StructureMatcher says."
        page.heading("Known materials met by sampling", intro)
        met = read_csv(run.path / "met.csv")
        page.add_figures(_discovery(run), _met(met))
        if met["id"]:
            page.table({name: column[:SHOWN_ROWS] for name, column in met.items()})
    page.heading("Elements")
    page.add_figures(elements(best, f"Elements in the first {len(best)}"))
    return page


# ---- what it comes to


def verdict(result: Mapping[str, Any]) -> tuple[str, bool | None]:
    """Whether the ranking finds what was asked for: against labels of the dataset, else against the reward.

    As a sentence, and as True or False; None where it cannot be said.
    """
    ratio = _ratio(result)
    return _against_labels(ratio, result) if ratio else _against_reward(result["correlation"])


def _against_labels(ratio: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[str, bool]:
    """By the first k (hypergeometric test) and by the whole ranking (Mann and Whitney's, of the area under the ROC)."""
    from scipy.stats import hypergeom, norm

    n, good, cut = ratio["crystals"], ratio["good"], _cut(ratio)
    hits, expected = round(ratio["precision"][cut] * int(cut)), good * int(cut) / n
    p = float(hypergeom.sf(hits - 1, n, good, int(cut)))
    z = (ratio["auc"] - 0.5) / math.sqrt((n + 1) / (12 * good * (n - good)))
    found = (
        f"{hits} of its first {cut} are among {_asked_for(result, ratio)}, where chance gives {number_text(expected)}"
    )
    area = f"area under the ROC curve {number_text(ratio['auc'])}"
    if p < 0.05:
        return f"The ranking finds what was asked for: {found} ({chance_text(p)}){_rivals(result, ratio, cut)}.", True
    if z > norm.isf(0.025):
        leans = "no better than chance, though as a whole it leans right"
        return f"The first of the ranking are {leans} ({area}): {found}.", False
    if z < norm.ppf(0.025):
        return f"The ranking is worse than chance, it points away from what was asked for ({area}): {found}.", False
    return f"The ranking is no better than chance: {found} ({area}).", False


def _against_reward(correlation: Mapping[str, Any]) -> tuple[str, bool | None]:
    """By the rank correlation; of n independent crystals it is normal about 0, with variance 1 / (n - 1)."""
    from scipy.stats import norm

    rho, n = correlation.get("all"), correlation["crystals"]
    if not n or rho is None:
        return "Whether the ranking is right cannot be said: the dataset has no column for what was rewarded.", None
    p = float(2 * norm.sf(abs(rho) * math.sqrt(n - 1)))
    held = f"of {n:,} crystals the rank correlation with the reward is {number_text(rho)} ({chance_text(p)})"
    if not p < 0.05:
        return f"The ranking is no better than chance: {held}.", False
    return f"The ranking {'follows' if rho > 0 else 'runs against'} what was asked for: {held}.", rho > 0


def _ratio(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((v for v in result.get("verdicts", [])[:1] if _cut(v)), None)  # the ranking itself comes first


def _cut(ratio: Mapping[str, Any]) -> str | None:
    """The first k by which a ranking is judged in short."""
    return next((k for k in ("100", "50", "20", "10") if k in ratio["enrichment"]), None)


def _asked_for(result: Mapping[str, Any], ratio: Mapping[str, Any]) -> str:
    """Such as: the 12 (5%) with the highest band gap."""
    sign = "lowest" if result["property"].startswith("-") else "highest"
    share = ratio["good"] / ratio["crystals"]
    return f"the {ratio['good']:,} ({share:.0%}) with the {sign} {name_alone(result['property'].lstrip('-'))}"


def _rivals(result: Mapping[str, Any], ratio: Mapping[str, Any], cut: str) -> str:
    """Other rankings without labels that do as well."""
    better = [
        f"{other['name']} ({number_text(other['enrichment'][cut])})"
        for other in result["verdicts"]
        if other["name"] in _UNLABELLED and other["enrichment"][cut] >= ratio["enrichment"][cut]
    ]
    own = number_text(ratio["enrichment"][cut])
    return f", {own} times chance; no better than {' and '.join(better)}" if better else f", {own} times chance"


def _tiles(result: Mapping[str, Any]) -> dict[str, Any]:
    tiles: dict[str, Any] = {"crystals ranked": result["scored"]}
    if ratio := _ratio(result):
        cut = _cut(ratio)
        tiles[f"times random among the first {cut}"] = ratio["enrichment"][cut]
        tiles["area under the ROC curve"] = ratio["auc"]
    if result["correlation"]["crystals"]:
        tiles["rank correlation with the reward"] = result["correlation"]["all"]
        tiles["the same within space groups"] = result["correlation"]["within"]
    if sampling := result.get("sampling"):
        base, tuned = (sampling["materials_met"][name] for name in ("base", "tuned"))
        tiles["materials met, base → tuned"] = f"{base:,} → {tuned:,}"
    return tiles


def _judgement(result: Mapping[str, Any]) -> str:
    parts = []
    if result["correlation"]["crystals"]:
        parts.append(
            "At the optimum of KL-regularised tuning the ratio is the reward over β plus a constant of the space "
            f"group, so both should rise together ({result['correlation']['crystals']:,} crystals have a reward here)."
        )
    if result.get("verdicts"):
        sign = "lowest" if result["property"].startswith("-") else "highest"
        ratio = result["verdicts"][0]
        parts.append(
            f"Good are the {ratio['good']:,} of {ratio['crystals']:,} labelled crystals with the {sign} "
            f"{label(result['property'].lstrip('-'))}; enrichment is their share among the first k over "
            "their share among all."
        )
    return " ".join(parts) or "The dataset has no column for what was rewarded; nothing to hold the ranking against."


def _reward_scatter(run: RunFolder, result: Mapping[str, Any]) -> Figure | None:
    table = read_csv(run.path / "rewards.csv")
    if not len(table["id"]):
        return None
    rows = _thin(len(table["id"]))
    reward, ratio = (np.array(table[name])[rows] for name in ("reward", "ratio"))
    points = Series(reward, ratio, "", "points", BLUE, text=[str(table["id"][row]) for row in rows])
    return Figure("reward", "Likelihood ratio against reward", "reward", label(result["ranked_by"]), [points])


def _thin(n: int) -> np.ndarray:
    """Rows to show of n, evenly spread."""
    return np.unique(np.linspace(0, n - 1, min(n, SHOWN_POINTS)).astype(int))


def _enrichment(verdicts: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> Figure | None:
    if not verdicts:
        return None
    figure = Figure("enrichment", "Enrichment", "first k of the ranking", "times random", log_x=True, from_zero=True)
    for verdict, color in zip(verdicts, (BLUE, GREY, AMBER, GREEN, ORANGE, *PALETTE), strict=False):
        cuts = [int(k) for k in verdict["enrichment"]]
        dash = verdict["name"] == "random"
        figure.series.append(
            Series(cuts, list(verdict["enrichment"].values()), verdict["name"], "line", color, dash=dash)
        )
    return figure


def _ranking_figures(run: RunFolder, result: Mapping[str, Any], table: Mapping[str, list]) -> list[Figure | None]:
    """The ratio and the property over the whole dataset."""
    key, wanted = result["ranked_by"], result["property"].lstrip("-")
    with open_hdf5(run.path / "ranking.h5") as file:
        ratio = file[key][:]
        values = file[wanted.replace("/", ".")][:] if wanted else None
        factors = {name: file[f"log_ratio.{name}"][:] for name in ("wyckoff", "species", "coords", "lattice")}
        first = np.isin(file["rank"][:], np.arange(1, len(table["rank"]) + 1))
    spread = histogram("ratio", "Likelihood ratio over the dataset", label(key), {"": ratio})
    parts = Figure("factors", "Where the ratio comes from", "", "mean log-likelihood ratio (nats)")
    for name, rows, color in (("whole dataset", np.isfinite(ratio), GREY), (f"first {first.sum()}", first, BLUE)):
        means = [float(values[rows].mean()) for values in factors.values()] if rows.any() else [0.0] * 4
        parts.series.append(Series(list(factors), means, name, "bars", color))
    found = None
    if values is not None:
        groups = {"whole dataset": values, f"first {first.sum()}": values[first]}
        found = histogram("property", f"{title(wanted)} of what was found", label(wanted), groups)
    return [found, spread, parts]


def _verdict_columns(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    cuts = [k for k in ("10", "100", "1000") if all(k in verdict["precision"] for verdict in verdicts)]
    return {
        "ranking": [verdict["name"] for verdict in verdicts],
        "crystals": [verdict["crystals"] for verdict in verdicts],
        **{f"precision at {k}": [verdict["precision"][k] for verdict in verdicts] for k in cuts},
        **{f"enrichment at {k}": [verdict["enrichment"][k] for verdict in verdicts] for k in cuts},
        "area under the ROC curve": [verdict["auc"] for verdict in verdicts],
    }


def _discovery(run: RunFolder) -> Figure:
    curve = read_csv(run.path / "discovery.csv")
    rows = _thin(len(curve["draws"]))
    series = [
        Series(np.array(curve["draws"])[rows], np.array(curve[name])[rows], name, "line", color)
        for name, color in (("base", GREY), ("tuned", BLUE))
    ]
    return Figure("discovery", "Discovery", "crystals drawn", "known materials met", series, from_zero=True)


def _met(met: Mapping[str, list], most: int = 15) -> Figure | None:
    """The materials whose draws rose most."""
    names = [str(name) for name in met["id"][:most]]
    if not names:
        return None
    pairs = (("base", GREY), ("tuned", BLUE))
    series = [Series(names, met[name][:most], name, "bars", color) for name, color in pairs]
    return Figure("met", "Materials met, most gained first", "", "times drawn", series)
