"""report.html: what a run did, on one page; its figures also as PNG and SVG in plots/.

What each command's page shows is one function here. page.py makes pages, figures.py draws figures.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.symmetry import CRYSTAL_SYSTEMS
from cfrl.errors import UserError
from cfrl.files import atomic_file
from cfrl.io.storage import read_crystals
from cfrl.reports.figures import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALETTE,
    Figure,
    PeriodicTable,
    Series,
    histogram,
    pareto,
    save,
)
from cfrl.reports.page import Page, label, number_text
from cfrl.runs.folder import RunFolder, newest_run
from cfrl.stability.flags import FLAGS
from cfrl.tables import read_csv
from cfrl.untrusted import fitting, open_hdf5, read_json, read_toml

REPORT = "report.html"
SHOWN_CRYSTALS = 12
SHOWN_ROWS = 1000
SHOWN_POINTS = 4000


# ---- reports -----------------------------------------------------------------------------------------------------


def write_report(run: RunFolder | str | Path, console: Any = None) -> Path:
    """`report.html` of a run folder, and its figures in `plots/`.

    Args:
        run: the folder.
        console: a rich console that is told what was written.

    Raises:
        UserError: no run folder, nothing in it to report, or files that were damaged since.
    """
    run = run if isinstance(run, RunFolder) else RunFolder.open(run)
    with fitting(run.path):
        page = _PAGES.get(_command(run), _metrics_page)(run)
    plots = run.path / "plots"
    plots.mkdir(exist_ok=True)
    for figure in page.figures:
        save(figure, plots)
    path = run.path / REPORT
    with atomic_file(path) as temp:
        temp.write_text(page.html(), encoding="utf-8")
    if console is not None:
        console.print(f"Written: {path} and {len(page.figures)} figures in {plots}", highlight=False, soft_wrap=True)
    return path


def newest_reportable(root: str | Path = "runs") -> RunFolder:
    """The newest run that has a page of its own.

    Raises:
        UserError: there is none.
    """
    run = newest_run(list(_PAGES), root)
    if run is None:
        raise UserError(f"there is no run of {', '.join(_PAGES)} in {root}; name a run folder")
    return run


def _page(run: RunFolder, title: str, subtitle: str) -> Page:
    provenance = run.path / "run.json"
    return Page(title, subtitle, read_json(provenance) if provenance.is_file() else {})


def _settings(run: RunFolder) -> dict[str, dict[str, Any]]:
    return read_toml(run.path / "config.toml")


def _command(run: RunFolder) -> str:
    """The command that made the run; a folder may have been renamed, but its settings bear the command's name."""
    return next(iter(_settings(run)), run.command)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path}: there is no such file; did the run come to its end?")
    return read_json(path)


def _metrics_page(run: RunFolder) -> Page:
    """Every metric that was logged, grouped by the word before the slash."""
    page = _page(run, f"cfrl {_command(run)}".strip(), run.path.name)
    metrics = _metrics(run)
    if not len(metrics.get("step", ())):
        raise UserError(f"{run.path}: has no metrics yet; there is nothing to report")
    groups: dict[str, dict[str, str]] = {}
    for name in metrics:
        group, _, part = name.partition("/")
        if name != "step":
            groups.setdefault(group, {})[name] = part or group
    page.heading("Course of the run")
    page.add_figures(*(_course(metrics, group, label(group), label(group), names) for group, names in groups.items()))
    return page


def _metrics(run: RunFolder) -> dict[str, np.ndarray]:
    return {name: np.array(values) for name, values in run.metrics().items()}


def _course(
    metrics: Mapping[str, np.ndarray], name: str, title: str, axis: str, shown: Mapping[str, str], note: str = ""
) -> Figure | None:
    """Metrics over steps (metric -> name in the legend); None where none of them was logged."""
    present = [metric for metric in shown if metric in metrics and np.isfinite(metrics[metric]).any()]
    if not present:
        return None
    figure = Figure(name, title, "step", axis, note=note)
    for metric, color in zip(present, PALETTE * 3, strict=False):
        known = np.isfinite(metrics[metric])
        figure.series.append(Series(metrics["step"][known], metrics[metric][known], shown[metric], "line", color))
    return figure


