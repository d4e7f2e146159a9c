"""`cfrl retrieve`: ranks known materials by how much likelier tuning has made them, and judges the ranking."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from rich.console import Console

from cfrl.commands.finetune import configured_reward, settings_beside
from cfrl.config import FinetuneConfig, RetrieveConfig
from cfrl.crystals.compositions import fractions
from cfrl.crystals.crystal import CrystalBatch
from cfrl.errors import UserError, nearest
from cfrl.files import atomic_file, provenance
from cfrl.io.catalogue import PROTOTYPES, at_hand
from cfrl.io.datasets import Dataset
from cfrl.io.storage import read_crystals, write_crystals
from cfrl.model.distributions import SamplerOptions
from cfrl.model.files import EMBEDDED, Extras, load_extras, load_model, model_path
from cfrl.model.sampler import sample, space_group_prior
from cfrl.model.transformer import CrystalTransformer
from cfrl.model.wishes import parse_elements
from cfrl.rl.critic import word_of
from cfrl.runs.devices import choose_device
from cfrl.runs.folder import RunFolder, newest_run
from cfrl.runs.progress import progress_bar
from cfrl.screening.ranking import GOOD_SHARE, composition_neighbours, is_good, rank_correlation, rate_ranking
from cfrl.screening.retrieval import RANKINGS, Meetings, descending, discovery_curve, meet, property_column, rank
from cfrl.tables import Columns, as_text, read_csv, write_csv
from cfrl.untrusted import fitting

RESULT = "retrieval.json"
RANKED = {
    "critic": "critic of the tuning",
    "reward": "implied reward",
    "crystal": "likelihood ratio",
    "site": "likelihood ratio per site",
    "joint": "likelihood ratio with its space group",
}
OWN = ("critic", "reward", "crystal")  # the rankings that are always told beside the one that was asked for
COUNTS = ("space_group", "sites", "atoms")
MIN_JUDGED = 40  # labelled crystals; with fewer, the best share is less than two
MAX_JUDGED = 50_000  # labelled crystals; a larger dataset is judged on a random part of it


def retrieve(
    config: RetrieveConfig, console: Console | None = None, root: str | Path = "runs", trust: bool = False
) -> RunFolder:
    """`cfrl retrieve`: rank a dataset, sample both models, judge, and write it all down.

    Args:
        config: settings.
        console: for progress and results; None: silent.
        root: where runs are looked for, and where the run folder is made.
        trust: import code that the settings of the run name, to score crystals with its reward; else the user is asked.

    Returns:
        The run folder: ranking.h5 (every crystal, in the order of the dataset), retrieved.csv and retrieved.h5 (the
        first ones), met.csv and discovery.csv, retrieval.json (all figures), report.html and plots.

    Raises:
        UserError: nothing to compare, bad settings, or a file that cannot be read.
    """
    from cfrl.reports.report import write_report
    from cfrl.rewards.trust import confirm_code

    console = console or Console(quiet=True)
    named = config.base
    config, tuning, extras = _complete(config, root, console)
    if config.reward_crystals and tuning.reward:
        confirm_code(tuning.reward, Path(config.run) / "config.toml", trust)
    device = choose_device(config.device)
    tuned, base = load_model(config.run, device), load_model(config.base, device)
    if not named and tuned.config != base.config:  # the embedded models were others in an earlier version
        raise UserError(
            f"{config.run}: tuned from {config.base or 'default'!r}, which is another network here: give --base "
            f"({' or '.join(EMBEDDED)}, weights or a run folder)"
        )
    dataset = Dataset(config.dataset, config.split)
    label_name, sign = _label(config.property or "", tuning.reward, dataset.properties)
    label_name = property_column(label_name)
    elements = parse_elements(tuning.elements)
    options = SamplerOptions(tuning.temperature, tuning.top_p, elements, tuning.max_atoms)
    groups = _space_groups(tuning)
    shares = tuple(space_group_prior(m, g, options.max_atoms) for m, g in zip((tuned, base), groups, strict=True))

    with fitting(model_path(config.run)):
        critic = word_of(extras.critic)
    config = replace(config, rank=_ranking(config, extras.implied is not None, critic is not None))

    run = RunFolder.create("retrieve", Path(config.dataset).stem, config, root)
    with progress_bar("likelihoods", dataset.size, console) as advance:
        ranking, best = rank(
            tuned, base, dataset.batches(advance), config.top, config.rank, options, shares, extras.implied, critic
        )
    _write_ranking(run.path, ranking, best, RANKINGS[config.rank])
    result: dict[str, Any] = {
        "tuned": config.run,
        "base": config.base or "default",
        "dataset": config.dataset,
        "reward": tuning.reward,
        "ranked_by": RANKINGS[config.rank],
        "crystals": len(ranking["id"]),
        "scored": int((ranking["rank"] > 0).sum()),
    }
    if config.samples:
        drawn = [
            _draw(*sampler, options, config, console)
            for sampler in zip(("tuned", "base"), (tuned, base), groups, strict=True)
        ]
        with progress_bar("matching", dataset.size, console) as advance:
            meetings = meet(*drawn, dataset.batches(advance))
        result["sampling"] = _write_meetings(run.path, meetings, ranking)
    label = sign * ranking[label_name] if label_name else None
    result |= _evaluate(run.path, config, tuning, ranking, dataset, label, console)
    result["property"] = ("-" if sign < 0 else "") + label_name
    with atomic_file(run.path / RESULT) as temp:
        temp.write_text(json.dumps(_jsonable(result), indent=2) + "\n", encoding="utf-8")
    write_report(run)
    run.finish()
    show(run, console)
    return run


def _ranking(config: RetrieveConfig, implied: bool, critic: bool) -> str:
    """By what to rank: what was asked for, or the best that the model's file tells.

    Raises:
        UserError: it does not tell.
    """
    told = {"critic": critic, "reward": implied}
    if config.rank is None:
        return next((name for name, there in told.items() if there), "crystal")
    if not told.get(config.rank, True):
        raise UserError(f"rank {config.rank}: {config.run} holds none; tune again, or --rank crystal")
    return config.rank


def _complete(
    config: RetrieveConfig, root: str | Path, console: Console
) -> tuple[RetrieveConfig, FinetuneConfig, Extras]:
    """The settings with every default filled in, those of the fine-tuning run, and what its model's file tells."""
    run = config.run
    if not run:
        newest = newest_run("finetune", root, holding="model.safetensors")
        if newest is None:
            raise UserError(f"there is no fine-tuning run in {root}; tune a model (cfrl finetune) or give --run")
        run = str(newest.path)
        console.print(f"Tuned model: {run} (the newest fine-tuning run)", highlight=False)
    extras = load_extras(run)
    tuning = _tuning_settings(model_path(run), extras.header)
    base = config.base or extras.header.get("base_model", tuning.model)
    dataset = config.dataset
    if not dataset:
        dataset = load_extras(base).header.get("dataset", "")
        if not dataset or not at_hand(dataset):
            missing = f"{dataset}, which the base model was trained on, is not here" if dataset else "none was named"
            console.print(f"Dataset: {PROTOTYPES} ({missing})", highlight=False)
            dataset = PROTOTYPES
    return replace(config, run=run, base=base, dataset=dataset), tuning, extras


