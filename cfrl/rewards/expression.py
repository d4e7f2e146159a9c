"""Rewards combined by a formula: ``dielectric_bandgap - 2*ehull``, ``only(band_gap, ehull < 0.1)``.

A formula is parsed by Python's own parser and then checked node by node against what is allowed here; nothing is
ever executed as Python. It holds

- names of rewards, with parameters if need be: ``dielectric(kind=electronic)``; a name with colons, dots or
  slashes stands in quotes: ``'property:eps.safetensors'``, ``'package.module:function'``,
- numbers, ``+ - * / **``, comparisons, ``and``, ``or``, ``not``, and ``A if CONDITION else B``,
- the functions of `FUNCTIONS`.

What a name means is decided in registry.py, where values come from in scoring.py. Values are (n,) float arrays;
NaN, "could not be scored", spreads through every operation, comparisons included, except into the branch of a gate
that is not taken.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cfrl.errors import UserError, nearest

Value = np.ndarray | np.float64


@dataclass(frozen=True)
class Term:
    """A reward by name, with the parameters given to it."""

    name: str
    parameters: tuple[tuple[str, str | float | bool], ...] = ()

    def __str__(self) -> str:
        inside = ", ".join(f"{key}={value}" for key, value in self.parameters)
        return f"{self.name}({inside})" if inside else self.name


def _literal(node: ast.expr) -> float:
    """The number that is written there; NaN where something is to be computed first."""
    try:
        return float(ast.literal_eval(node))
    except ValueError:
        return np.nan


def _where(condition: Value, yes: Value, no: Value) -> Value:
    return np.where(np.isnan(condition), np.nan, np.where(condition != 0, yes, no))


def _only(x: Value, condition: Value) -> Value:
    return _where(condition, x, np.float64(0.0))


def _target(x: Value, value: Value, width: Value = np.float64(1.0)) -> Value:
    return -np.abs(x - value) / width


def _window(x: Value, low: Value, high: Value, width: Value = np.float64(1.0)) -> Value:
    return -np.maximum(np.maximum(low - x, x - high), 0.0) / width


# name -> (function, least and most arguments, what it does)
FUNCTIONS: dict[str, tuple[Callable[..., Value], int, int, str]] = {
    "abs": (np.abs, 1, 1, "abs(x)"),
    "exp": (np.exp, 1, 1, "exp(x)"),
    "log": (np.log, 1, 1, "log(x): natural logarithm; not scored where x <= 0"),
    "log10": (np.log10, 1, 1, "log10(x); not scored where x <= 0"),
    "sqrt": (np.sqrt, 1, 1, "sqrt(x); not scored where x < 0"),
    "tanh": (np.tanh, 1, 1, "tanh(x)"),
    "min": (np.minimum, 2, 2, "min(x, y)"),
    "max": (np.maximum, 2, 2, "max(x, y)"),
    "clip": (np.clip, 3, 3, "clip(x, low, high)"),
    "where": (_where, 3, 3, "where(condition, x, y): x where the condition holds, else y"),
    "only": (_only, 2, 2, "only(x, condition): x where the condition holds, else 0"),
    "target": (_target, 2, 3, "target(x, value, width=1): -|x - value| / width; 0 at the target, else less"),
    "window": (
        _window,
        3,
        4,
        "window(x, low, high, width=1): 0 inside, outside minus the distance to the window / width",
    ),
    "standardise": (lambda x: x, 1, 1, "standardise(x): x minus its running mean, over its running deviation"),
}
ALIASES = {"standardize": "standardise"}

_PLAIN_NAME = re.compile(r"""property:[^'"]+|[\w./\\-]+:\w+""")
_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_COMPARE = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


class RunningMoments:
    """Mean and standard deviation of all finite values so far (Chan et al. 1979: exact whatever the batches)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0

    def update(self, values: np.ndarray) -> None:
        values = values[np.isfinite(values)]
        if not len(values):
            return
        total = self.count + len(values)
        shift = values.mean() - self.mean
        self.squares += ((values - values.mean()) ** 2).sum() + shift**2 * self.count * len(values) / total
        self.mean += shift * len(values) / total
        self.count = total

    def __call__(self, values: Value) -> Value:
        deviation = np.sqrt(self.squares / self.count) if self.count else 0.0
        return (values - self.mean) / (deviation if deviation > 0 else 1.0)


class Expression:
    """A checked formula.

    source: the text
    terms: the rewards in it, in the order of their first use, each once
    """

    def __init__(self, source: str, definitions: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """`definitions`: names that stand for formulas, `{name: {"expression": ..., number's name: number}}`.

        Raises UserError: one line, what is wrong and where.
        """
        self.source = source.strip()
        self._moments: list[RunningMoments] = []
        self._slots: dict[int, int] = {}  # node of a `standardise` -> place in _moments
        self._terms: dict[Term, None] = {}
        try:
            self._root = _Inline(definitions or {}).visit(_parse(self.source))
            self._check(self._root)
        except RecursionError:
            raise self._error("too deeply nested") from None

    @property
    def terms(self) -> list[Term]:
        return list(self._terms)

    @property
    def single(self) -> Term | None:
        """The term, if the formula is just the name of one."""
        return self._term(self._root) if self._is_term(self._root) else None

    @property
    def ranges(self) -> list[tuple[str, Term, float]]:
        """Where a term itself is wanted in a range: the text, the term, and how far from the middle it still does."""
        found = []
        for node in ast.walk(self._root):
            match node:
                case ast.Call(func=ast.Name(id="window"), args=[of, low, high, *_]) if self._is_term(of):
                    reach = [-0.5, 0.5] @ np.array([_literal(low), _literal(high)])
                case ast.Call(func=ast.Name(id="target"), args=[of, _, *width]) if self._is_term(of):
                    reach = _literal(width[0]) if width else 1.0
                case _:
                    continue
            if np.isfinite(reach):
                found.append((_text(node), self._term(of), float(reach)))
        return found

    def __call__(self, values: Mapping[Term, np.ndarray], update: bool = False) -> np.ndarray:
        """Value of the formula, (n,) float64.

        values: (n,) of every term; `update`: let `standardise` learn from these values first.
        """
        n = len(next(iter(values.values()), np.empty(1)))
        with np.errstate(all="ignore"):
            return np.broadcast_to(self._value(self._root, values, update), n).astype(np.float64)

    def state_dict(self) -> dict[str, list[list[float]]]:
        """What `standardise` has learnt."""
        return {"moments": [[float(m.count), float(m.mean), float(m.squares)] for m in self._moments]}

    def load_state_dict(self, state: Mapping[str, list[list[float]]]) -> None:
        """Raises UserError if the state is another formula's."""
        if len(state["moments"]) != len(self._moments):
            raise UserError(f"the saved state of the reward does not fit the expression '{self.source}'")
        for moments, saved in zip(self._moments, state["moments"], strict=True):
            moments.count, moments.mean, moments.squares = saved

    # --- checking -------------------------------------------------------------------------------------------

    def _check(self, node: ast.expr) -> None:
        if self._is_term(node):
            self._terms.setdefault(self._term(node))
            return
        match node:
            case ast.Constant(value=bool() | int() | float()):
                self._number(node)
            case ast.BinOp() if type(node.op) in _BINARY:
                pass
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Not()):
                pass
            case ast.Compare() if all(type(op) in _COMPARE for op in node.ops):
                pass
            case ast.BoolOp() | ast.IfExp():
                pass
            case ast.Call(func=ast.Name(id=name)):
                self._check_call(node, ALIASES.get(name, name))
                for argument in node.args:
                    self._check(argument)
                return
            case _:
                raise self._error(f"'{_text(node)}' is not allowed")
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self._check(child)

    def _check_call(self, node: ast.Call, name: str) -> None:
        if name not in FUNCTIONS:
            known = ", ".join(FUNCTIONS)
            raise self._error(f"'{name}(...)' cannot be called{nearest(name, FUNCTIONS)} (functions: {known})")
        _, least, most, usage = FUNCTIONS[name]
        if node.keywords or not least <= len(node.args) <= most:
            raise self._error(f"'{_text(node)}' should be written {usage.split(':')[0]}")
        if name == "standardise":
            self._slots[id(node)] = len(self._moments)
            self._moments.append(RunningMoments())

    def _is_term(self, node: ast.expr) -> bool:
        """A name, a quoted name, or either with parameters and nothing else in brackets."""
        match node:
            case ast.Name() | ast.Constant(value=str()):
                return True
            case ast.Call(func=ast.Name(id=name), args=[]) if ALIASES.get(name, name) not in FUNCTIONS:
                return True
            case ast.Call(func=ast.Constant(value=str()), args=[]):
                return True
        return False

    def _term(self, node: ast.expr) -> Term:
        match node:
            case ast.Name(id=name) | ast.Constant(value=name):
                if name in FUNCTIONS or name in ALIASES:
                    raise self._error(f"'{name}' is a function: {FUNCTIONS[ALIASES.get(name, name)][3]}")
                return Term(name)
            case ast.Call(func=ast.Name(id=name) | ast.Constant(value=name), keywords=keywords):
                if any(keyword.arg is None for keyword in keywords):
                    raise self._error(f"'{_text(node)}' should name its parameters")
                return Term(name, tuple(sorted((k.arg, self._parameter(k.value)) for k in keywords)))
        raise self._error(f"'{_text(node)}' is not a reward")

    def _parameter(self, node: ast.expr) -> str | float | bool:
        match node:
            case ast.Constant(value=bool() | str() as value):
                return value
            case ast.Name(id=name):
                return name
            case ast.Constant(value=int() | float()):
                return float(self._number(node))
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float()) as number):
                return -float(self._number(number))
        raise self._error(f"the parameter '{_text(node)}' is neither a number nor a word")

    def _number(self, node: ast.Constant) -> np.float64:
        try:
            return np.float64(node.value)
        except OverflowError as error:
            raise self._error(f"the number {_text(node)[:20]}... is too large") from error

    def _error(self, message: str) -> UserError:
        return _error(self.source, message)

    # --- evaluation -----------------------------------------------------------------------------------------

    def _value(self, node: ast.expr, values: Mapping[Term, np.ndarray], update: bool) -> Value:
        def value(child: ast.expr) -> Value:
            return self._value(child, values, update)

        if self._is_term(node):
            return values[self._term(node)]
        match node:
            case ast.Constant():
                return self._number(node)
            case ast.BinOp(left=left, op=op, right=right):
                return _BINARY[type(op)](value(left), value(right))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return _logical(value(operand), lambda x: x == 0)
            case ast.UnaryOp(op=op, operand=operand):
                return -value(operand) if isinstance(op, ast.USub) else value(operand)
            case ast.Compare(left=left, ops=ops, comparators=right):
                sides = [value(side) for side in (left, *right)]
                pairs = zip(ops, sides[:-1], sides[1:], strict=True)
                return _all([_compare(_COMPARE[type(op)], a, b) for op, a, b in pairs])
            case ast.BoolOp(op=ast.And(), values=parts):
                return _all([_logical(value(part), lambda x: x != 0) for part in parts])
            case ast.BoolOp(values=parts):
                return 1.0 - _all([_logical(value(part), lambda x: x == 0) for part in parts])
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return _where(value(test), value(body), value(orelse))
            case ast.Call(func=ast.Name(id=name), args=args):
                return self._call(node, ALIASES.get(name, name), [value(a) for a in args], update)
        raise AssertionError(f"an unchecked node: {ast.dump(node)}")

    def _call(self, node: ast.Call, name: str, arguments: list[Value], update: bool) -> Value:
        if name != "standardise":
            return FUNCTIONS[name][0](*arguments)
        moments = self._moments[self._slots[id(node)]]
        if update:
            moments.update(np.atleast_1d(arguments[0]))
        return moments(arguments[0])