# ---- fine-tuning


def _finetune_page(run: RunFolder) -> Page:
    settings = _settings(run)["finetune"]
    metrics = _metrics(run)
    if not len(metrics.get("step", ())):
        raise UserError(f"{run.path}: has no metrics yet; there is nothing to report")
    page = _page(run, f"Fine-tuning: {settings.get('reward', '')}", run.path.name)
    terms = [
        name for name in metrics if name.startswith("reward/") and name[7:] not in ("mean", "median", "std", "max")
    ]
    rollouts = _rollouts(run.path / "rollouts.h5")
    fresh = {name: _rollouts(run.path / f"{name}.h5") for name in ("before", "after")}
    page.tiles(_finetune_tiles(metrics, rollouts, fresh))

    page.heading("Course of the run")
    factors = ("wyckoff", "species", "coords", "lattice", "space_group")
    page.add_figures(
        _course(metrics, "reward", "Reward", "reward", {"reward/mean": "mean", "reward/median": "median"}),
        *(_course(metrics, _slug(f"term-{t[7:]}"), f"Term: {t[7:]}", label(t[7:]), {t: ""}) for t in terms),
        _course(
            metrics,
            "kl",
            "Distance to the starting model",
            "KL (nats)",
            {"kl": "all"} | {f"kl/{f}": f for f in factors},
        ),
        _course(metrics, "entropy", "Entropy of the policy", "nats per crystal", {f"entropy/{f}": f for f in factors}),
        _course(
            metrics, "uniqueness", "Variety", "share of a batch", {m: m for m in ("valid", "scored", "unique", "new")}
        ),
        _course(
            metrics, "clipping", "Update", "share, or ratio", {"clip_fraction": "clipped", "ratio": "policy ratio"}
        ),
        _course(metrics, "forgetting", "Forgetting", "validation loss (nats per crystal)", {"validation/loss": ""}),
        _course(
            metrics, "seconds", "Time", "seconds per step", {m: m[8:] for m in metrics if m.startswith("seconds/")}
        ),
    )
    if len(rollouts):
        groups, intro = _before_and_after(fresh, rollouts)
        page.heading("Before and after", intro)
        page.add_figures(*_comparison(groups, ["reward", *(t[7:] for t in terms)]))
        page.heading(
            "Best crystals",
            "The highest rewards of the whole run. Pictures: one crystal of each formula and each prototype (kinds of "
            "atoms left aside); table: one per fingerprint (formula, space group, Wyckoff letters).",
        )
        _add_best(page, rollouts, ["reward", *(t[7:] for t in terms)], "step")
    return page


def _rollouts(path: Path) -> CrystalBatch:
    return read_crystals(path) if path.is_file() else CrystalBatch.empty()


def _finetune_tiles(
    metrics: Mapping[str, np.ndarray], rollouts: CrystalBatch, fresh: Mapping[str, CrystalBatch]
) -> dict[str, Any]:
    """Key numbers before and after: of fresh crystals where both models drew some, else means of tenths of the run.

    A single step's batch is no such number: it is small, and the policy that drew it was not yet the tuned one.
    """
    tiles: dict[str, Any] = {"steps": int(metrics["step"][-1])}
    if len(rollouts):
        tiles["crystals drawn"] = len(rollouts)
    first, last = ({name: _mean(part) for name, part in tenth.items()} for tenth in _tenths(metrics))
    drawn = ""
    if all(len(crystals) for crystals in fresh.values()):
        drawn = ", fresh crystals"
        first, last = ({**ends, **_headline(fresh[key])} for key, ends in (("before", first), ("after", last)))
    for name, text in {"reward/mean": "mean reward", "valid": "valid", "unique": "unique"}.items():
        if name in metrics and math.isfinite(first[name]) and math.isfinite(last[name]):
            tiles[text + drawn] = f"{number_text(first[name])} → {number_text(last[name])}"
    if math.isfinite(last.get("kl", math.nan)):
        tiles["KL to the start (nats)"] = last["kl"]
    return tiles


