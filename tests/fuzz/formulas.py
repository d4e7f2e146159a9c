"""Reward expressions. The oracle evaluates the tree that a text was written from, number by number."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from cfrl.rewards.expression import Expression
from cfrl.rewards.scoring import build_reward
from tests.fuzz.cases import WORDS, Case, garbled

NAMES = ("density", "band_gap", "ehull", "hhi")
VALUES = (float("nan"), -2.0, 0.0, 0.5, 3.0, 1e200)
HOSTILE = (
    *(
        "__import__('os').system('touch gone')",
        "open('gone', 'w')",
        "().__class__.__bases__[0].__subclasses__()",
        "9**9**9",
    ),
    *("exec('1')", "lambda: 0", "[x for x in (1,)]", "density.real", "density[0]", "f'{density}'", "(yield)", "a := 3"),
    *(
        "'../../etc/passwd:f'",
        "'os:system'",
        "property:../../etc/passwd",
        "'property:secret'",
        "os:system",
        "secret.py:f",
    ),
    *(
        "density(",
        ")",
        "density density",
        "density; density",
        "density\ndensity",
        "# density",
        "\0",
        "\udcff",
        "*" * 99,
    ),
    *(
        "-" * 5000 + "1",
        "(" * 500 + "1" + ")" * 500,
        "1" + "+1" * 20_000,
        "abs(" * 300 + "density" + ")" * 300,
        "9" * 9000,
    ),
    *(
        "1e999 * density",
        "density ** density ** density",
        "nan",
        "inf",
        "1j",
        "'x'",
        "b'x'",
        "...",
        "None",
        "not",
        "density if",
    ),
    *(
        "density(kind=1)",
        "density(**{})",
        "density(x=[])",
        "min(density)",
        "max(1, 2, 3)",
        "standardise()",
        "clip(1,2)",
    ),
)


def case(rng: random.Random) -> Case:
    """A formula that is right (its value is known), one with damage, or one that wants what it may not."""
    Path("secret.py").write_text("open('gone', 'w').write('x')\n")
    kind = rng.random()
    if kind < 0.4:
        return _valued(rng)
    text = rng.choice(HOSTILE) if kind < 0.6 else garbled(rng, _text(_tree(rng, 3)), (*WORDS, *HOSTILE, *NAMES))
    if rng.random() < 0.2:
        text = f"{_text(_tree(rng, 2))} + {text}"
    names = ["reward", "expression", "predictor", "secret"]
    if rng.random() < 0.2 and "\0" not in text:
        words = ["screen", "missing.cif", "--no-relax", "--no-stability", rng.choice(("--rank", "--filter")), text]
        return Case(words, [*names, "--rank", "--filter", "missing"], check=_executed)
    return Case(lambda: build_reward(text), names, check=_executed)


def _executed() -> str:
    return "code in an expression was run" if Path("gone").exists() else ""


def _valued(rng: random.Random) -> Case:
    tree = _tree(rng, 4)
    text = _text(tree)
    values = {name: np.array([rng.choice(VALUES)]) for name in NAMES}
    found: list[float] = []

    def use() -> None:
        expression = Expression(text)
        found.append(float(expression({term: values[term.name] for term in expression.terms})[0]))

    def check() -> str:
        with np.errstate(all="ignore"):
            wanted = float(_value(tree, {name: np.float64(v[0]) for name, v in values.items()}))
        same = math.isclose(found[0], wanted, rel_tol=1e-9) or (math.isnan(wanted) and math.isnan(found[0]))
        return "" if same else f"{text} with {values} is {found[0]}, not {wanted}"

    return Case(use, [], sound=True, check=check)


def _tree(rng: random.Random, depth: int) -> Any:
    if depth == 0 or rng.random() < 0.15:
        return rng.choice(NAMES) if rng.random() < 0.6 else rng.choice((0.0, 1.0, 2.0, 0.5, 3e2))
    operator = rng.choice(
        (*"+-*/<", "<=", "==", "and", "or", "neg", "not", "abs", "tanh", "sqrt", "min", "max", "if", "only")
    )
    arity = {"neg": 1, "not": 1, "abs": 1, "tanh": 1, "sqrt": 1, "if": 3}.get(operator, 2)
    return (operator, *(_tree(rng, depth - 1) for _ in range(arity)))


def _text(tree: Any) -> str:
    if not isinstance(tree, tuple):
        return str(tree)
    operator, *parts = tree[0], *map(_text, tree[1:])
    match operator:
        case "neg":
            return f"(-{parts[0]})"
        case "not":
            return f"(not {parts[0]})"
        case "if":
            return f"({parts[1]} if {parts[0]} else {parts[2]})"
        case "abs" | "tanh" | "sqrt" | "min" | "max" | "only":
            return f"{operator}({', '.join(parts)})"
    return f"({parts[0]} {operator} {parts[1]})"


def _value(tree: Any, values: dict[str, np.float64]) -> np.float64:
    """By the rules of expression.py: NaN spreads through everything but the branch that is not taken."""
    if isinstance(tree, str):
        return values[tree]
    if not isinstance(tree, tuple):
        return np.float64(tree)
    operator, *parts = tree[0], *(_value(part, values) for part in tree[1:])
    unknown = np.float64(np.nan)
    match operator:
        case "if" | "only":
            test, yes, no = parts if operator == "if" else (parts[1], parts[0], np.float64(0))
            return unknown if np.isnan(test) else yes if test != 0 else no
        case "neg":
            return -parts[0]
        case "abs" | "tanh" | "sqrt":
            return getattr(np, operator)(parts[0])
        case "+" | "-" | "*" | "/":
            a, b = parts
            return {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operator]
    if any(map(np.isnan, parts)):
        return unknown
    a, b = (*parts, unknown)[:2]
    truths = {"<": a < b, "<=": a <= b, "==": a == b, "not": a == 0}
    truths |= {"and": a != 0 and b != 0, "or": a != 0 or b != 0, "min": min(a, b), "max": max(a, b)}
    return np.float64(truths[operator])