class _Inline(ast.NodeTransformer):
    """Puts formulas in the place of the names that `cfrl.toml` defines; ``name(width=2)`` changes a number."""

    def __init__(self, definitions: Mapping[str, Mapping[str, Any]], within: tuple[str, ...] = ()) -> None:
        self.definitions, self.within = definitions, within

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self._inline(node.id, {}) if node.id in self.definitions else node

    def visit_Call(self, node: ast.Call) -> ast.expr:
        match node:
            case ast.Call(func=ast.Name(id=name), args=[]) if name in self.definitions:
                return self._inline(name, {keyword.arg: keyword.value for keyword in node.keywords})
        node.args = [self.visit(argument) for argument in node.args]
        return node

    def _inline(self, name: str, given: Mapping[str | None, ast.expr]) -> ast.expr:
        if name in self.within:
            raise UserError(f"[rewards.{name}]: the expression refers to itself")
        definition = dict(self.definitions[name])
        source = definition.pop("expression")
        numbers: dict[Any, ast.expr] = {key: ast.Constant(value) for key, value in definition.items()}
        unknown = [key for key in given if key not in numbers]
        if unknown:
            raise UserError(f"[rewards.{name}] has no number '{unknown[0]}'{nearest(str(unknown[0]), definition)}")
        root = _Numbers(numbers | dict(given)).visit(_parse(source))
        return _Inline(self.definitions, (*self.within, name)).visit(root)


