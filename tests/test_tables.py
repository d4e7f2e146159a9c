"""Tables: what is written comes back, unknown stays unknown, and names are told apart."""

import csv
from pathlib import Path

import numpy as np
import pytest

from cfrl.errors import UserError
from cfrl.io.catalogue import at_hand
from cfrl.tables import distinct, join, read_csv, write_csv


def test_csv_comes_back(tmp_path: Path) -> None:
    columns = {
        "id": np.array(["7", "a, b", ""], object),
        "formula": ["InF", "NaN", "Na3N"],
        "wide": np.array([1.23456789, np.nan, -2e-9], np.float32),
        "whole": np.array([3, 0, 2_000_000]),
        "kind": ["x", "", "1"],
    }
    write_csv(tmp_path / "a.csv", columns)
    with open(tmp_path / "a.csv", newline="") as file:
        assert list(csv.reader(file))[1:3] == [["7", "InF", "1.23457", "3", "x"], ["a, b", "NaN", "", "0", ""]]
    back = read_csv(tmp_path / "a.csv")
    assert [back[name] for name in ("id", "formula", "kind")] == [["7", "a, b", ""], columns["formula"], ["x", "", "1"]]
    np.testing.assert_allclose(back["wide"], columns["wide"], rtol=1e-5)
    assert back["whole"] == [3, 0, 2_000_000]
    with pytest.raises(ValueError, match=r"longer|shorter"):
        write_csv(tmp_path / "b.csv", {"a": [1], "b": [1, 2]})
    assert not (tmp_path / "b.csv").exists()
    with pytest.raises(UserError, match=r"b.csv: there is no such file"):
        read_csv(tmp_path / "b.csv")


def test_parts_that_lack_a_column_have_nan_in_it() -> None:
    joined = join([{"a": np.ones(2), "b": np.zeros(2)}, {"a": np.full(1, 3.0)}])
    np.testing.assert_equal(joined, {"a": np.array([1, 1, 3.0]), "b": np.array([0, 0, np.nan])})


def test_names_are_told_apart_from_all_others() -> None:
    assert distinct(["a", "b", "a", "a#2", "a"]) == ["a", "b", "a#2", "a#2#2", "a#3"]
    assert len(set(distinct(["x"] * 50 + ["x#7"] * 3))) == 53
    assert distinct(["q", "q"], "-") == ["q", "q-2"]


def test_what_is_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not any(map(at_hand, ("a.csv", "a.h5", "no-such-name", "folder/a")))
    for name in ("a.csv", "a.h5"):
        Path(name).touch()
        assert at_hand(name)
