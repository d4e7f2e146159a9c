"""The command line: parse, call, print. What a command does lives in the module of its name.

The flags of a command are the fields of its dataclass in `config.py`, plus the few parameters written here.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Annotated, Any, get_type_hints

import typer

from cfrl import __version__, config
from cfrl.errors import UserError

HELP = """Crystals with wanted properties: a crystal-generating transformer, tuned by reinforcement learning.

Work goes pretrain -> sample -> finetune -> sample -> screen -> retrieve; the embedded model lets you start
anywhere.
Settings: defaults, then cfrl.toml of the working folder, then flags. Results go to a new
folder under runs/."""

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)
# The five commands stand first in the help, in the order of the work; groups follow.
data_app = typer.Typer(help="Datasets: import, fetch, look into.", no_args_is_help=True)
model_app = typer.Typer(help="Model files: import published weights, look into.", no_args_is_help=True)


def configured(cls: type) -> Callable[[Callable], Callable]:
    """Give a command one flag per field of the dataclass `cls`, passed on as `config`."""

    def wrap(command: Callable) -> Callable:
        own = [p for name, p in inspect.signature(command, eval_str=True).parameters.items() if name != "config"]
        generated = [_flag(f, get_type_hints(cls)[f.name]) for f in fields(cls)]
        context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
        parameters = [context, *own, *generated]

        @functools.wraps(command)
        def call(ctx: typer.Context, **values: Any) -> Any:
            settings = {f.name: values.pop(f.name) for f in fields(cls)}
            given = {k: v for k, v in settings.items() if ctx.get_parameter_source(k).name == "COMMANDLINE"}
            return command(config=config.resolve(cls, given), **values)

        call.__signature__ = inspect.Signature(parameters)
        call.__annotations__ = {p.name: p.annotation for p in parameters}
        return call

    return wrap


def _flag(f: Field, kind: Any) -> inspect.Parameter:
    name = f"--{f.name.replace('_', '-')}"
    names = [f"{name}/--no-{name[2:]}" if kind is bool else name, *f.metadata["flags"]]
    default = f.default_factory() if callable(f.default_factory) else f.default
    annotation = Annotated[kind, typer.Option(*names, help=f.metadata["help"])]
    return inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


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
    pass


def main() -> None:
    """Entry point: errors become one line and a non-zero exit status; `--debug` shows the traceback."""
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    try:
        app()
    except UserError as error:
        if debug:
            raise
        sys.exit(_complain(str(error), 2))
    except Exception as error:
        if debug:
            raise
        sys.exit(_complain(f"{type(error).__name__}: {error} (this is a fault of cfrl; --debug shows where)", 1))


def _complain(message: str, status: int) -> int:
    print(f"cfrl: error: {' '.join(message.split())}", file=sys.stderr)
    return status


@app.command()
@configured(config.SampleConfig)
def sample(
    config: config.SampleConfig,
    output: Annotated[str, typer.Option("-o", "--output", help="Write to .h5, .csv, .extxyz, .zip or a folder.")] = "",
) -> None:
    """Generate crystals."""
    print(config, output)


app.add_typer(data_app, name="data")
app.add_typer(model_app, name="model")

if __name__ == "__main__":
    main()