class _Numbers(ast.NodeTransformer):
    """Puts numbers in the place of names."""

    def __init__(self, numbers: Mapping[Any, ast.expr]) -> None:
        self.numbers = numbers

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return self.numbers.get(node.id, node)

    def visit_Call(self, node: ast.Call) -> ast.expr:
        node.args = [self.visit(argument) for argument in node.args]
        for keyword in node.keywords:
            keyword.value = self.visit(keyword.value)
        return node


def is_plain_name(spec: str) -> bool:
    """Whether a spec is one unquoted name with a colon in it: ``property:FILE`` or ``package.module:function``."""
    return bool(_PLAIN_NAME.fullmatch(spec))


def _parse(source: str) -> ast.expr:
    if is_plain_name(source):
        return ast.Constant(source)
    try:
        return ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f" near '{error.text.strip()[max(error.offset - 1, 0) :][:20]}'" if _has_place(error) else ""
        raise _error(source, f"cannot be read{where}") from error


def _error(source: str, message: str) -> UserError:
    return UserError(f'reward expression "{source if len(source) < 80 else source[:77] + "..."}": {message}')


def _has_place(error: BaseException) -> bool:
    return bool(getattr(error, "text", None) and getattr(error, "offset", None))


def _text(node: ast.AST) -> str:
    return ast.unparse(node)[:60]


def _logical(x: Value, test: Callable[[Value], Any]) -> Value:
    return np.where(np.isnan(x), np.nan, test(x))


def _compare(compare: Callable[[Value, Value], Any], a: Value, b: Value) -> Value:
    return np.where(np.isnan(a) | np.isnan(b), np.nan, compare(a, b))


def _all(parts: list[Value]) -> Value:
    """1 where all are 1, else 0; NaN where any is NaN."""
    product = parts[0]
    for part in parts[1:]:
        product = product * part
    return product