def _tenths(metrics: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The metrics of the first and of the last tenth of the steps, at least one step each."""
    few = max(1, len(metrics["step"]) // 10)
    return {name: m[:few] for name, m in metrics.items()}, {name: m[-few:] for name, m in metrics.items()}


def _mean(values: np.ndarray) -> float:
    """Of those that are known; NaN where none is."""
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else math.nan


def _headline(crystals: CrystalBatch) -> dict[str, float]:
    """What the metrics of a step say of its batch, of other crystals."""
    from cfrl.crystals.fingerprint import fingerprints

    reward, valid = (crystals.properties[name].numpy() for name in ("reward", "valid"))
    unique = len(set(fingerprints(crystals))) / len(crystals)
    return {"reward/mean": _mean(reward), "valid": _mean(valid), "unique": unique}


def _before_and_after(fresh: dict[str, CrystalBatch], rollouts: CrystalBatch) -> tuple[dict[str, CrystalBatch], str]:
    """Fresh crystals of both models where the run drew them, else the first and last tenth of its rollouts."""
    if all(len(crystals) for crystals in fresh.values()):
        return fresh, "Fresh crystals of the starting model and of the tuned one."
    step = rollouts.properties["step"]
    first, last = float(step.min()), float(step.max())
    tenth = max((last - first) / 10, 0.5)
    groups = {"before": rollouts[step <= first + tenth], "after": rollouts[step >= last - tenth]}
    return groups, "Crystals of the first and of the last tenth of the run."


def _comparison(groups: Mapping[str, CrystalBatch], quantities: Sequence[str]) -> list[Figure | PeriodicTable | None]:
    """Distributions of the quantities, sizes, crystal systems and elements of two groups of crystals."""
    figures: list[Figure | PeriodicTable | None] = [
        histogram(_slug(f"histogram-{name}"), _title(name), label(name), _values(groups, name)) for name in quantities
    ]
    sites = {key: crystals.num_sites.numpy().astype(float) for key, crystals in groups.items()}
    front = pareto({key: crystals.properties for key, crystals in groups.items()})
    figures += [front, histogram("sites", "Sites", "inequivalent sites", sites), _systems(groups)]
    before, after = (_element_shares(crystals) for crystals in groups.values())
    few = 0.5 / min(len(crystals) for crystals in groups.values())  # half a crystal: an element met once is no change
    shift = {z: math.log2((after[z] + few) / (before[z] + few)) for z in range(1, 119) if before[z] + after[z] > 0}
    note = "log<sub>2</sub> of the share of crystals that hold the element, after over before: blue, more often."
    return [
        *figures,
        PeriodicTable("elements", "Elements: what has changed", shift, "log2(after / before)", True, note),
    ]


def _values(groups: Mapping[str, CrystalBatch], name: str) -> dict[str, np.ndarray]:
    return {key: crystals.properties[name].numpy() for key, crystals in groups.items() if name in crystals.properties}


def _systems(groups: Mapping[str, CrystalBatch]) -> Figure:
    """Shares of the crystal systems."""
    figure = Figure("systems", "Crystal systems", "", "share of crystals")
    for (key, crystals), color in zip(groups.items(), (GREY, BLUE) if len(groups) > 1 else (BLUE,), strict=True):
        system = np.searchsorted(list(CRYSTAL_SYSTEMS.values()), crystals.space_group.numpy())
        share = np.bincount(system, minlength=7) / max(len(crystals), 1)
        figure.series.append(Series([*CRYSTAL_SYSTEMS], share, key, "bars", color))
    return figure


def _element_shares(crystals: CrystalBatch) -> np.ndarray:
    """(119,) share of crystals that hold each element."""
    present = np.zeros((len(crystals), 119), dtype=bool)
    np.put_along_axis(present, crystals.species.numpy(), True, axis=1)
    return present[:, :].mean(0) * (np.arange(119) > 0) if len(crystals) else np.zeros(119)


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


def _title(name: str) -> str:
    text = label(name)
    return text[:1].upper() + text[1:]


def _slug(name: str) -> str:
    """Fit for a file's name and an HTML id."""
    return re.sub(r"\W+", "-", name).strip("-").lower()


# ---- retrieval


def _retrieve_page(run: RunFolder) -> Page:
    result = _read_json(run.path / "retrieval.json")
    page = _page(
        run, "Retrieval: what the tuned model points at", html.escape(f"{result['tuned']} on {result['dataset']}")
    )
    best, table = read_crystals(run.path / "retrieved.h5"), read_csv(run.path / "retrieved.csv")
    key, wanted = result["ranked_by"], result["property"].lstrip("-")
    verdicts, sampling = result.get("verdicts", []), result.get("sampling")
    page.tiles(_retrieve_tiles(result))

    page.heading(
        "The first of the ranking",
        f"{result['scored']:,} known crystals, ranked by how much likelier tuning has made them: "
        "log P<sub>tuned</sub>(C|G) − log P<sub>base</sub>(C|G). Labels of the dataset played no part.",
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
    shares = _element_shares(best)
    values = {z: 100 * share for z, share in enumerate(shares) if share > 0}
    page.add_figures(
        PeriodicTable("elements", f"Elements in the first {len(best)}", values, "% of crystals with the element")
    )
    return page


def _retrieve_tiles(result: Mapping[str, Any]) -> dict[str, Any]:
    tiles: dict[str, Any] = {"crystals ranked": result["scored"]}
    ratio = next((v for v in result.get("verdicts", []) if v["name"] == "likelihood ratio"), None)
    if ratio:
        cut = next((k for k in ("100", "50", "20", "10") if k in ratio["enrichment"]), None)
        if cut:
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
            f"{html.escape(label(result['property'].lstrip('-')))}; enrichment is their share among the first k over "
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
    ratios = histogram("ratio", "Likelihood ratio over the dataset", label(key), {"": ratio})
    parts = Figure("factors", "Where the ratio comes from", "", "mean log-likelihood ratio (nats)")
    for name, rows, color in (("whole dataset", np.isfinite(ratio), GREY), (f"first {first.sum()}", first, BLUE)):
        means = [float(values[rows].mean()) for values in factors.values()] if rows.any() else [0.0] * 4
        parts.series.append(Series(list(factors), means, name, "bars", color))
    found = None
    if values is not None:
        groups = {"whole dataset": values, f"first {first.sum()}": values[first]}
        found = histogram("property", f"{_title(wanted)} of what was found", label(wanted), groups)
    return [found, ratios, parts]


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


# ---- screening


def _screen_page(run: RunFolder) -> Page:
    summary = _read_json(run.path / "summary.json")
    table = read_csv(run.path / "table.csv")
    crystals = _rollouts(run.path / "screen.h5")
    page = _page(run, f"Screening of {summary['crystals']:,} crystals", html.escape(run.path.name))
    rates = {rate["name"]: rate for rate in summary["rates"]}
    shown = ("valid", "unique", "novel", "stable", "metastable", "S.U.N.", "meta-S.U.N.")
    page.tiles({name: f"{rates[name]['share']:.1%}" for name in shown if name in rates})

    page.heading("What is left", html.escape(" ".join(filter(None, map(summary.get, ("judgement", "warning"))))))
    page.add_figures(_funnel(summary), _failures(summary))
    page.table(
        {
            "rate": list(rates),
            "crystals": [rate["count"] for rate in rates.values()],
            "of": [rate["total"] for rate in rates.values()],
            "share (%)": [100 * rate["share"] for rate in rates.values()],
            "95% from": [100 * rate["low"] for rate in rates.values()],
            "to": [100 * rate["high"] for rate in rates.values()],
            "meaning": [rate["definition"] for rate in rates.values()],
        },
        sortable=False,
    )
    if by_elements := summary.get("by_elements"):
        names = list(by_elements["1"])
        page.table(
            {"elements": list(by_elements)} | {name: [row[name] for row in by_elements.values()] for name in names},
            sortable=False,
        )
    numbers = {name: np.array(column) for name, column in table.items() if column and isinstance(column[0], float)}
    known = {name: values for name, values in numbers.items() if np.isfinite(values).any()}
    predicted = [name.removesuffix("_std") for name in known if name.endswith("_std")]
    quantities = [name for name in ("e_above_hull", *predicted, *_SCREENED) if name in known]

    page.heading("Distributions")
    figures = [histogram(_slug(name), _title(name), label(name), {"": known[name]}) for name in quantities]
    if len(crystals):
        shares = {z: 100 * share for z, share in enumerate(_element_shares(crystals)) if share > 0}
        figures += [_systems({"": crystals})]
        figures += [PeriodicTable("elements", "Elements", shares, "% of crystals with the element")]
    page.add_figures(*figures)

    columns = [*_FIRST, *quantities, *(f"{name}_std" for name in predicted), *_LAST]
    columns = [name for name in dict.fromkeys(columns) if name in table and (name not in numbers or name in known)]
    candidate = np.array(table["candidate"]) == 1
    held_back = np.array(table["held_back"]) == 1 if "held_back" in table else np.zeros_like(candidate)
    page.heading("Candidates", f"{candidate.sum():,}, in the order of the ranking.")
    row_of = {str(name): row for row, name in enumerate(table["id"])}
    first = crystals[[i for i, name in enumerate(crystals.ids) if candidate[row_of[name]]][:SHOWN_CRYSTALS]]
    facts = [name for name in (*quantities[:4], "num_references") if name in known]
    page.crystals(first, [{label(name): known[name][row_of[crystal.ids[0]]] for name in facts} for crystal in first])
    _add_rows(page, table, columns, candidate)
    if summary.get("flags"):
        page.heading(
            "Held back by flags", f"{held_back.sum():,} that would be candidates but for what is suspect of them."
        )
        flags = summary["flags"]
        counts = {what: [count[what] for count in flags.values()] for what in ("crystals", "held back")}
        meaning = [FLAGS.get(name, "") for name in flags]
        page.table({"flag": list(flags), **counts, "meaning": meaning}, sortable=False)
        _add_rows(page, table, columns, held_back)
    page.heading("The others")
    _add_rows(page, table, columns, ~(candidate | held_back))
    return page


def _add_rows(page: Page, table: Mapping[str, Sequence[Any]], columns: Sequence[str], chosen: np.ndarray) -> None:
    """The chosen rows, and those of the columns that have something to say of them."""
    rows = np.flatnonzero(chosen)[:SHOWN_ROWS]
    shown = {name: [table[name][row] for row in rows] for name in columns}
    if len(rows):
        page.table({name: values for name, values in shown.items() if any(value != "" for value in values)})


_SCREENED = ("rmsd", "volume_change", "density", "energy_per_atom", "max_force")
_FIRST = ("id", "formula", "space_group", "e_above_hull", "num_references", "flags")
_LAST = ("known_as", "new_formula", "status")


def _funnel(summary: Mapping[str, Any]) -> Figure:
    """How many crystals satisfy each condition and all before it."""
    counts = summary.get("funnel")
    if counts is None:  # of a run that did not count them: the rates that hold one within the other
        rates = {rate["name"]: rate["count"] for rate in summary["rates"]}
        nested = ("valid", "unique", "meta-S.U.N.", "S.U.N.")
        counts = {"all": summary["crystals"]} | {name: rates[name] for name in nested if name in rates}
    bars = Series(list(counts), list(counts.values()), "", "bars", BLUE)
    note = "Crystals that satisfy each condition and all before it."
    return Figure("funnel", "The funnel", "", "crystals", [bars], note=note)


def _failures(summary: Mapping[str, Any], most: int = 8) -> Figure | None:
    failures = dict(list(summary["failures"].items())[:most])
    if not failures:
        return None
    names = [name if len(name) < 28 else name[:26] + "…" for name in failures]
    return Figure(
        "failures",
        "Why crystals went no further",
        "",
        "crystals",
        [Series(names, list(failures.values()), "", "bars", ORANGE)],
    )


_PAGES: dict[str, Callable[[RunFolder], Page]] = {
    "finetune": _finetune_page,
    "retrieve": _retrieve_page,
    "screen": _screen_page,
}
