"""The command line: parse, call, print. What a command does lives in the module of its name.

The flags of a command are the fields of its dataclass in `config.py`, plus the few parameters written here.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin, get_type_hints

import typer

from cfrl import __version__, config, files
from cfrl.commands.streams import patient_streams
from cfrl.errors import UserError
from cfrl.settings import POTENTIALS, RUNS, choices, set_kind

HELP = """Crystals with wanted properties: a crystal-generating transformer, tuned by reinforcement learning.

Work goes pretrain -> sample -> finetune -> sample -> screen -> retrieve; the embedded model lets you start
anywhere. Settings: defaults, then cfrl.toml of the working folder, then flags. Results go to a new folder under
runs/; Ctrl-C stops a run, `--resume last` goes on with it.

Example: cfrl finetune --reward dielectric_bandgap && cfrl sample -n 1000 --model last && cfrl retrieve
"""

_LONGEST = 1000  # characters of an error's line
app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)
# The five commands stand first in the help, in the order of the work; the others follow.
COMMANDS = "Commands, in the order of the work"
OTHERS = "Beside them"
DATA_HELP = """Datasets: import, fetch, look into, grow; reference hulls.

Example: cfrl data import mp_20.csv.gz -o mp_20.h5
"""
MODEL_HELP = """Model files: look into, import published weights, pack to share.

Example: cfrl model info
"""
REWARDS_HELP = """Rewards: list them (no argument), with units and how to combine them; train a predictor to make one.

Example: cfrl rewards
"""
POTENTIALS_HELP = """Potentials that need an environment of their own: add, list, remove.