def _tuning_settings(model: Path, header: Mapping[str, str]) -> FinetuneConfig:
    """Those of the run folder that a tuned model lies in; of a model alone, what its header says of the sampler."""
    named = {name: header.get(name, "") for name in ("space_group", "elements")}
    return settings_beside(model) or FinetuneConfig(reward="", **named)


def _space_groups(tuning: FinetuneConfig) -> tuple[str, str]:
    """The space groups of the tuned and of the base model, as settings: the model file holds shares that were tuned."""
    return "" if tuning.learn_space_groups else tuning.space_group, tuning.space_group


def _draw(
    name: str,
    model: CrystalTransformer,
    space_group: str,
    options: SamplerOptions,
    config: RetrieveConfig,
    console: Console,
) -> CrystalBatch:
    """Samples as the fine-tuning run drew them, invalid ones included."""
    with progress_bar(f"sampling, {name}", config.samples, console) as advance:
        return sample(
            model,
            config.samples,
            space_group=space_group,
            elements=options.elements,
            max_atoms=options.max_atoms,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=config.seed,
            keep_invalid=True,
            progress=advance,
        )


def _label(wanted: str, reward: str, known: list[str]) -> tuple[str, int]:
    """Name of the column that says what is good, and +1 (high is good) or -1. ("", 1) where there is none.

    Raises:
        UserError: `wanted` is no column.
    """
    name, sign = wanted.lstrip("-"), -1 if wanted.startswith("-") else 1
    if name and name not in known:
        raise UserError(f"property '{name}': the dataset has no such column{nearest(name, known)}")
    if name:
        return name, sign
    words = re.findall(r"[a-z_]\w*", reward.lower())
    if "ehull" in words and "e_above_hull" in known:
        return "e_above_hull", -1
    return next((word for word in words if word in known), ""), 1


