"""Every setting of every command: dataclasses <- cfrl.toml <- flags.

A command's settings are one dataclass whose fields carry their help text and, in their type, their range. From it
come the command-line flags (`cli.py`), the commented `cfrl.toml` at the project root (`python -m cfrl.config >
cfrl.toml`) and the `config.toml` of a run folder. No other module checks a setting on its own. This file imports
nothing heavy, so that `cfrl --help` is quick.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from cfrl.errors import UserError, nearest
from cfrl.io.options import ImportOptions
from cfrl.model.options import CellWishes, TrainingOptions, Wishes
from cfrl.rl.options import SteeringOptions, TuningOptions
from cfrl.runs.options import EngineOptions
from cfrl.screening.options import GrowthOptions, ProtocolOptions, ScreeningOptions
from cfrl.settings import (
    DEVICES,
    POTENTIAL_HELP,
    POTENTIALS,
    RUNS,
    Count,
    CountOrZero,
    Distance,
    Minutes,
    PositiveFraction,
    Range,
    Seconds,
    Seed,
    Settings,
    Temperature,
    Workers,
    build,
    option,
    to_toml,
)
from cfrl.untrusted import read_toml

T = TypeVar("T")
USER_FILE = "cfrl.toml"

# What the shell's Tab key offers. The modules that own these names check them; so does tests/test_completion.py.
DATASETS = ("prototypes", "structure-types", "grown", "mp-20", "alex-20", "mpts-52", "perov-5", "carbon-24")
NO_TYPES = "none"
EMBEDDED = ("default", "small", "stable")
REFUSED = ("known", "element", "noble_gas", "not_neutral", "radioactive")
REWARDS = (
    "ehull",
    "sun",
    "force",
    "band_gap",
    "dielectric",
    "dielectric_bandgap",
    "bulk_modulus",
    "in_range",
    "density",
    "volume_per_atom",
    "contact",
    "novelty",
    "hhi",
    "cost",
    "charge_neutral",
)
PREDICTED = ("band_gap", "eps_electronic", "eps_total", "bulk_modulus")
FLAGS = ("far_below_hull", "sparse_reference", "noble_gas", "radioactive", "element", "not_neutral", "exploded")


@dataclass(frozen=True)
class PretrainInputs(Settings):
    """What training starts from."""

    dataset: str = option(
        "prototypes",
        "An .h5 of `cfrl data import`, a fetched name (mp-20, ...), or `prototypes`; or several: `real.h5,grown.h5`.",
        choices=DATASETS,
    )
    weights: str | None = option(
        None,
        "How often an epoch shows the crystals of each dataset, on average, e.g. `1,0.5`; empty: once each.",
        unset="",
    )
    init: str | None = option(
        None,
        "Start from these: a weights file, a run folder, `last`, `default`, `small`, `stable`; empty: random ones.",
        choices=(*EMBEDDED, "last", RUNS),
        unset="",
    )


@dataclass(frozen=True)
class PretrainConfig(TrainingOptions, PretrainInputs):
    """Train the transformer on a dataset of crystals."""

    THEMES: ClassVar = {
        "How the model learns": (
            *("lr_final", "warmup", "weight_decay", "clip", "dropout", "ema", "augment", "exchange", "precision"),
        ),
        "When it ends, what is kept": ("keep", "patience", "validate_every", "checkpoint_minutes"),
    }

    device: str = option("auto", "auto (CUDA if there is one), cpu, cuda, cuda:1, ...", choices=DEVICES)


@dataclass(frozen=True)
class ScoringInputs(Settings):
    """What a reward works with."""

    potential: str = option("chgnet", POTENTIAL_HELP, choices=POTENTIALS)
    hull: str | None = option(None, "Reference hull: .h5, .csv or .json of entries; empty: the embedded one.", unset="")
    caution: Annotated[float, Range(0, 100)] | None = option(
        None,
        "Subtract so many spreads: of a predictor's ensemble, and of what ehull's reference may lack; "
        "negative: the reward's own number.",
        unset=-1.0,
    )
    relax_steps: CountOrZero | None = option(
        None,
        "Evaluations by which each crystal is relaxed, its symmetry kept, before it is scored; 0: as it was drawn; "
        "negative: 4 where the reward asks for the hull, 8 where for a property, else 0.",
        unset=-1,
    )
    reward_timeout: Seconds | None = option(
        600.0, "Seconds that one call of a reward of your own may take; then the run ends; 0: for ever.", unset=0.0
    )


@dataclass(frozen=True)
class ModelInput(Settings):
    """Which model draws."""

    model: str | None = option(
        None,
        "A weights file, a run folder, `last` (the newest run), or an embedded one: `default`, `small` (quicker, "
        "further from real crystals), or `stable` (small, tuned by `sun`: most of its crystals are new and near the "
        "hull); empty: default.",
        choices=(*EMBEDDED, "last", RUNS),
        unset="",
    )


@dataclass(frozen=True)
class SampleInputs(ModelInput):
    """How many crystals, and of which model."""

    n: CountOrZero = option(100, "Number of crystals.", flags=("-n",))


@dataclass(frozen=True)
class DrawInputs(Wishes, SampleInputs):
    """How they are drawn."""

    temperature: Temperature = option(1.0, "Below 1: likelier crystals; above 1: more varied; 1: as trained.")
    top_p: PositiveFraction = option(
        1.0, "Nucleus sampling: keep the likeliest choices up to this total probability; 1: all."
    )
    refuse: str = option(
        "auto",
        f"Draw anew what is of {', '.join(REFUSED)}; or `all`, `none`; auto: what a model was tuned to leave out.",
        choices=("auto", "all", "none", *REFUSED),
    )
    known: str | None = option(
        None,
        "Crystals whose formulas --refuse known means: a name or a file; empty: the tuning's, or the training's.",
        choices=DATASETS,
        unset="",
    )
    min_distance: Distance = option(0.5, "Angstrom; crystals with atoms closer than this are invalid.")
    min_contact: Annotated[float, Range(0, 2)] = option(
        0.0,
        "In sums of covalent radii: where atoms are nearer (no known crystal has them nearer than 0.7), positions and "
        "cell are drawn up to 4 times, which takes longer; 0: once. Not with --toward.",
    )
    keep_invalid: bool = option(
        False, "Keep invalid crystals; else positions and cell are drawn again, then letters and elements too."
    )
    draw_size: Count | None = option(
        None, "Crystals drawn at once; fewer need less memory; 0: 256 to 1024 on a CPU, 8192 on a GPU.", unset=0
    )
    seed: Seed = option(0, "Same seed and device: same crystals.")
    device: str = option("auto", "auto (CUDA if there is one), cpu, cuda, cuda:1, ...", choices=DEVICES)


@dataclass(frozen=True)
class SampleConfig(SteeringOptions, ScoringInputs, DrawInputs):
    """Generate crystals."""

    THEMES: ClassVar = {
        "What they should be": tuple(f.name for f in fields(Wishes)),
        "Towards a reward, without training": ("toward", "beta", "chains", "budget", "time_limit", "allow"),
        "What the reward works with": ("potential", "hull", "caution", "relax_steps", "reward_timeout"),
    }

    toward: str | None = option(
        None,
        "Steer towards high values of this reward, a name or formula of `cfrl rewards`, from `stable` where a property "
        "is sought among what lasts and no --model is named; empty: as the model draws.",
        choices=REWARDS,
        unset="",
    )


@dataclass(frozen=True)
class FinetuneInputs(Settings):
    """What tuning starts from, and what it is for."""

    reward: str = option("ehull", "What to maximise: a name or formula of `cfrl rewards`.", choices=REWARDS)
    model: str | None = option(
        None,
        "Model to tune: a weights file, a run folder, `last`, `default`, `small`, `stable` (embedded); empty: default, "
        "but stable where a property is sought among what lasts (the guard `unstable`).",
        choices=(*EMBEDDED, "last", RUNS),
        unset="",
    )
    rollouts: str | None = option(
        None, "dpo, rebel: learn from this rollouts.h5 and its rewards, not from samples; empty: sample.", unset=""
    )
    dataset: str | None = option(
        None,
        "Pre-training data: watch the validation loss on it, measure novelty against it, hold the model to it "
        "(--anchor); empty: none of that.",
        choices=DATASETS,
        unset="",
    )
    known: str | None = option(
        None,
        "Crystals that are no discovery: a dataset; empty: what the embedded model learnt from.",
        choices=DATASETS,
        unset="",
    )


@dataclass(frozen=True)
class ScoringWorkers(Settings):
    """Who asks the potential."""

    score_on: Literal["auto", "here", "local", "ray"] = option(
        "auto",
        "Where crystals are relaxed and the potential is asked: here (in this process), in worker processes of this "
        "machine (local), or on a Ray cluster, which may be larger than what learns; auto: local where one process has "
        "several CPU cores and hundreds of crystals to score, else here.",
    )
    score_workers: Workers | None = option(
        None, "How many of them; 0: one for each core on a CPU, one on a GPU.", unset=0
    )
    address: str | None = option(
        None, "Of the Ray cluster, e.g. `auto` or `host:6379`; empty: start one on this machine.", unset=""
    )


@dataclass(frozen=True)
class FinetuneConfig(ScoringWorkers, TuningOptions, ScoringInputs, FinetuneInputs):
    """Tune a model towards a reward."""

    THEMES: ClassVar = {
        "What the reward works with": ("potential", "hull", "dataset", "caution", "reward_timeout"),
        "Where it works": ("score_on", "score_workers", "address"),
        "Which crystals are drawn": (
            *(f.name for f in fields(Wishes)),
            *("temperature", "top_p", "min_distance", "group_size", "draw_size"),
            *("learn_space_groups", "space_group_lr", "space_group_floor"),
        ),
        "How the reward counts": (
            *("standardize", "scale_crystals", "penalty", "diversity", "diversity_window"),
            *("hold_strength", "known"),
            *("critic", "unscored", "replay", "replay_size", "replay_clip", "rollouts"),
        ),
        "How the policy moves": (
            *("batch_size", "micro_batch", "epochs", "lr_final", "warmup", "clip_gradient", "clip_ratio"),
            *("clip_advantage", "baseline_decay"),
            *("entropy_wyckoff", "entropy_species", "entropy_coords", "entropy_lattice"),
        ),
        "How far it may go": ("kl", "anchor", "target_kl", "max_kl", "max_step_kl"),
        "When it ends, what is kept": ("time_limit", "validate_every", "evaluate", "plots", "checkpoint_minutes"),
    }

    evaluate: CountOrZero = option(
        256, "Fresh crystals of the model before and after that are compared at the end; 0: none."
    )
    plots: bool = option(True, "Draw progress.png (and pareto.png) and write report.html at the end.")
    checkpoint_minutes: Minutes = option(1.0, "Minutes between checkpoints (one is also written at the end).")
    device: str = option("auto", "auto (CUDA if there is one), cpu, cuda, cuda:1, ...", choices=DEVICES)


@dataclass(frozen=True)
class DataConfig(ImportOptions):
    """Import, fetch and look into datasets."""

    sources: dict[str, Any] = option(
        {}, 'More datasets to fetch, e.g. mine = { url = "https://...", sha256 = "..." }; a list for several files.'
    )


@dataclass(frozen=True)
class HullConfig(EngineOptions):
    """Make a reference hull."""

    potential: str = option("chgnet", POTENTIAL_HELP, choices=POTENTIALS)
    near_hull: Annotated[float, Range(0, 10)] = option(0.05, "eV/atom; keep phases up to so far above the hull.")
    add: list[str] = option(
        [],
        "Results of calculations to put on the hull, a dataset of `cfrl data import`; may be given several times.",
        choices=DATASETS,
    )
    hull: str | None = option(
        None,
        "Without datasets: the reference that --add adds to (.h5, .csv, .json); empty: the embedded one.",
        unset="",
    )
    relax: bool = option(False, "Relax the crystals near the hull first (slow).")
    fill: str | None = option(
        None, "Another reference (.h5, .csv, .json), for compositions they lack; empty: none.", unset=""
    )
    device: str = option("auto", "auto (CUDA if there is one), cpu, cuda, cuda:1, ...", choices=DEVICES)


@dataclass(frozen=True)
class RetrieveConfig(Settings):
    """Find the known materials that a tuned model points at."""

    run: str | None = option(
        None,
        "Fine-tuning run or tuned weights; empty: the newest fine-tuning run under runs/.",
        choices=(RUNS,),
        unset="",
    )
    base: str | None = option(
        None,
        "Model before tuning: weights or a run folder; empty: the one that the run started from.",
        choices=(*EMBEDDED, RUNS),
        unset="",
    )
    dataset: str | None = option(
        None,
        "Known materials; empty: what the base model was trained on, else `prototypes`.",
        choices=DATASETS,
        unset="",
    )
    split: Literal["train", "validation", "test"] | None = option(
        None, "Only this split of the dataset: train, validation or test; empty: all.", unset=""
    )
    top: Count = option(100, "Crystals in the tables, best first.")
    rank: Literal["critic", "reward", "crystal", "site", "joint"] | None = option(
        None,
        "By the word of the critic that the model was tuned by (critic), the reward that the model implies (reward), "
        "or the likelihood ratio of the crystal (crystal), per site (site), or with its space group (joint); empty: "
        "the first of these that the model's file tells.",
        unset="",
    )
    samples: CountOrZero = option(
        1000, "Crystals drawn from each model to see which known materials they meet; 0: none."
    )
    property: str | None = option(
        None,
        "Column that tells what is good, to judge the ranking (-NAME: low is good); empty: by the run's reward.",
        unset="",
    )
    reward_crystals: CountOrZero = option(1000, "Crystals of the dataset scored with the run's own reward; 0: none.")
    seed: Seed = option(0, "Seed of the samples, and of the crystals that are scored and judged.")
    device: str = option("auto", "auto (CUDA if there is one), cpu, cuda, cuda:1, ...", choices=DEVICES)


@dataclass(frozen=True)
class ScreenInputs(Settings):
    """What crystals are held against."""

    known: list[str] = option(
        [],
        "A dataset or file of known crystals, for the novelty; may be given several times; none: no novelty. "
        "A CSV with a column `formula` and no structures tells only which formulas are new.",
        choices=DATASETS,
    )
    hull: str | None = option(None, "Reference hull: .h5, .csv or .json of entries; empty: the embedded one.", unset="")
    properties: str | None = option(
        None,
        "Predict these properties, e.g. `band_gap,bulk_modulus`, or `all`; empty: none.",
        choices=("all", *PREDICTED),
        unset="",
    )


@dataclass(frozen=True)
class ScreenDraws(Settings):
    """Crystals of a model in place of a file."""

    model: str | None = option(
        None,
        "Screen what this draws: a weights file, a run folder, `last` (the newest run) or `default`; empty: a file.",
        choices=("last", "default", RUNS),
        unset="",
    )
    n: Count = option(1000, "Crystals drawn from --model.", flags=("-n",))
    seed: Seed = option(0, "Of the draws; same seed and device: same crystals.")


@dataclass(frozen=True)
class ScreenConfig(EngineOptions, ProtocolOptions, ScreeningOptions, ScreenInputs, ScreenDraws):
    """Find the crystals that deserve a DFT calculation."""

    THEMES: ClassVar = {
        "Crystals of a model, in place of a file": ("model", "n", "seed"),
        "The field's protocol": ("protocol", "protocol_data", "submission", "submit"),
        "Stages": ("validity", "unique", "relax", "stability"),
        "What is valid": ("min_distance", "max_density", "symprec"),
        "Relaxation": ("free", "fmax", "steps"),
        "Second opinion": ("judge", "judge_steps", "need_both"),
        "Stiffness and phonons": ("elastic", "phonons", "supercell", "phonon_tolerance", "follow"),
        "What is written": ("top", "report", "pseudos", "describe"),
        "Where it runs": ("workers", "chunk", "engine", "address", "device"),
    }

    allow: str | None = option(
        None, "Flags that hold no candidate back, e.g. `noble_gas,element`; empty: all do.", choices=FLAGS, unset=""
    )
    rank: str | None = option(
        None,
        "Smallest first: a column of table.csv or an expression of columns, e.g. `-band_gap` for the largest gap; "
        "empty: `-reward` where a tuned --model tells its reward, else `ehull`.",
        unset="",
    )
    filter: str | None = option(
        None,
        "Candidates must satisfy this, e.g. `ehull < 0.05 and band_gap > 3` (eV/atom, eV); empty: no condition.",
        unset="",
    )
    top: CountOrZero = option(100, "Candidates written as CIF files, at most.")
    report: bool = option(True, "Write report.html and plots.")
    dft: Literal["pbe", "scan", "dielectric", "qe", "atomate2"] | None = option(
        None,
        "Also write inputs for the candidates: VASP `pbe` (MPRelaxSet), `scan` (r2SCAN) or `dielectric` (pbe, then "
        "DFPT), Quantum ESPRESSO (`qe`), or a flow of `atomate2`; empty: none.",
        unset="",
    )
    pseudos: str | None = option(
        None,
        "For --dft qe: the JSON table of an SSSP library, with file names and cutoffs; empty: ELEMENT.upf.",
        unset="",
    )


@dataclass(frozen=True)
class PredictConfig(EngineOptions, CellWishes, ModelInput):
    """Predict the structure of a formula."""

    THEMES: ClassVar = {
        "Which cells": tuple(f.name for f in fields(CellWishes)),
        "Relaxation": ("potential", "fmax", "steps"),
        "Where it runs": ("device", "workers", "engine", "address"),
    }

    n: Count = option(100, "Candidates: drawn, relaxed, ranked.", flags=("-n",))
    types: str | None = option(
        None,
        "Crystals in whose structure types the formula is tried too; empty: those that the embedded model learnt from; "
        "`none`: draws alone.",
        choices=(NO_TYPES, *DATASETS),
        unset="",
    )
    known: list[str] = option(
        [], "Known crystals, to say which of the candidates are known; may be given several times.", choices=DATASETS
    )
    hull: str | None = option(None, "Reference hull: .h5, .csv or .json of entries; empty: the embedded one.", unset="")
    potential: str = option("chgnet", POTENTIAL_HELP, choices=POTENTIALS)
    fmax: Annotated[float, Range(0, 10, open_below=True)] = option(
        0.05, "eV/angstrom; the relaxation ends when all forces are smaller."
    )
    steps: Count = option(200, "Steps of the relaxation at most; what is not relaxed by then is marked so.")
    seed: Seed = option(0, "Same seed and device: same candidates.")
    device: str = option("auto", "auto (CUDA if there is one), cpu, cuda, cuda:1, ...", choices=DEVICES)


@dataclass(frozen=True)
class GrowInputs(Settings):
    """What a dataset grows from."""

    model: str | None = option(
        None,
        "Draw from this: a weights file, a run folder, `last`, `default`, `small`, `stable`; empty: default.",
        choices=(*EMBEDDED, "last", RUNS),
        unset="",
    )
    known: list[str] = option(
        [],
        "Known crystals, whose shares of kinds are the real ones; may be given several times; none: the formulas that "
        "the embedded model learnt from.",
        choices=DATASETS,
    )
    prototypes: str | None = option(
        None,
        "Crystals whose elements are exchanged; empty: the known ones; where none are given, `structure-types`.",
        choices=DATASETS,
        unset="",
    )
    hull: str | None = option(None, "Reference hull: .h5, .csv or .json of entries; empty: the embedded one.", unset="")
    round: Count | None = option(
        None, "Number noted with each crystal; 0: one more than the last of the output.", unset=0
    )


@dataclass(frozen=True)
class GrowConfig(EngineOptions, GrowthOptions, GrowInputs):
    """Make a dataset larger by crystals of the program's own."""

    THEMES: ClassVar = {
        "Candidates": ("substitute", "balance", "temperature", "max_atoms", "elements", "require", "exclude"),
        "What is kept": ("new", "within", "allow", "symprec"),
        "Relaxation": ("potential", "fmax", "steps", "give_up"),
        "Where it runs": ("lot", "lots", "workers", "engine", "address", "device"),
    }

    allow: str | None = option(
        None, "Flags that keep no crystal out, e.g. `noble_gas,element`; empty: all do.", choices=FLAGS, unset=""
    )


