"""Every setting is checked when settings are made: range, unit and source in one line, before anything is begun."""

import sys
from dataclasses import FrozenInstanceError, fields
from math import inf, nan
from pathlib import Path
from types import NoneType
from typing import Annotated, get_args, get_origin, get_type_hints

import numpy as np
import pytest

from cfrl import config
from cfrl.cli import main
from cfrl.config import FinetuneConfig, Range, SampleConfig, resolve
from cfrl.errors import UserError
from cfrl.settings import choices, set_kind

HINTS = {name: get_type_hints(cls, include_extras=True) for name, cls in config.SECTIONS.items()}
KINDS = {name: {field: set_kind(kind) for field, kind in hints.items()} for name, hints in HINTS.items()}
UNSET = {  # settings that may be None, and how files write that
    (name, f.name): f.metadata["unset"]
    for name, cls in config.SECTIONS.items()
    for f in fields(cls)
    if NoneType in get_args(HINTS[name][f.name])
}
NUMBERS = [
    (s, name, *get_args(kind)) for s, kinds in KINDS.items() for name, kind in kinds.items() if "Range" in str(kind)
]
CLOSED = [(s, name, kind) for s, kinds in KINDS.items() for name, kind in kinds.items() if choices(kind)]


def test_every_number_has_a_range():
    plain = [(s, name) for s, kinds in KINDS.items() for name, kind in kinds.items() if kind in (int, float)]
    assert plain == []
    assert len(NUMBERS) > 70


@pytest.mark.parametrize(("section", "name", "number", "limits"), NUMBERS)
@pytest.mark.parametrize("value", [nan, inf, -inf, -1e300, 1e300, -(10**30), 10**400, "7", None, True, 1j, [1]])
def test_no_number_out_of_its_range_gets_in(section, name, number, limits, value):
    if value is None and (section, name) in UNSET:
        assert getattr(config.SECTIONS[section](**{name: value}), name) is None
        return
    with pytest.raises(UserError) as caught:
        config.SECTIONS[section](**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} = ")
    assert f"should be {'a whole number' if number is int else 'a number'} {limits}. " in message
    assert len(message.splitlines()) == 1
    assert len(message) < 400


@pytest.mark.parametrize(("section", "name", "number", "limits"), NUMBERS)
def test_ends_of_ranges(section, name, number, limits):
    made, unset = config.SECTIONS[section], UNSET.get((section, name))
    for end, is_open, beyond in ((limits.least, limits.open_below, -1), (limits.most, limits.open_above, 1)):
        if is_open and end != unset:
            with pytest.raises(UserError, match=f"^{name} = "):
                made(**{name: number(end)})
        else:
            kept = getattr(made(**{name: end}), name)
            assert kept is None if end == unset else kept == end and type(kept) is number
        if unset in (end + beyond, end):
            assert getattr(made(**{name: unset}), name) is None
            continue
        with pytest.raises(UserError, match=f"^{name} = "):
            made(**{name: end + beyond})
    default = getattr(made(), name)
    assert (unset is not None) if default is None else default in limits


@pytest.mark.parametrize(("section", "name"), UNSET)
def test_what_may_be_none(section, name):
    made = config.SECTIONS[section]
    assert [getattr(made(**{name: value}), name) for value in (None, UNSET[section, name])] == [None, None]
    assert made(**{name: None}).plain()[name] == UNSET[section, name]


@pytest.mark.parametrize(("section", "name", "kind"), CLOSED)
def test_closed_choices(section, name, kind):
    for known in get_args(kind):
        assert getattr(config.SECTIONS[section](**{name: known}), name) == known
    word = choices(kind)[0]
    with pytest.raises(UserError, match=rf"^{name} = '{word}x' is none of .*; did you mean '{word}'\?$"):
        config.SECTIONS[section](**{name: word + "x"})
    for wrong in (3, [word], word.upper() + "!", *[None] * ((section, name) not in UNSET)):
        with pytest.raises(UserError, match=f"^{name} = .* is none of "):
            config.SECTIONS[section](**{name: wrong})


@pytest.mark.parametrize("section", config.SECTIONS)
def test_wrong_types(section):
    for name, kind in KINDS[section].items():
        wrong = {str: 3, bool: 1, list: ["mp-20", 3], dict: "x"}.get(get_origin(kind) or kind)
        if wrong is not None and get_origin(kind) is not Annotated:
            with pytest.raises(UserError, match=f"^{name} = .* should be "):
                config.SECTIONS[section](**{name: wrong})


