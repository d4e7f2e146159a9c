"""The command line: parse, call, print. What a command does lives in the module of its name.

The flags of a command are the fields of its dataclass in `config.py`, plus the few parameters written here.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, get_type_hints

import typer

from cfrl import __version__, config
from cfrl.errors import UserError

HELP = """Crystals with wanted properties: a crystal-generating transformer, tuned by reinforcement learning.

Work goes pretrain -> sample -> finetune -> sample -> screen -> retrieve; an embedded model lets you start anywhere.
Settings: defaults, then cfrl.toml of the working folder, then flags. Results go to a new folder under runs/."""

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode="markdown", pretty_exceptions_enable=False)
data_app = typer.Typer(help="Datasets: import, fetch, look into.", no_args_is_help=True)
model_app = typer.Typer(help="Model files: import published weights, look into.", no_args_is_help=True)


def configured(cls: type) -> Callable[[Callable], Callable]:
    """Give a command one flag per field of the dataclass `cls`, and pass it the resolved settings as `config`."""

    def wrap(command: Callable) -> Callable:
        own = [p for name, p in inspect.signature(command).parameters.items() if name != "config"]
        generated = [_flag(cls, f) for f in fields(cls)]

        @functools.wraps(command)
        def call(ctx: typer.Context, **values: Any) -> Any:
            given = {
                f.name: values.pop(f.name)
                for f in fields(cls)
                if ctx.get_parameter_source(f.name).name == "COMMANDLINE" or (values.pop(f.name) and False)
            }
            return command(config=config.resolve(cls, given), **values)

        context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        call.__signature__ = inspect.Signature([context, *own, *generated])
        call.__annotations__ = {p.name: p.annotation for p in [context, *own, *generated]}
        return call

    return wrap