def _evaluate(
    folder: Path,
    config: RetrieveConfig,
    tuning: FinetuneConfig,
    ranking: Columns,
    dataset: Dataset,
    label: np.ndarray | None,
    console: Console,
) -> dict[str, Any]:
    """Figures of merit. Here, after the ranking is made and written, labels are looked at for the first time."""
    usable = ranking["rank"] > 0
    if label is not None:
        usable &= np.isfinite(label)
    random = np.random.default_rng(config.seed)
    rows = np.sort(random.permutation(np.flatnonzero(usable))[:MAX_JUDGED])
    some = np.sort(random.permutation(len(rows))[: config.reward_crystals if tuning.reward else 0])
    ratio, group = ranking[RANKINGS[config.rank]][rows], ranking["space_group"][rows]
    reward = np.full(len(rows), np.nan)
    if len(some):
        reward[some] = _rewards(tuning, dataset.pick(rows[some]), config.device, console)
    figures: dict[str, Any] = {"correlation": rank_correlation(ratio[some], reward[some], group[some])}
    table = {"id": ranking["id"][rows[some]], "ratio": ratio[some], "reward": reward[some]}
    write_csv(folder / "rewards.csv", table)
    if label is None or len(rows) < MIN_JUDGED:
        return figures
    good, composition = is_good(label[rows]), fractions(dataset.pick(rows))[0]
    rankings = {
        RANKED[config.rank]: ratio,
        **{name: ranking[RANKINGS[by]][rows] for by, name in RANKED.items() if RANKINGS[by] in ranking and by in OWN},
        "random": np.zeros(len(rows)),
        "base model's likelihood": ranking["log_prob_base"][rows],
    }
    seeds = _best_rollouts(Path(config.run))
    if len(seeds):
        rankings["composition near best rollouts"] = composition_neighbours(composition, seeds, None)
    rankings["composition neighbours' labels"] = composition_neighbours(composition, composition, label[rows])
    verdicts = [rate_ranking(name, scores, good) for name, scores in rankings.items() if 0 < good.sum() < len(good)]
    scored = np.isfinite(reward)
    if 0 < good[scored].sum() < scored.sum():
        part = "" if scored.all() else " (the same part)"
        verdicts.append(rate_ranking(f"reward model{part}", reward[scored], good[scored]))
        if part:
            verdicts.append(rate_ranking(f"{RANKED[config.rank]}{part}", ratio[scored], good[scored]))
    return figures | {"verdicts": [asdict(verdict) for verdict in verdicts]}


def _rewards(tuning: FinetuneConfig, crystals: CrystalBatch, device: str, console: Console) -> np.ndarray:
    """What the run was rewarded for, on crystals that it may never have drawn; (n,), NaN where it cannot be scored."""
    reward = configured_reward(replace(tuning, allow="all"), choose_device(device))  # known they all are
    total = []
    with progress_bar("reward on the dataset", len(crystals), console) as advance:
        for start in range(0, len(crystals), 128):
            total.append(np.asarray(reward(crystals[start : start + 128]).total, dtype=np.float64))
            advance(min(start + 128, len(crystals)))
    return np.concatenate(total) if total else np.zeros(0)


def _best_rollouts(run: Path, share: float = 0.05, limit: int = 1000) -> np.ndarray:
    """Compositions (m, 119) of the best crystals that the run drew; none where it kept no rollouts."""
    path = run / "rollouts.h5"
    if not path.is_file():
        return np.zeros((0, 119))
    rollouts = read_crystals(path)
    order = descending(rollouts.properties["reward"].numpy())
    return np.unique(fractions(rollouts[order[: min(limit, max(1, int(share * len(order))))]])[0], axis=0)


def _write_ranking(folder: Path, ranking: Columns, best: CrystalBatch, by: str) -> None:
    """ranking.h5: every crystal, in the order of the dataset; retrieved.h5 and retrieved.csv: the first ones."""
    with atomic_file(folder / "ranking.h5") as temp, h5py.File(temp, "w") as file:
        file.attrs.update(format="cfrl-ranking", schema_version=1, ranked_by=by, **provenance())
        for name, values in ranking.items():
            text = {"dtype": h5py.string_dtype("utf-8")} if values.dtype == object else {}
            file.create_dataset(name.replace("/", "."), data=values, compression="gzip", shuffle=not text, **text)
    first = np.argsort(np.where(ranking["rank"] > 0, ranking["rank"], len(ranking["rank"]) + 1))[: len(best)]
    columns = {name: ranking[name][first] for name in ranking if name not in ("id", *COUNTS)}
    write_crystals(folder / "retrieved.h5", replace(best, properties={}), columns=columns)
    table = {
        "rank": columns.pop("rank"),
        "id": ranking["id"][first],
        "formula": np.array(best.formulas(), dtype=object),
    }
    write_csv(folder / "retrieved.csv", table | {name: ranking[name][first] for name in COUNTS} | columns)