Example: cfrl potentials add sevennet
"""
data_app = typer.Typer(help=DATA_HELP, no_args_is_help=True)
model_app = typer.Typer(help=MODEL_HELP, no_args_is_help=True)
potentials_app = typer.Typer(help=POTENTIALS_HELP, no_args_is_help=True)
rewards_app = typer.Typer(help=REWARDS_HELP, invoke_without_command=True)


def _offer(*choices: str) -> Callable[[str], list[str]] | None:
    """What the Tab key asks; where nothing fits, the shell goes on to file names."""

    def offer(incomplete: str) -> list[str]:
        words = [word for choice in choices for word in (_runs() if choice == RUNS else [choice])]
        return [word for word in words if word.startswith(incomplete)]

    return offer if choices else None


def _runs() -> list[str]:
    """Run folders, newest first."""
    return sorted((str(path.parent) for path in Path("runs").glob("*/config.toml")), reverse=True)


Resume = Annotated[
    str | None,
    typer.Option(
        help="Go on with this run folder (`last`: the newest), exactly where it stopped; flags change settings.",
        autocompletion=_offer("last", RUNS),
    ),
]
Trust = Annotated[bool, typer.Option("--trust", help="Run code that the settings of a run folder name as its reward.")]


def configured(cls: type) -> Callable[[Callable], Callable]:
    """Give a command one flag per field of the dataclass `cls`, passed on as `config`."""

    def wrap(command: Callable) -> Callable:
        own = [p for name, p in inspect.signature(command, eval_str=True).parameters.items() if name != "config"]
        kinds = get_type_hints(cls)
        flagged = [f for f in fields(cls) if get_origin(kinds[f.name]) is not dict]  # tables are for cfrl.toml alone
        panels = {name: theme for theme, names in cls.THEMES.items() for name in names}
        generated = [_flag(f, kinds[f.name], panels.get(f.name)) for f in flagged]
        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        parameters = [context, *own, *generated]

        @functools.wraps(command)
        def call(ctx: typer.Context, **values: Any) -> Any:
            settings = {f.name: values.pop(f.name) for f in flagged}
            given = {k: v for k, v in settings.items() if ctx.get_parameter_source(k).name == "COMMANDLINE"}
            if not values.get("resume"):
                return command(config=config.resolve(cls, given), **values)
            values["resume"] = _run_to_resume(values["resume"], command.__name__)
            if "reward" in given:  # named by the user, not by the run
                values["trust"] = True
            file = Path(values["resume"]) / "config.toml"  # the run brings its own settings; flags still win
            return command(config=config.read_run_config(cls, file, given), **values)

        call.__signature__ = inspect.Signature(parameters)
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        return call

    return wrap


def _run_to_resume(run: str, command: str) -> str:
    from cfrl.runs.folder import RunFolder, newest_run

    if run != "last":
        return str(RunFolder.open(run).path)
    newest = newest_run(command)
    if newest is None:
        raise UserError(f"there is no {command} run under runs/ to go on with")
    print(f"Going on with {newest.path}")
    return str(newest.path)


def _flag(f: Field, kind: Any, panel: str | None) -> inspect.Parameter:
    """A field as a parameter of the command. Its range is checked by the dataclass, for files and flags alike."""
    offered = choices(kind) or f.metadata["choices"]
    kind = str if choices(kind) else set_kind(kind)
    name = f"--{f.name.replace('_', '-')}"
    names = [f"{name}/--no-{name[2:]}" if kind is bool else name, *f.metadata["flags"]]
    default = f.default_factory() if callable(f.default_factory) else f.default
    option = typer.Option(*names, help=f.metadata["help"], autocompletion=_offer(*offered), rich_help_panel=panel)
    return inspect.Parameter(
        f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
    )


def _show_version(value: bool) -> None:
    if value:
        print(f"cfrl {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (may stand anywhere).")] = False,
) -> None:
    os.environ.setdefault("MPLCONFIGDIR", str(files.cache_folder() / "matplotlib"))  # else it writes to the home folder


def main() -> None:
    """Entry point: errors become one line and a non-zero exit status; `--debug` shows the traceback."""
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    warnings.filterwarnings("ignore", message="No Pauling electronegativity")  # pymatgen's, about each noble gas
    try:
        with patient_streams():
            app()
    except Exception as error:
        if debug:
            raise
        sys.exit(_complain(error))


def _complain(error: Exception) -> int:
    """Print the one line; the exit status."""
    cause = files.system_error(error)
    if isinstance(error, UserError):
        message, status = str(error), 2
    elif cause is not None and cause.errno in files.DISK_FULL:
        message, status = files.write_problem(cause.filename or "output", cause), 2
    elif isinstance(error, OSError) and error.filename:
        message, status = f"{str(error.filename)[:200]}: cannot be used: {error.strerror}", 2
    else:
        message, status = f"{type(error).__name__}: {error} (this is a fault of cfrl; --debug shows where)", 1
    message = " ".join(message.split())
    if len(message) > _LONGEST:  # somebody's value is
        message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
    print(f"cfrl: error: {message}", file=sys.stderr)
    return status


def _console() -> Any:
    from rich.console import Console

    return Console()


@app.command(rich_help_panel=COMMANDS)
@configured(config.PretrainConfig)
def pretrain(
    config: config.PretrainConfig,
    resume: Resume = None,
) -> None:
    """Train the transformer on a dataset of crystals.

    Writes model.safetensors, metrics.csv and checkpoints to a new folder under runs/.

    Example: cfrl pretrain --dataset mp_20.h5 --epochs 50

    On several devices: torchrun --nproc-per-node 4 -m cfrl pretrain --dataset alex-20
    """
    from cfrl.commands.pretrain import pretrain as run

    run(config, Path(resume) if resume else None)


@app.command(rich_help_panel=COMMANDS)
@configured(config.SampleConfig)
def sample(
    config: config.SampleConfig,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            help="A .h5, .csv, .extxyz, .zip of CIFs, or a folder of CIFs; empty: crystals.h5 of a new run folder.",
        ),
    ] = None,
) -> None:
    """Generate crystals, by space group and elements if wanted.

    Example: cfrl sample -n 1000 --space-group 225 --elements Ba,Ti,O -o crystals.csv
    """
    from cfrl.commands.sample import run_sample

    run_sample(config, output, _console())


@app.command(rich_help_panel=COMMANDS)
@configured(config.FinetuneConfig)
def finetune(
    config: config.FinetuneConfig,
    resume: Resume = None,
    trust: Trust = False,
) -> None:
    """Tune a model towards a reward.

    Each step draws crystals, scores them and updates the model. Writes the tuned model, every crystal with its reward,
    metrics, plots and report.html to a new folder under runs/.

    Example: cfrl finetune --reward "dielectric_bandgap - 2*ehull" --steps 100
    """
    from cfrl.commands.finetune import finetune as run

    run(config, resume=resume, trust=trust)


@app.command(rich_help_panel=COMMANDS)
@configured(config.ScreenConfig)
def screen(
    config: config.ScreenConfig,
    source: Annotated[
        str | None, typer.Argument(help="Crystals: .h5, .csv with CIFs, .cif, .extxyz, .json, a folder, .zip.")
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            help="The run folder to make, or a .csv or .h5 to copy the table to; empty: a new folder under runs/.",
        ),
    ] = None,
    resume: Resume = None,
    trust: Trust = False,
) -> None:
    """Find the crystals that deserve a DFT calculation: valid, new, stable, with the properties wanted.

    Crystals of a file, or of --model. Writes table.csv, CIF files of the candidates and report.html to a new folder
    under runs/.

    Example: cfrl screen crystals.h5 --known mp_20.h5 --filter "ehull < 0.05"
    """
    from cfrl.commands.screen import screen as run

    run(source, config, output, Path(resume) if resume else None, _console(), trust)


@app.command(rich_help_panel=COMMANDS)
@configured(config.RetrieveConfig)
def retrieve(config: config.RetrieveConfig, trust: Trust = False) -> None:
    """Rank known materials by how much likelier tuning has made them; judge the ranking where labels are known.

    Writes the ranking, its figures and report.html to a new folder under runs/.

    Example: cfrl retrieve --dataset mp_20.h5 --property band_gap
    """
    from cfrl.commands.retrieve import retrieve as run

    run(config, _console(), trust=trust)


@app.command(rich_help_panel=OTHERS)
@configured(config.PredictConfig)
def predict(
    config: config.PredictConfig,
    formula: Annotated[str, typer.Argument(help="Such as LiMn2O4.")] = "",
    resume: Resume = None,
) -> None:
    """Predict the structure of a formula: make candidates, relax them, rank them by energy.

    Writes the distinct structures, lowest first, and how likely each is, to a new folder under runs/.

    Example: cfrl predict LiMn2O4 -n 100 --known mp_20.h5
    """
    from cfrl.commands.predict import predict as run

    run(formula, config, Path(resume) if resume else None, _console())


@app.command(rich_help_panel=OTHERS)
def report(
    run: Annotated[
        str | None,
        typer.Argument(
            help="A run folder; empty: the newest of finetune, screen and retrieve.", autocompletion=_offer(RUNS)
        ),
    ] = None,
) -> None:
    """Write report.html of a run once more (each run writes its own at the end).

    Example: cfrl report runs/20260131-142507-finetune-ehull
    """
    from cfrl.reports.report import newest_reportable, write_report

    write_report(run or newest_reportable(), _console())


@app.command(rich_help_panel=OTHERS)
def runs(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="None: list all runs; two: compare them.", autocompletion=_offer(RUNS)),
    ] = None,
) -> None:
    """List the runs under runs/ with reward, status and last figures; or compare two.

    Example: cfrl runs runs/20260131-142507-finetune-ehull runs/20260201-090000-finetune-ehull
    """
    from cfrl.commands.runs import show_runs

    show_runs(names or [], _console())


@app.command(rich_help_panel=OTHERS)
def convert(
    source: Annotated[str, typer.Argument(help="Crystals: .h5, .csv with CIFs, .cif, .extxyz, .json, a folder, .zip.")],
    output: Annotated[
        str, typer.Argument(help="A .cif (with symmetry), .vasp, .extxyz, .json, .csv, .h5, .zip of CIFs or a folder.")
    ],
    cell: Annotated[
        Literal["as-is", "conventional", "primitive"], typer.Option(help="The cell that is written.")
    ] = "as-is",
    symprec: Annotated[
        float, typer.Option(min=1e-6, max=1, help="Angstrom; how far atoms may be off the symmetry looked for.")
    ] = 0.01,
) -> None:
    """Write crystals in another format.

    Example: cfrl convert crystals.h5 crystals.extxyz --cell primitive
    """
    from cfrl.commands.convert import convert as run

    run(source, output, cell, symprec, _console())


@app.command(rich_help_panel=OTHERS)
def doctor() -> None:
    """Versions, devices, folders, and whether the embedded models open; says what is broken and how to mend it.

    Exit status 2 if anything that cfrl needs is broken. Example: cfrl doctor
    """
    from cfrl.commands.doctor import doctor as run

    run(_console())


@data_app.command("hull")
@configured(config.HullConfig)
def data_hull(
    config: config.HullConfig,
    output: Annotated[str, typer.Option("-o", "--output", help="The .h5 file to write.")],
    datasets: Annotated[
        list[str] | None, typer.Argument(help="Datasets whose crystals are the reference phases; none: only --add.")
    ] = None,
) -> None:
    """Make a reference hull of known crystals, with the energies of a potential; or add results of DFT to one.

    Stopped, it goes on when called again.

    Example: cfrl data hull mp_20.h5 elements.h5 -o hull.h5

    Results: cfrl data hull --add results.h5 --hull mp_energies.csv.gz -o mine.h5
    """
    from cfrl.commands.data_hull import build_hull

    build_hull(datasets or [], output, **vars(config), console=_console())


@data_app.command("grow")
@configured(config.GrowConfig)
def grow(
    config: config.GrowConfig,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", help="The .h5 file to add to, made where there is none; empty: the run's."),
    ] = None,
    resume: Resume = None,
) -> None:
    """Make a dataset larger by crystals of the program's own, relaxed and near the hull.

    Candidates are drawn from a model, or made of known crystals by exchanging elements. Runs for hours; stopped, it
    goes on with --resume last.

    Example: cfrl data grow -o grown.h5 --known mp_20.h5 --hull mp_energies.csv.gz -n 100000
    """
    from cfrl.commands.data_grow import grow as run

    run(output, config, Path(resume) if resume else None, _console())


@model_app.command("import")
def model_import(
    checkpoint: Annotated[str, typer.Argument(help="A published CrystalFormer checkpoint, epoch_*.pkl.")],
    output: Annotated[str, typer.Option("-o", "--output", help="The .safetensors file to write.")],
    dataset: Annotated[
        str | None, typer.Option(help="Take the shares of the space groups from this dataset; empty: all alike.")
    ] = None,
    num_heads: Annotated[int, typer.Option(min=0, max=999, help="Attention heads; 0: as published for its width.")] = 0,
    coord_components: Annotated[
        int, typer.Option(min=0, max=999, help="Mixture size of a coordinate; 0: as published.")
    ] = 0,
) -> None:
    """Read published JAX weights (no jax needed; the pickle is read by a restricted unpickler).

    Example: cfrl model import epoch_005500.pkl -o alex-20.safetensors
    """
    from cfrl.commands.model import run_import

    run_import(checkpoint, output, dataset, num_heads or None, coord_components or None, _console())


@model_app.command("pack")
def model_pack(
    model: Annotated[str, typer.Argument(help="A weights file or run folder.")],
    output: Annotated[str, typer.Option("-o", "--output", help="The .safetensors file to write.")],
    dataset: Annotated[
        str | None, typer.Option(help="What it was trained on, for the header; empty: the name of its dataset.")
    ] = None,
) -> None:
    """Write a trained model as it is shared: half the size (float16), no local paths in its header.

    Example: cfrl model pack runs/20260131-142507-pretrain-mp_20 -o mp_20.safetensors --dataset "MP-20, 2026"
    """
    from cfrl.commands.model import pack_model

    pack_model(model, output, dataset)


@model_app.command("info")
def model_info(
    model: Annotated[
        str | None, typer.Argument(help="A weights file or run folder; nothing: the embedded model.")
    ] = None,
) -> None:
    """Show sizes, training data and figures of a model file.

    Example: cfrl model info alex-20.safetensors
    """
    from cfrl.commands.model import describe_model

    _console().print(describe_model(model))


@data_app.command("import")
@configured(config.DataConfig)
def data_import(
    config: config.DataConfig,
    inputs: Annotated[
        list[str],
        typer.Argument(
            help="CSV, CIF, extxyz, POSCAR, JSON, vasprun.xml, OUTCAR, XML of pw.x, .traj, .db, zips, folders, .h5."
        ),
    ],
    output: Annotated[str, typer.Option("-o", "--output", help="The dataset to write, an .h5 file.")],
) -> None:
    """Make a dataset of structure files: symmetry, Wyckoff sites, splits; dropped rows go to a table beside it.

    Results of DFT come with energies (eV/atom), largest force, pressure, gap.

    Example: cfrl data import mp_20.csv.gz more_cifs/ -o mine.h5 --validation 0.05

    Results: cfrl data import runs/last/dft --corrections mp2020 -o results.h5
    """
    from cfrl.commands.data import run_import

    run_import(inputs, output, config, console=_console())


@data_app.command("fetch")
@configured(config.DataConfig)
def data_fetch(
    config: config.DataConfig,
    name: Annotated[str, typer.Argument(help="mp-20, alex-20, mpts-52, perov-5, carbon-24, or one of cfrl.toml.")],
) -> None:
    """Download a public dataset and prepare it; its name then works wherever a dataset is asked for.

    It is kept in the cache folder (`cfrl doctor` shows which). Example: cfrl data fetch mp-20
    """
    from cfrl.commands.data import run_fetch

    path = run_fetch(name, config, _console())
    print(f"'{name}' is ready ({path})")


@data_app.command("info")
def data_info(dataset: Annotated[str, typer.Argument(help="An .h5 file, a fetched name, or `prototypes`.")]) -> None:
    """Show what a dataset holds: crystals per split, columns, elements, space groups, where it came from.

    Example: cfrl data info prototypes
    """
    from cfrl.commands.data import run_info

    run_info(dataset, _console())


def _console() -> Any:
    from rich.console import Console

    return Console()


@potentials_app.command("add")
def potentials_add(
    name: Annotated[
        str,
        typer.Argument(
            help="sevennet, orb, mattersim, fairchem, nequip, matgl, grace, one of their models (sevennet:7net-0), or "
            "ase:package.module:factory; with @mp-raw or @mp2020 behind it where its energy scale is to be declared.",
            autocompletion=_offer(*POTENTIALS),
        ),
    ],
    python: Annotated[
        str | None,
        typer.Option(help="A Python that has the package already, e.g. of a conda environment; nothing is installed."),
    ] = None,
    share: Annotated[
        bool, typer.Option(help="Let the environment see the packages of this one, so that torch is not there twice.")
    ] = True,
    again: Annotated[bool, typer.Option("--again", help="Make the environment anew.")] = False,
    patience: Annotated[
        float, typer.Option(min=1, max=1e6, help="Seconds for a crystal, after which the potential counts as hung.")
    ] = 120.0,
    check: Annotated[int, typer.Option(min=0, max=10000, help="Known crystals to measure it on; 0: none.")] = 200,
    known: Annotated[str, typer.Option(help="Dataset of known crystals.", autocompletion=_offer("prototypes"))] = (
        "prototypes"
    ),
    hull: Annotated[
        str | None, typer.Option(help="Reference hull: .h5, .csv or .json of entries; empty: the embedded one.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu, cuda, cuda:1, ...")] = "auto",
) -> None:
    """Install a potential into an environment of its own, and measure it: units, distance of known crystals to the
    hull, speed.

    From then on its name works wherever a potential is named. Environments are kept in the cache folder (`cfrl doctor`
    shows which).

    Example: cfrl potentials add sevennet
    """
    from cfrl.commands.potentials import add

    add(
        name,
        _console(),
        python=python,
        share=share,
        again=again,
        patience=patience,
        check=check,
        known=known,
        hull=hull or None,
        device=device,
    )


@potentials_app.command("list")
def potentials_list() -> None:
    """Show every potential: training data, energy scale, licence; which are here, and what was measured.

    Example: cfrl potentials list
    """
    from cfrl.commands.potentials import show

    show(_console())


@potentials_app.command("remove")
def potentials_remove(
    name: Annotated[str, typer.Argument(help="As it was added.", autocompletion=_offer(*POTENTIALS))],
) -> None:
    """Delete the environment of a potential.

    Example: cfrl potentials remove sevennet
    """
    from cfrl.commands.potentials import remove

    remove(name, _console())


@rewards_app.callback()
def rewards(ctx: typer.Context) -> None:
    if ctx.invoked_subcommand is None:
        from rich.console import Console

        from cfrl.commands.rewards import show_rewards

        show_rewards(Console())


@rewards_app.command("train")
@configured(config.PredictorConfig)
def rewards_train(
    config: config.PredictorConfig,
    data: Annotated[list[str], typer.Argument(help="Crystals with the property as a column: CSV, .h5, extxyz, ...")],
    output: Annotated[str, typer.Option("-o", "--output", help="Predictor file, .safetensors.")],
) -> None:
    """Train a property predictor, with cross-validation; use it as `--reward property:FILE`.

    Example: cfrl rewards train dielectric.csv.gz --target eps_total --log -o eps.safetensors
    """
    from rich.console import Console

    from cfrl.commands.rewards_train import run_train

    run_train(data, output, config, Console())


GROUPS = (("data", data_app), ("model", model_app), ("potentials", potentials_app), ("rewards", rewards_app))
for name, group in GROUPS:
    app.add_typer(group, name=name, rich_help_panel=OTHERS)

if __name__ == "__main__":
    main()