@dataclass(frozen=True)
class PredictorConfig(Settings):
    """Train a property predictor."""

    target: str | None = option(None, "Column to learn; must be given.", unset="")
    log: bool = option(False, "Learn log10 of it: for positive quantities that range over decades.")
    zero: Annotated[float, Range(0, 10**6)] | None = option(
        None,
        "Values below are a class of their own (metals among band gaps: 0.05); negative: no such class.",
        unset=-1.0,
    )
    unit: str = option("", "Unit of the column, e.g. `eV`, kept in the file.")
    correct: Literal["band_gap", "eps_electronic", "eps_total", "bulk_modulus"] | None = option(
        None,
        "Learn what this embedded predictor errs by, and predict the sum: for few results of another method; empty: "
        "learn the column itself.",
        unset="",
    )
    members: Annotated[int, Range(1, 1000)] = option(5, "Networks in the ensemble.")
    folds: Annotated[int, Range(2, 1000)] = option(
        5, "Folds of each cross-validation: by formula, by prototype, by cluster of descriptors."
    )
    hidden: Annotated[int, Range(1, 10**5)] = option(128, "Width of the networks.")
    epochs: Count = option(60, "Passes over the data.")
    batch_size: Count = option(64, "Crystals per optimiser step.")
    potential: str = option(
        "chgnet",
        "Whose features are learnt from: chgnet, chgnet:0.2.0, mace:NAME or mace:PATH.model.",
        choices=POTENTIALS,
    )
    device: str = option(
        "auto", "Where the potential runs: auto (CUDA if there is one), cpu, cuda, ...", choices=DEVICES
    )
    seed: Seed = option(0, "Seed of folds, weights and data order.")


SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "hull": HullConfig,
    "grow": GrowConfig,
    "pretrain": PretrainConfig,
    "sample": SampleConfig,
    "finetune": FinetuneConfig,
    "retrieve": RetrieveConfig,
    "screen": ScreenConfig,
    "predict": PredictConfig,
    "predictor": PredictorConfig,
}


def resolve(cls: type[T], flags: Mapping[str, Any] | None = None, file: Path | None = None) -> T:
    """Settings of one command: the dataclass's defaults, then `cfrl.toml`, then flags.

    Args:
        cls: one of `SECTIONS`.
        flags: values given explicitly; they win.
        file: a TOML file; default: `cfrl.toml` of the working folder where there is one.

    Raises:
        UserError: unreadable file, unknown section or key, value of the wrong type or out of range.
    """
    path, flags = Path(USER_FILE) if file is None else Path(file), flags or {}
    values: dict[str, Any] = {}
    if file is not None or path.is_file():
        name = next(name for name, section in SECTIONS.items() if section is cls)
        values = _renamed(name, _section(path, name))
    settings = build(cls, {key: value for key, value in values.items() if key not in flags}, source=f"{path}: ")
    return build(cls, {**vars(settings), **flags})


# Names that settings had before version 0.2, by section. In [finetune] `batch_size` has another meaning since.
_OLD = {
    "sample": {"batch_size": "draw_size"},
    "finetune": {"batch_size": "n", "minibatch": "batch_size", "sample_batch": "draw_size"},
}


