"""Formulas of rewards: their arithmetic, how NaN spreads, what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cfrl.errors import UserError
from cfrl.rewards.expression import Expression, Term

A, B = np.array([1.0, -2.0, 3.0, 0.5]), np.array([4.0, 5.0, math.nan, 0.25])


def value(text: str, **names: np.ndarray) -> np.ndarray:
    names = names or {"a": A, "b": B}
    expression = Expression(text)
    return expression({term: names[term.name] for term in expression.terms} or {Term("a"): A})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a - 2*b", A - 2 * B),
        ("-a**2", -(A**2)),
        ("2**-1 * a", A / 2),
        ("a / (b + 1)", A / (B + 1)),
        ("a < 1", [0, 1, 0, 1]),
        ("0 < a <= 1", [1, 0, 0, 1]),
        ("a > 0 and not a > 2", [1, 0, 0, 1]),
        ("a > 2 or a < 0", [0, 1, 1, 0]),
        ("a if a > 0 else 10", [1, 10, 3, 0.5]),
        ("where(a > 0, a, 10)", [1, 10, 3, 0.5]),
        ("only(a, a > 0.7)", [1, 0, 3, 0]),
        ("clip(a, 0, 1)", [1, 0, 1, 0.5]),
        ("min(a, 1) + max(a, 1)", A + 1),
        ("log(exp(a)) + log10(100) + sqrt(4) + abs(-1) + tanh(0)", A + 5),
        ("target(a, 1)", [0, -3, -2, -0.5]),
        ("target(a, 1, 0.5)", [0, -6, -4, -1]),
        ("window(a, 0, 1)", [0, -2, -2, 0]),
        ("window(a, 0, 1, 4)", [0, -0.5, -0.5, 0]),
        ("3", [3, 3, 3, 3]),
    ],
)
def test_arithmetic(text: str, expected: np.ndarray) -> None:
    np.testing.assert_allclose(value(text), expected)


def test_unknown_values_spread_but_not_into_a_closed_gate() -> None:
    assert np.isnan(value("b > 1")[2]), "a comparison with NaN is unknown, not false"
    assert np.isnan(value("only(a, b > 1)")[2])
    assert np.isnan(value("b > 1 and a > 0")[2])
    assert np.isnan(value("1 if not b > 1 else 0")[2])
    np.testing.assert_allclose(value("b if a < 1 else 0"), [0, 5, 0, 0.25])
    np.testing.assert_array_equal(np.isnan(value("log(a)")), [False, True, False, False])


def test_terms_are_found_once_and_in_order() -> None:
    expression = Expression("b + a*b + dielectric(kind=electronic) - 'property:my file.safetensors'")
    assert [str(t) for t in expression.terms] == [
        "b",
        "a",
        "dielectric(kind=electronic)",
        "property:my file.safetensors",
    ]
    assert Expression("dielectric(kind='electronic')").terms == [Term("dielectric", (("kind", "electronic"),))]
    assert Expression("f(x=-2, y=True)").terms == [Term("f", (("x", -2.0), ("y", True)))]


@pytest.mark.parametrize("name", ["property:a/b-c d.safetensors", "package.module:function", "./my-file.py:f"])
def test_a_name_with_a_colon_needs_no_quotes_when_it_stands_alone(name: str) -> None:
    assert Expression(name).terms == [Term(name)]
    assert Expression(name).single == Term(name)
    assert Expression(f"2 * '{name}'").terms == [Term(name)]


def test_only_a_bare_name_is_single() -> None:
    assert Expression(" ehull ").single == Term("ehull")
    assert Expression("ehull(x=1)").single is not None
    assert Expression("-ehull").single is None
    assert Expression("1*ehull").single is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exec('x')", "'exec(...)' cannot be called"),
        ("__import__('os').system('x')", "not allowed"),
        ("open(a)", "'open(...)' cannot be called"),
        ("clipp(a, 0, 1)", "did you mean 'clip'"),
        ("a.b", "not allowed"),
        ("a[0]", "not allowed"),
        ("[a for a in b]", "not allowed"),
        ("lambda: a", "cannot be read|not allowed"),
        ("(a := 1)", "cannot be read|not allowed"),
        ("a @ b", "not allowed"),
        ("a % b", "not allowed"),
        ("a in b", "not allowed"),
        ("f'{a}'", "not allowed"),
        ("*a", "cannot be read|not allowed"),
        ("None", "not allowed"),
        ("1j", "not allowed"),
        ("a +", "cannot be read"),
        ("a b", "cannot be read near 'b'"),
        ("", "cannot be read"),
        ("a; b", "cannot be read"),
        ("clip(a)", "should be written clip"),
        ("clip(a, low=0, high=1)", "should be written clip"),
        ("log + 1", "'log' is a function"),
        ("f(x=a+1)", "neither a number nor a word"),
        ("f(**a)", "'f"),
        ("9" * 400, "too large"),
        ("+".join("a" * 5000), "too deeply nested|cannot be read"),
        ("(" * 5000, "cannot be read"),
    ],
)
def test_what_is_not_a_formula_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError, match="reward") as caught:
        Expression(text)
    assert any(part in str(caught.value) for part in message.split("|")), str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_tower_of_powers_is_infinite_and_not_computed_exactly() -> None:
    assert np.isinf(value("9**9**9**9")).all()


def test_standardise_knows_all_values_so_far() -> None:
    rng = np.random.default_rng(0)
    batches = [rng.normal(5, 3, size=n) for n in (7, 1, 20)]
    expression = Expression("standardise(a)")
    for batch in batches:
        got = expression({Term("a"): batch}, update=True)
    every = np.concatenate(batches)
    np.testing.assert_allclose(got, (batches[-1] - every.mean()) / every.std())
    again = expression({Term("a"): batches[0]})
    np.testing.assert_allclose(again, expression({Term("a"): batches[0]}), err_msg="scoring must not teach")


def test_standardise_survives_a_restart_and_ignores_nan() -> None:
    text = "standardise(a) + 2*standardize(b)"
    one, two = Expression(text), Expression(text)
    one({Term("a"): A, Term("b"): B}, update=True)
    two.load_state_dict(one.state_dict())
    values = {Term("a"): A, Term("b"): B}
    np.testing.assert_array_equal(one(values), two(values))
    assert np.isfinite(one(values)[[0, 1, 3]]).all()
    with pytest.raises(UserError, match="does not fit"):
        Expression("a").load_state_dict(one.state_dict())


def test_definitions_stand_for_formulas() -> None:
    definitions = {
        "merit": {"expression": "a * b", "unused": 1.0},
        "near": {"expression": "target(a, wanted, 2)", "wanted": 1.0},
        "both": {"expression": "merit + near(wanted=3)"},
    }
    expression = Expression("both - a", definitions)
    assert [str(t) for t in expression.terms] == ["a", "b"]
    expected = A * B - np.abs(A - 3) / 2 - A
    np.testing.assert_allclose(expression({Term("a"): A, Term("b"): B}), expected)


def test_definitions_at_fault() -> None:
    with pytest.raises(UserError, match="refers to itself"):
        Expression("x", {"x": {"expression": "y"}, "y": {"expression": "x + 1"}})
    with pytest.raises(UserError, match=r"no number 'widht'; did you mean 'width'"):
        Expression("x(widht=1)", {"x": {"expression": "target(a, 1, width)", "width": 1.0}})


def test_ranges_of_a_term_are_found():
    formula = Expression("window(a, -1, 2) + 2*target(b, 1.4, 0.2) - target(c, 3) + target(a*2, 1) + window(d, e, 3)")
    assert {(text, str(term), reach) for text, term, reach in formula.ranges} == {
        ("window(a, -1, 2)", "a", 1.5),
        ("target(b, 1.4, 0.2)", "b", 0.2),
        ("target(c, 3)", "c", 1.0),
    }
    named = {"near": {"expression": "target(a, 1, width)", "width": 0.5}}
    assert [reach for *_, reach in Expression("near", named).ranges] == [0.5]