def test_numbers_of_numpy_are_taken_as_they_are_meant():
    made = FinetuneConfig(steps=np.int64(3), lr=np.float32(0.5), beta=1)
    assert (made.steps, made.lr, made.beta) == (3, 0.5, 1.0)
    assert [type(x) for x in (made.steps, made.lr, made.beta)] == [int, float, float]


def test_checked_settings_stay_as_they_are():
    with pytest.raises(FrozenInstanceError):
        FinetuneConfig().lr = nan


def test_open_below_and_above():
    assert [x in Range(0, 1, open_below=True) for x in (0, 1e-9, 1)] == [False, True, True]
    assert [x in Range(0, 1, open_above=True) for x in (0, 1 - 1e-9, 1)] == [True, True, False]
    assert str(Range(0, 10**6, open_above=True)) == "at least 0 and below 1,000,000"


def test_the_source_is_named_and_flags_win(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cfrl.toml").write_text("[sample]\ntemperature = inf\n")
    with pytest.raises(UserError, match=r"^cfrl\.toml: temperature = inf should be a number at least 0.01 and"):
        resolve(SampleConfig)
    assert resolve(SampleConfig, {"temperature": 0.5}).temperature == 0.5
    with pytest.raises(UserError, match=r"^top_p = 0.0 should be"):
        resolve(SampleConfig, {"temperature": 0.5, "top_p": 0.0})
    with pytest.raises(UserError, match=r"^cfrl\.toml: temperature"):
        resolve(SampleConfig, {"top_p": 0.5})


FLAGS = [
    *[f"finetune --{flag}" for flag in ("lr nan", "lr 1e30", "lr 0", "beta nan", "clip-gradient nan", "batch-size -1")],
    *[f"finetune --{flag}" for flag in ("temperature inf", "temperature 0", "top-p 1.5", "seed -1", "algorithm pppo")],
    *[f"finetune --{flag}" for flag in ("reward-timeout nan", "caution -inf", "entropy-species nan")],
    *[f"pretrain --{flag}" for flag in ("weight-decay nan", "lr nan", "batch-size -1", "keep bset", "preset defualt")],
    *[f"sample --{flag}" for flag in ("temperature inf", "temperature -1", "top-p 0", "n 1000000000000", "seed -1")],
    *[f"screen x.cif --{flag}" for flag in ("fmax nan", "max-density inf", "workers -1", "dft pbee", "engine locall")],
    *[f"retrieve --{flag}" for flag in ("top 0", "samples -1", "rank crystl", "split trian")],
    *[
        f"data import x.cif -o x.h5 --{flag}"
        for flag in ("validation nan", "test -0.1", "symprec nan", "split-by moon")
    ],
    *[f"data hull x.h5 -o y.h5 --{flag}" for flag in ("near-hull nan", "workers -1")],
    *[f"rewards train x.csv -o x.safetensors --{flag}" for flag in ("zero nan", "folds 1", "members 0", "hidden -1")],
]


@pytest.mark.parametrize("line", FLAGS)
def test_flags_out_of_range_leave_nothing_behind(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cfrl", *line.split()])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    (message,) = capsys.readouterr().err.splitlines()
    name = line.split("--")[-1].split()[0].replace("-", "_")
    assert message.startswith(f"cfrl: error: {name} = ")
    assert " should be a" in message or " is none of " in message
    assert list(tmp_path.iterdir()) == []


def test_flags_and_files_of_a_resumed_run(tmp_path, monkeypatch, capsys):
    """The run is left as it was."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "20260131-142507-finetune-density"
    run.mkdir(parents=True)

    def resumed(settings: str, *flags: str) -> str:
        (run / "config.toml").write_text(f"[finetune]\n{settings}")
        monkeypatch.setattr(sys, "argv", ["cfrl", "finetune", "--resume", "last", *flags])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2
        assert [path.name for path in run.iterdir()] == ["config.toml"]
        return capsys.readouterr().err

    assert resumed('reward = "density"\n', "--beta", "nan").startswith("cfrl: error: beta = nan should be")
    line = resumed('reward = "density"\nbeta = nan\n')
    assert line.startswith(f"cfrl: error: {run.relative_to(tmp_path)}/config.toml: beta = nan should be")


@pytest.mark.parametrize("section", config.SECTIONS)
def test_help_by_theme(section):
    """Every setting under one heading at most; what is used every day under none."""
    cls = config.SECTIONS[section]
    themed = [name for names in cls.THEMES.values() for name in names]
    assert len(themed) == len(set(themed))
    assert set(themed) <= {f.name for f in fields(cls)}
    assert len(fields(cls)) - len(themed) <= 16