def _write_meetings(folder: Path, meetings: Meetings, ranking: Columns) -> dict[str, Any]:
    """met.csv: materials, and how often each model drew them; discovery.csv: distinct ones against draws."""
    counts = meetings.counts()
    rows = counts.pop("row")
    table = {
        "id": ranking["id"][rows],
        **counts,
        "rank": ranking["rank"][rows],
        "log_ratio": ranking["log_ratio"][rows],
    }
    write_csv(folder / "met.csv", table)
    curves = {name: discovery_curve(getattr(meetings, name)) for name in ("tuned", "base")}
    write_csv(folder / "discovery.csv", {"draws": np.arange(1, len(meetings.tuned) + 1), **curves})
    met = {name: getattr(meetings, name) for name in ("tuned", "base")}
    return {
        "draws": len(meetings.tuned),
        "draws_that_meet": {name: int((rows >= 0).sum()) for name, rows in met.items()},
        "materials_met": {name: len(np.unique(rows[rows >= 0])) for name, rows in met.items()},
        "log_ratio_of_met": {name: _mean(ranking["log_ratio"][rows[rows >= 0]]) for name, rows in met.items()},
    }


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if np.isfinite(values).any() else np.nan


def _jsonable(value: Any) -> Any:
    """Plain values for JSON, which knows no NaN."""
    if isinstance(value, dict):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_jsonable(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def show(run: RunFolder, console: Console) -> None:
    """The results in short: did it find what was asked for, the first crystals, what sampling met, where all is."""
    from rich.table import Table

    from cfrl.reports.retrieve import verdict

    result = json.loads((run.path / RESULT).read_text(encoding="utf-8"))
    told, right = verdict(result)
    console.print(told, style="bold", highlight=False)
    if right is False:
        console.print(f"Remedy: more steps with the same reward (cfrl finetune --resume {result['tuned']} --steps N).")
    first = read_csv(run.path / "retrieved.csv")
    shown = ["rank", "id", "formula", *COUNTS, result["ranked_by"]]
    shown += [name for name in [result["property"].lstrip("-")] if name]
    title = f"first of {result['scored']:,} crystals of {result['dataset']}, by {result['ranked_by']}"
    table = Table(*shown, title=title, title_justify="left")
    for row in zip(*(first[name][:10] for name in shown), strict=True):
        table.add_row(*map(as_text, row))
    console.print(table)
    if beyond := result["crystals"] - result["scored"]:
        console.print(f"{beyond:,} crystals are not ranked: the run's sampler cannot draw them", highlight=False)
    if sampling := result.get("sampling"):
        met, hits = sampling["materials_met"], sampling["draws_that_meet"]
        console.print(
            f"Of {sampling['draws']:,} draws of each model, {hits['tuned']:,} (tuned) and {hits['base']:,} (base) are "
            f"known crystals: {met['tuned']:,} and {met['base']:,} different ones",
            highlight=False,
        )
    correlation = result["correlation"]
    if correlation["crystals"]:
        all_, within = (_text(correlation[name]) for name in ("all", "within"))
        console.print(
            f"Rank correlation with the reward on {correlation['crystals']:,} crystals: {all_}; "
            f"within space groups: {within}",
            highlight=False,
        )
    if verdicts := result.get("verdicts"):
        cuts = [k for k in ("10", "100", "1000") if all(k in v["enrichment"] for v in verdicts)]
        head = ["crystals", *(f"at {k}" for k in cuts), "ROC AUC"]
        title = f"times random in finding the top {GOOD_SHARE:.0%} of {result['property']}, among the first k"
        table = Table("ranking", title=title, title_justify="left")
        for name in head:
            table.add_column(name, justify="right", no_wrap=True)
        for verdict in verdicts:
            enrichment = (_text(verdict["enrichment"][k]) for k in cuts)
            table.add_row(verdict["name"], f"{verdict['crystals']:,}", *enrichment, _text(verdict["auc"]))
        console.print(table)
    for name in ("report.html", "retrieved.csv", "retrieved.h5", "ranking.h5"):
        console.print(f"Written: {run.path / name}", highlight=False, soft_wrap=True)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
