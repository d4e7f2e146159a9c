"""Which rewards there are: built in, registered by `@cfrl.register_reward`, of installed packages, or in a file.

A reward is a function ``f(crystals, structures) -> (n,) array`` and a few facts about it (`RewardInfo`). A function
whose facts list `needs` is also given `inputs` (scoring.py). Its keyword-only arguments are the reward's parameters.
How values are combined is in expression.py, how they are computed for a batch in scoring.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

from cfrl.errors import UserError, nearest

NEEDS = ("energy", "forces", "stress", "features", "potential", "hull", "dataset", "known")
ENTRY_POINTS = "cfrl.rewards"


@dataclass(frozen=True)
class RewardInfo:
    """A reward: its function, and what a user should know before trusting it.

    name: what stands in expressions
    function: (crystals, structures[, inputs], *, parameters) -> (n,) array or a `Scored`
    description, unit: of the returned quantity
    goal: "max" or "min": what a bare ``--reward NAME`` does with it; in an expression the user writes signs
    needs: some of `NEEDS`; the passes of the potential that they ask for are made once for all terms
    predictors: property predictors that the function asks for, by name or file
    parts: names of further columns that the function returns
    spread: whether it returns its own uncertainty, such as the spread of an ensemble
    caution: how many spreads are subtracted if the user does not say
    minimum: the least value that counts in a total: that the quantity can have, or below which less is no merit
    maximum: the largest value that counts in a total
    cached: whether a crystal's value depends on that crystal alone
    parameters: name -> default
    """

    name: str
    function: Callable[..., Any]
    description: str = ""
    unit: str = ""
    goal: Literal["max", "min"] = "max"
    needs: tuple[str, ...] = ()
    predictors: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    spread: bool = False
    caution: float = 0.0
    minimum: float = float("-inf")
    maximum: float = float("inf")
    cached: bool = True
    parameters: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.goal not in ("max", "min"):
            raise UserError(f"reward '{self.name}': goal is {self.goal!r}; it is 'max' or 'min'")
        unknown = [need for need in self.needs if need not in NEEDS]
        if unknown:
            raise UserError(f"reward '{self.name}': needs {unknown[0]!r}; known needs are {', '.join(NEEDS)}")

    def check_parameters(self, given: dict[str, Any]) -> dict[str, Any]:
        """The function's keyword arguments. Raises UserError for an unknown name or an impossible value."""
        for name, value in given.items():
            if name not in self.parameters:
                known = f"; it has {', '.join(self.parameters)}" if self.parameters else "; it has none"
                raise UserError(f"reward '{self.name}' has no parameter '{name}'{known}")
            choices = self.choices(name)
            if choices and value not in choices:
                raise UserError(f"reward '{self.name}': {name} is {value!r}; it is one of {', '.join(choices)}")
            if _kind(value) is not _kind(self.parameters[name]):
                raise UserError(f"reward '{self.name}': {name} should be a {_kind(self.parameters[name]).__name__}")
        return {name: _like(self.parameters[name], value) for name, value in given.items()}

    def choices(self, parameter: str) -> tuple[Any, ...]:
        """The values that a parameter annotated as `Literal` can have."""
        hint = inspect.signature(self.function, eval_str=True).parameters[parameter].annotation
        return get_args(hint) if get_origin(hint) is Literal else ()


_registry: dict[str, RewardInfo] = {}


def register_reward(
    name: str,
    *,
    description: str = "",
    unit: str = "",
    goal: Literal["max", "min"] = "max",
    needs: Sequence[str] = (),
    predictors: Sequence[str] = (),
    parts: Sequence[str] = (),
    spread: bool = False,
    caution: float = 0.0,
    minimum: float = float("-inf"),
    maximum: float = float("inf"),
    cached: bool = True,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function ``f(crystals, structures) -> (n,) array`` a reward; NaN marks "could not be scored".

    Keyword-only arguments of the function become parameters of the reward. Without a `description` the first
    paragraph of its docstring is taken. The other arguments: see `RewardInfo`. A later function of the same name
    replaces the earlier one.

    `finetune` calls the function in a thread while it draws more crystals: random numbers in it should come from a
    generator of its own, else neither they nor the crystals repeat.
    """
    if not name.isidentifier():
        raise UserError(f"reward name {name!r}: use letters, digits and underscores, so that it can stand in a formula")

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        info = RewardInfo(
            name,
            function,
            description or _summary(function),
            unit,
            goal,
            tuple(needs),
            tuple(predictors),
            tuple(parts),
            spread,
            caution,
            minimum,
            maximum,
            cached,
            _parameters(function),
        )
        _registry[name] = function.__reward__ = info
        return function

    return register


def all_rewards() -> list[RewardInfo]:
    """Every reward that can be named; a package whose reward does not load only earns a warning."""
    for point in _entry_points().values():
        try:
            _load_entry_point(point)
        except UserError as error:
            warnings.warn(str(error), stacklevel=2)
    return sorted(_registry.values(), key=lambda info: info.name)


def find_reward(name: str) -> RewardInfo:
    """The reward of a name, ``property:FILE``, ``package.module:function`` or ``file.py:function``.

    Raises UserError: no such reward (with the nearest name), module, file or function, or one that fails to load.
    """
    if name.startswith("property:"):
        from cfrl.rewards.predicted import predictor_reward

        return predictor_reward(name.removeprefix("property:"))
    if ":" in name:
        return _from_module(name)
    if name not in _registry and name in _entry_points():
        _load_entry_point(_entry_points()[name])
    if name not in _registry:
        known = sorted({*_registry, *_entry_points()})
        raise UserError(f"unknown reward '{name}'{nearest(name, known)} (`cfrl rewards` lists them)")
    return _registry[name]


@cache
def _entry_points() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


@cache
def _load_entry_point(point: EntryPoint) -> None:
    try:
        loaded = point.load()
    except (Exception, SystemExit) as error:  # whatever a third party's module raises on import
        raise UserError(f"reward '{point.name}' of {point.value} cannot be loaded: {describe(error)}") from error
    if point.name not in _registry:
        register_reward(point.name)(loaded)


def _from_module(name: str) -> RewardInfo:
    place, _, attribute = name.rpartition(":")
    module = _import(place)
    functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"reward '{name}': {place} has no function '{attribute}'{nearest(attribute, functions)}")
    registered = getattr(function, "__reward__", None)
    return registered or RewardInfo(name, function, _summary(function), parameters=_parameters(function))


@cache
def _import(place: str) -> ModuleType:
    """A module by its dotted name (the working folder included) or by the path of its file."""
    try:
        if place.endswith(".py"):
            return _import_file(Path(place))
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.insert(0, here)
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and place.startswith(error.name):
            raise UserError(f"reward: no module '{place}' (looked in the working folder too)") from error
        raise UserError(f"reward: {place} cannot be imported: {describe(error)}") from error
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's module raises on import
        raise UserError(f"reward: {place} cannot be imported: {describe(error)}") from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"reward: no file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def describe(error: BaseException) -> str:
    """`ValueError: message (file.py, line 3)`: one line about someone else's exception."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})" if trace else ""
    message = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {message}{place}"


def _parameters(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def _kind(value: Any) -> type:
    return float if isinstance(value, int | float) and not isinstance(value, bool) else type(value)


def _like(default: Any, value: Any) -> Any:
    """Numbers of formulas are floats; a parameter whose default is an integer gets an integer."""
    whole = isinstance(default, int) and isinstance(value, float) and value.is_integer()
    return int(value) if whole and not isinstance(default, bool) else value


def _summary(function: Callable[..., Any]) -> str:
    """The first paragraph of the docstring."""
    return " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