def _renamed(section: str, values: dict[str, Any]) -> dict[str, Any]:
    """With today's names, where the section is one of an older version."""
    old = _OLD.get(section, {})
    if section == "finetune" and not {"minibatch", "sample_batch"} & set(values):
        return values
    return {old.get(name, name): value for name, value in values.items()}


def reward_definitions(file: Path | None = None) -> dict[str, dict[str, Any]]:
    """The tables `[rewards.NAME]` of `cfrl.toml`: an `expression` and the numbers that it names.

    Raises:
        UserError: unreadable file, or a table without an expression or with anything but numbers beside it.
    """
    path = Path(USER_FILE) if file is None else Path(file)
    if not path.is_file():
        return {}
    definitions = _section(path, "rewards")
    for name, table in definitions.items():
        if not isinstance(table, dict) or not isinstance(table.get("expression"), str):
            raise UserError(f'{path}: [rewards.{name}] needs a line like expression = "band_gap - 2*ehull"')
        for key, value in table.items():
            if key != "expression" and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise UserError(f"{path}: [rewards.{name}] {key} = {value!r} should be a number")
    return definitions


def read_run_config(cls: type[T], path: Path, flags: Mapping[str, Any] | None = None) -> T:
    """The settings that a run folder's `config.toml` holds, and flags that win over them.

    Raises:
        UserError: it cannot be read, or is of another command's run.
    """
    name = next(name for name, section in SECTIONS.items() if section is cls)
    if path.is_file() and name not in read_toml(path):
        raise UserError(f"{path}: not the settings of a {name} run: it has no section [{name}]")
    return resolve(cls, flags, path)


def _section(path: Path, name: str) -> dict[str, Any]:
    document = read_toml(path)
    for key in document:
        if key not in SECTIONS and key != "rewards":
            raise UserError(f"{path}: unknown section [{key}]{nearest(key, SECTIONS)}")
    if not isinstance(document.get(name, {}), dict):
        raise UserError(f"{path}: {name} = {reprlib.repr(document[name])} should be a section [{name}]")
    return document.get(name, {})


HEADER = """\
# Every default of cfrl. Generated by `python -m cfrl.config > cfrl.toml`; do not edit this copy by hand.
# A cfrl.toml in the folder where cfrl runs overrides these values; a flag of the command overrides both.
# You need only write down what you change.

"""

if __name__ == "__main__":
    defaults = {name: cls() for name, cls in SECTIONS.items()}
    print(HEADER + to_toml(defaults, comments=True), end="")
