"""A dataset that grows: what is exchanged for what, which kinds are kept, who competes with whom; kills, bad input."""

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from pymatgen.analysis.structure_matcher import StructureMatcher
from pymatgen.core import Lattice, Structure

from cfrl.commands.data_grow import COLUMNS, REASONS, grow
from cfrl.config import GrowConfig
from cfrl.crystals.crystal import CrystalBatch
from cfrl.crystals.elements import ATOMIC_NUMBERS, SYMBOLS
from cfrl.crystals.kinds import kinds
from cfrl.crystals.known import KnownFormulas
from cfrl.crystals.refusal import REFUSED, Refusal
from cfrl.crystals.substitution import substitute, substitution_table
from cfrl.errors import UserError
from cfrl.io.catalogue import dataset_path
from cfrl.io.datasets import load_dataset
from cfrl.io.storage import append_crystals, read_columns, read_crystals, write_crystals
from cfrl.potentials import load_potential
from cfrl.runs.folder import RunFolder
from cfrl.screening import balance
from cfrl.screening.candidates import MODEL, SOURCES, SUBSTITUTION, as_record, from_record, near_copies, source_of
from cfrl.screening.growth import Growth
from cfrl.screening.options import GrowthOptions
from cfrl.stability.hull import ReferenceHull
from tests.test_config import cfrl

# ---- exchanged elements ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> np.ndarray:
    return substitution_table()


def rock_salt(a: str, b: str, edge: float = 5.0) -> Structure:
    return Structure.from_spacegroup(225, Lattice.cubic(edge), [a, b], [[0, 0, 0], [0.5, 0.5, 0.5]])


def test_elements_are_exchanged_for_such_as_take_their_places(table):
    def likeliest(symbol: str) -> list[str]:
        row = table[ATOMIC_NUMBERS[symbol]].copy()
        row[ATOMIC_NUMBERS[symbol]] = 0
        return [SYMBOLS[z] for z in row.argsort()[::-1][:4] if row[z]]

    assert likeliest("Ba")[0] == "Sr"
    assert set(likeliest("La")) <= {"Nd", "Sm", "Pr", "Ce", "Gd"}
    assert likeliest("O") == ["S", "Se"]
    assert table[ATOMIC_NUMBERS["Na"], ATOMIC_NUMBERS["Cl"]] == 0, "of opposite charge"
    sums = table.sum(1)
    assert np.allclose(sums[sums > 0], 1)
    assert not table[[0, 2, 10, 118]].any(), "nothing, noble gases, and what no data are of"


def test_exchanges_follow_the_table(table):
    """Every pair of elements in place of MgO's: drawn as often as two independent draws say, given that one goes and
    that they differ."""
    crystals = CrystalBatch.from_structures([rock_salt("Mg", "O")])[[0] * 20000]
    drawn = Counter(map(tuple, substitute(crystals, table, np.random.default_rng(0)).species.tolist()))
    assert sum(drawn.values()) == 20000
    old = crystals.species[0].tolist()
    law = np.outer(table[old[0]], table[old[1]])
    law[range(119), range(119)] = 0
    law[old[0], old[1]] = 0
    law /= law.sum()
    share = np.zeros_like(law)
    for (a, b), count in drawn.items():
        share[a, b] = count / 20000
    assert 0.5 * np.abs(share - law).sum() < 0.03


def test_only_elements_and_size_change(table):
    parents = load_dataset("prototypes")
    made = substitute(parents, table, np.random.default_rng(1))
    place = {name: row for row, name in enumerate(parents.ids)}
    parents = parents[[place[name] for name in made.ids]]
    assert len(made) > 200
    assert (made.species != parents.species).any(1).all()
    assert torch.equal(made.wyckoff, parents.wyckoff)
    assert torch.equal(made.frac_coords, parents.frac_coords)
    assert torch.equal(made.lattice[:, 3:], parents.lattice[:, 3:])
    counts = [len(set(row) - {0}) for row in made.species.tolist()]
    assert counts == [len(set(row) - {0}) for row in parents.species.tolist()], "no two elements become one"
    larger = substitute(CrystalBatch.from_structures([rock_salt("Mg", "O")] * 500), table, np.random.default_rng(0))
    barium = larger[(larger.species == 56).any(1) & (larger.species == 8).any(1)]
    assert (barium.lattice[:, 0] > 5.2).all()
    unknown = CrystalBatch.from_structures([rock_salt("Ar", "O")])
    assert len(substitute(unknown, table, np.random.default_rng(0))) == 0


# ---- which kinds -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_what_is_kept_has_the_shares_that_are_wanted(power):
    """A world of two kinds times three space groups that depend on each other, proposed and surviving at rates of their
    own: after some blocks the kept ones are as the target says, to within what chance does."""
    rng = np.random.default_rng(0)
    kind, group = np.array([0, 0, 0, 7, 7, 7]), np.array([225, 62, 2, 225, 62, 2])
    proposed_share = np.array([0.42, 0.12, 0.1, 0.1, 0.16, 0.1])
    survives = np.array([0.6, 0.3, 0.2, 0.3, 0.2, 0.1])
    real = np.zeros(balance.SHAPE, dtype=np.int64)
    real[kind, group] = [800, 300, 100, 200, 500, 100]
    counts = {name: np.zeros(balance.SHAPE, dtype=np.int64) for name in ("proposed", "passed", "kept")}
    late = np.zeros(balance.SHAPE)
    for block in range(30):
        accept = balance.acceptance(real, **counts, balance=power)
        drawn = rng.multinomial(40_000, proposed_share)
        passed = rng.binomial(drawn, accept[kind, group])
        kept = rng.binomial(passed, survives)
        for name, new in (("proposed", drawn), ("passed", passed), ("kept", kept)):
            counts[name][kind, group] += new
        if block >= 5:
            late[kind, group] += kept
            assert passed.sum() == pytest.approx(40_000 / balance.DRAWS, rel=0.1)
    for wanted, found in zip(balance.target(real, power), (late.sum(1), late.sum(0)), strict=True):
        there = wanted > 0
        assert found[~there].sum() == 0
        assert found[there] / found.sum() == pytest.approx(wanted[there], abs=0.02)
    kinds_wanted = balance.target(real, power)[0][[0, 7]]
    ratio = {0.0: 1.5, 0.5: 1.5**0.5, 1.0: 1.0}[power]
    assert kinds_wanted[0] / kinds_wanted[1] == pytest.approx(ratio)


def test_what_is_too_rare_always_passes():
    real, proposed = (np.zeros(balance.SHAPE, dtype=np.int64) for _ in range(2))
    real[0, 225], real[7, 62] = 100, 100
    proposed[0, 225], proposed[7, 62], proposed[9, 1] = 100_000, 50, 1
    accept = balance.acceptance(real, proposed, proposed // 8, proposed // 16, balance=0.0)
    assert accept[7, 62] == 1
    assert accept[0, 225] == pytest.approx(1 / balance.DRAWS, rel=0.05)
    assert accept[9, 1] > 0, "what comes up without being among the real crystals has a chance"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 1.0])
def test_sources_take_turns(share):
    made = [source_of(lot, share) for lot in range(1, 101)]
    assert made.count(SUBSTITUTION) == round(100 * share)
    assert set(made) <= set(SOURCES)
    if share == 0.5:
        assert made[:4] == [MODEL, SUBSTITUTION, MODEL, SUBSTITUTION]


# ---- who competes with whom --------------------------------------------------------------------------------------


def test_phases_can_be_added_to_a_hull():
    """The same distances as by a hull made of all of them at once, also where it had been asked before."""
    first = {"Li": 0.0, "O": 0.0, "Fe": 0.0, "Li2O": -1.5, "FeO": -1.0}
    more = {"LiFeO2": -1.6, "Fe2O3": -1.4, "LiFe2O3": -0.5}
    asked = ["LiFeO2", "LiO", "Fe3O4", "Li5FeO4"]
    hull, whole = (ReferenceHull.from_compositions([*p], [*p.values()], "mp2020") for p in (first, first | more))
    before = hull.e_above_hull(asked, np.zeros(4)).e_above_hull
    hull.add([*more], [*more.values()])
    found, expected = hull.e_above_hull(asked, np.zeros(4)), whole.e_above_hull(asked, np.zeros(4))
    assert found.e_above_hull == pytest.approx(expected.e_above_hull)
    assert found.num_references.tolist() == expected.num_references.tolist()
    assert len(hull) == 8
    assert (found.e_above_hull > before + 0.01).tolist() == [True, False, True, True]


@pytest.fixture
def reference() -> ReferenceHull:
    return ReferenceHull.from_compositions(["Na", "Ag"], [0.0, 0.0], "mp2020")


LOOSE = ("sparse_reference",)


def growth(reference: ReferenceHull, grown: CrystalBatch | None = None, known: CrystalBatch | None = None, **options):
    real = load_dataset("prototypes")
    grown = CrystalBatch.empty() if grown is None else grown
    return Growth(GrowthOptions(**options), reference, known, real, grown, LOOSE)


def lot(*found: tuple[Structure, float]) -> dict:
    """A record as a worker gives it, through JSON."""
    crystals = CrystalBatch.from_structures([structure for structure, _ in found])
    record = {
        "source": MODEL,
        "counts": {"candidates": 10, "relaxed": len(found)},
        "proposed": [[5], [10]],
        "passed": [[5], [3]],
        "crystals": as_record(crystals),
        "energy_per_atom": [energy for _, energy in found],
        "parent": [""] * len(found),
        "place": [5] * len(found),
    }
    return json.loads(json.dumps(record))


def layered(edge: float = 3.0) -> Structure:
    """Na2Ag, in the structure of MoSi2."""
    sites = [[0, 0, 1 / 3], [0, 0, 0]]
    return Structure.from_spacegroup(139, Lattice.tetragonal(edge, 9.0), ["Na", "Ag"], sites)


def test_later_finds_compete_with_earlier_ones(reference):
    """NaAg at -0.08 eV/atom lowers the hull at Na2Ag by 2/3 of that: +0.05 becomes +0.1033."""
    by_itself = growth(reference)
    kept, columns, _ = by_itself.take(lot((layered(), 0.05)))
    assert kept.formulas() == ["Na2Ag"]
    assert columns["e_above_hull"] == pytest.approx([0.05])
    after = growth(reference)
    kept, columns, _ = after.take(lot((rock_salt("Na", "Ag"), -0.08)))
    assert columns["e_above_hull"] == pytest.approx([-0.08])
    kept, _, counts = after.take(lot((layered(), 0.05)))
    assert (len(kept), counts["above_hull"]) == (0, 1)
    kept, columns, _ = after.take(lot((layered(), 0.04)))
    assert columns["e_above_hull"] == pytest.approx([0.04 + 0.16 / 3])
    assert columns["e_above_reference"] == pytest.approx([0.04])


def test_a_row_of_finds_does_not_lead_away_from_the_reference(reference):
    """Each only a little below the last one, the third too far below what is known."""
    chain = growth(reference)
    for energy, kept in ((-0.06, 1), (-0.09, 1), (-0.12, 0)):
        found = rock_salt("Na", "Ag", edge=5.0)
        if energy == -0.09:
            found = Structure.from_spacegroup(221, Lattice.cubic(3.5), ["Na", "Ag"], [[0, 0, 0], [0.5, 0.5, 0.5]])
        if energy == -0.12:
            found = Structure.from_spacegroup(216, Lattice.cubic(6), ["Na", "Ag"], [[0, 0, 0], [0.25, 0.25, 0.25]])
        crystals, _, counts = chain.take(lot((found, energy)))
        assert len(crystals) == kept
    assert counts["far_below_hull"] == 1


def test_nothing_is_kept_twice(reference):
    """The same crystal again; the same in disguise, atoms off by 0.03 angstrom; and in a state that was read back."""
    state = growth(reference)
    kept, columns, _ = state.take(lot((rock_salt("Na", "Ag"), 0.0)))
    assert state.take(lot((rock_salt("Na", "Ag", 5.1), 0.0)))[2]["copy_relaxed"] == 1
    shifted = rock_salt("Na", "Ag")
    shifted.translate_sites([0], [0.006, 0.004, 0.002])
    disguised = lot((shifted, 0.0))
    assert near_copies(from_record(disguised["crystals"])) != near_copies(kept)
    assert state.take(disguised)[2]["duplicate"] == 1
    kept.properties = {name: torch.as_tensor(values) for name, values in columns.items() if values.dtype.kind == "f"}
    again = growth(reference, grown=kept)
    assert again.take(disguised)[2]["duplicate"] == 1
    assert again.take(lot((rock_salt("Na", "Ag"), 0.0)))[2]["copy_relaxed"] == 1
    lanthanides = growth(ReferenceHull.from_compositions(["Nd", "Sm", "Se"], [0.0, 0.0, 0.0], "mp2020"))
    _, _, counts = lanthanides.take(lot((rock_salt("Nd", "Se"), 0.0), (rock_salt("Sm", "Se"), 0.0)))
    assert (counts["kept"], counts["copy_relaxed"]) == (1, 1), "exchanging 4f neighbours makes a near-copy"


def test_known_structures_and_formulas(reference):
    known = CrystalBatch.from_structures([rock_salt("Na", "Ag")])
    cesium = Structure.from_spacegroup(221, Lattice.cubic(3.5), ["Na", "Ag"], [[0, 0, 0], [0.5, 0.5, 0.5]])
    by_structure = growth(reference, known=known, new="structure")
    _, _, counts = by_structure.take(lot((rock_salt("Na", "Ag", 5.2), 0.0), (cesium, 0.0)))
    assert (counts["kept"], counts["copy_relaxed"]) == (1, 1)
    table = np.zeros((119, 119))
    refuses = [growth(reference, known=known, new=new).plan("", (), table).refusal for new in ("formula", "structure")]
    assert [refusal.reasons(["NaAg", "Na2Ag"]) for refusal in refuses] == [["known", ""], ["", ""]]


# ---- the command -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a dataset of small crystals, which are known and whose elements are exchanged."""
    folder = tmp_path_factory.mktemp("grow")
    crystals = load_dataset("prototypes")
    write_crystals(folder / "small.h5", crystals[crystals.num_atoms <= 8])
    return folder


def settings(folder: Path, **changes) -> GrowConfig:
    values = {"known": [str(folder / "small.h5")], "max_atoms": 8, "lot": 4, "lots": 2, "within": 0.4, "workers": 1}
    return GrowConfig(**{**values, "n": 8, "balance": 0.3, "device": "cpu", **changes})


@pytest.fixture(scope="module")
def straight(folder) -> RunFolder:
    return grow(str(folder / "straight.h5"), settings(folder), root=folder / "runs")


def result(path: Path) -> dict:
    crystals = read_crystals(path)
    tensors = ("space_group", "wyckoff", "species", "frac_coords", "lattice")
    return {name: getattr(crystals, name).tolist() for name in tensors} | {
        name: values.tolist() for name, values in read_columns(path).items()
    }


def test_what_is_kept_is_what_it_says(folder, straight):
    """New, unlike each other, near the hull by the potential's own word, small, and its provenance beside it."""
    path = folder / "straight.h5"
    crystals, columns = read_crystals(path), read_columns(path)
    assert len(crystals) >= 8
    assert set(COLUMNS) <= set(columns)
    assert set(columns["source"]) == {MODEL, SUBSTITUTION}
    parents = set(load_dataset(folder / "small.h5").ids)
    made = columns["source"] == SUBSTITUTION
    assert set(columns["parent"][made]) <= parents
    assert set(columns["parent"][~made]) == {""}
    assert set(columns["judge"]) == {"chgnet-0.3.0@mp2020"}
    assert set(columns["model"]) == {"default"}
    assert not KnownFormulas.of(load_dataset(folder / "small.h5").formulas()).holds(crystals.formulas()).any()
    assert crystals.num_atoms.max() <= 16, "at most 8 at first; a higher symmetry may have a larger cell"
    structures = crystals.to_structures()
    matcher = StructureMatcher()
    assert not [pair for pair in combinations(structures, 2) if matcher.fit(*pair)]
    again = CrystalBatch.from_structures(structures, symprec=0.05)
    assert torch.equal(again.space_group, crystals.space_group)
    energy = load_potential("chgnet").compute(structures).energy
    assert energy == pytest.approx(columns["energy_per_atom"], abs=2e-3)
    reference = ReferenceHull.load()
    above = reference.e_above_hull(crystals, columns["energy_per_atom"]).e_above_hull
    assert above == pytest.approx(columns["e_above_reference"])
    assert (columns["e_above_hull"] >= above - 1e-9).all()
    low = crystals.properties["e_above_reference"].numpy() < 0
    reference.add(crystals[np.flatnonzero(low)], columns["energy_per_atom"][low])
    last = reference.e_above_hull(crystals, columns["energy_per_atom"]).e_above_hull
    assert last == pytest.approx(columns["e_above_hull"]), "the file tells distances to the hull with all finds"


def test_elements_can_be_wished_for(folder):
    """Of what is drawn and of what is exchanged."""
    path, asked = folder / "asked.h5", {"elements": "Ca,Sr,Ba,Na,K,S,Se,Cl", "require": "S", "exclude": "Ba"}
    grow(str(path), settings(folder, **asked, n=4, lots=4, within=1.0), root=folder / "runs")
    crystals, source = read_crystals(path), read_columns(path)["source"]
    assert set(source) == {MODEL, SUBSTITUTION}
    assert (crystals.species == 16).any(1).all()
    assert set(crystals.species.unique().tolist()) <= {0, 20, 38, 11, 19, 16, 34, 17}
    with pytest.raises(UserError, match="O must be there"):
        grow(str(path), settings(folder, elements="Na,S", require="O"), root=folder / "runs")


def test_metrics_account_for_every_candidate(folder, straight):
    metrics = straight.metrics()
    columns = {name: np.array(values) for name, values in metrics.items()}
    before = sum(columns[name] for name in REASONS[: REASONS.index("relaxed")])
    after = sum(columns[name] for name in REASONS[REASONS.index("relaxed") + 1 :])
    assert (columns["candidates"] == before + columns["relaxed"]).all()
    assert (columns["relaxed"] == after).all()
    assert (columns["relaxed"] == 4).all()
    assert columns["substitution"].tolist() == [float(step % 2 == 0) for step in columns["step"]]
    crystals = read_crystals(folder / "straight.h5")
    assert columns["kept"].sum() == len(crystals)
    oxides = int((kinds(crystals)["anion"] == 0).sum())
    assert columns["kept/oxide"].sum() == oxides


def test_killed_at_any_moment_it_goes_on_to_the_same_file(folder, straight, tmp_path):
    """SIGKILL while workers are at work, then right after the output of the second block was written but not the
    checkpoint: one more start reads the first block's."""
    config = settings(folder, workers=2)
    output = tmp_path / "killed.h5"
    flags = [
        f"--{name.replace('_', '-')}={getattr(config, name)}" for name in ("n", "lot", "lots", "within", "balance")
    ]
    command = [sys.executable, "-m", "cfrl.cli", "data", "grow", "-o", str(output), "--known", *config.known, *flags]
    command += ["--max-atoms=8", "--workers=2", "--device=cpu"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 500
    while not list(tmp_path.glob("runs/*/lots/*.jsonl")) or not any(
        path.stat().st_size for path in tmp_path.glob("runs/*/lots/*.jsonl")
    ):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run = next((tmp_path / "runs").iterdir())
    done = [path.read_bytes() for path in run.glob("lots/*.jsonl")]
    assert done
    save = RunFolder.save_checkpoint

    def killed(self, state):
        if state["lot"] > 2:
            raise SystemExit
        save(self, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "save_checkpoint", killed)
        with pytest.raises(SystemExit):
            grow(None, read_back(run, workers=1), resume=run)
    assert RunFolder.open(run).load_checkpoint()["lot"] == 2
    assert max(read_columns(output, ["lot"])["lot"]) > 2
    assert list(run.glob("lots/*.jsonl")), "what the workers did is still there"
    finished = grow(None, read_back(run, workers=1), resume=run)
    assert finished.finished
    assert result(output) == result(folder / "straight.h5")
    assert finished.metrics() == straight.metrics()


def read_back(run: Path, **changes) -> GrowConfig:
    from cfrl.config import read_run_config

    return read_run_config(GrowConfig, run / "config.toml", changes)


def test_a_second_round_goes_on_from_the_first(folder, straight, tmp_path):
    """More of the same file: another number, nothing twice, and the first round's crystals as they were."""
    path = tmp_path / "more.h5"
    path.write_bytes((folder / "straight.h5").read_bytes())
    first = read_crystals(path)
    run = grow(str(path), settings(folder, n=2, substitute=1.0), root=tmp_path / "runs")
    crystals, columns = read_crystals(path), read_columns(path)
    assert len(crystals) >= len(first) + 2
    assert crystals.ids[: len(first)] == first.ids
    assert len(set(crystals.ids)) == len(crystals)
    assert columns["round"].tolist() == [1.0] * len(first) + [2.0] * (len(crystals) - len(first))
    keys = near_copies(crystals)
    assert len(set(keys)) == len(keys)
    assert run.metrics()["substitution"] == [1.0] * len(run.metrics()["step"])
    assert read_back(run.path).round == 2


@pytest.mark.parametrize(
    ("output", "changes", "message"),
    [
        (None, {}, "name the dataset to grow"),
        ("out.csv", {}, "let its name end in .h5"),
        ("nowhere/out.h5", {}, "make it first"),
        ("small.h5", {}, "not one that was grown"),
        ("grown.h5", {"round": 1}, "holds crystals of round 1 already"),
        ("grown.h5", {"potential": "chgnet:0.2.0"}, "was judged by chgnet-0.3.0@mp2020"),
        ("out.h5", {"allow": "elephant"}, "no such flag"),
        ("out.h5", {"hull": "none.csv"}, "no such hull reference"),
        ("out.h5", {"known": ["none.h5"]}, "no such file"),
        ("out.h5", {"prototypes": "no.such"}, "no such file"),
        ("out.h5", {"model": "none.safetensors"}, "no such model"),
        ("out.h5", {"prototypes": "large.h5", "max_atoms": 2}, "large.h5: holds no crystal of at most 2 atoms"),
    ],
)
def test_bad_input_leaves_no_run_folder(folder, straight, tmp_path, monkeypatch, output, changes, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.h5").write_bytes((folder / "small.h5").read_bytes())
    (tmp_path / "grown.h5").write_bytes((folder / "straight.h5").read_bytes())
    prototypes = load_dataset("prototypes")
    write_crystals(tmp_path / "large.h5", prototypes[prototypes.num_atoms > 2][:3])
    with pytest.raises(UserError, match=message):
        grow(output, settings(tmp_path, **changes))
    assert not Path("runs").exists()
    assert (tmp_path / "grown.h5").read_bytes() == (folder / "straight.h5").read_bytes()


def test_two_runs_cannot_grow_one_file(folder, tmp_path):
    with FileLock(tmp_path / ".out.h5.lock"), pytest.raises(UserError, match="another run is growing this file"):
        grow(str(tmp_path / "out.h5"), settings(folder), root=tmp_path / "runs")


def test_guards_that_leave_nothing_end_the_run(tmp_path):
    """Every exchange in one element alone is one element alone."""
    iron = Structure.from_spacegroup(229, Lattice.cubic(2.87), ["Fe"], [[0, 0, 0]])
    write_crystals(tmp_path / "small.h5", CrystalBatch.from_structures([iron]))
    with pytest.raises(UserError, match=r"none came as far as a relaxation.*element"):
        grow(str(tmp_path / "out.h5"), settings(tmp_path, substitute=1.0, lots=1), root=tmp_path / "runs")
    assert not (tmp_path / "out.h5").exists()


def test_the_command_line_says_it_in_one_line(tmp_path):
    done = cfrl("data", "grow", "-o", "out.csv", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("cfrl: error: out.csv")


def test_added_rows_of_others_are_left_alone(folder, straight, tmp_path):
    """Crystals without energies, appended by hand: known from then on, judged by nobody."""
    path = tmp_path / "mixed.h5"
    path.write_bytes((folder / "straight.h5").read_bytes())
    own = replace(load_dataset("prototypes")[:2], ids=["mine-1", "mine-2"], properties={})
    append_crystals(path, own)
    grow(str(path), settings(folder, n=1, lots=1), root=tmp_path / "runs")
    columns = read_columns(path)
    mine = np.isin(columns["ids"], ["mine-1", "mine-2"])
    assert np.isnan(columns["e_above_hull"][mine]).all()
    assert np.isfinite(columns["e_above_hull"][~mine]).all()


# ---- the embedded ones -------------------------------------------------------------------------------------------


def test_embedded_crystals_are_what_their_card_says():
    crystals = load_dataset("grown")
    guards = Refusal(REFUSED, KnownFormulas.of(load_dataset("structure-types").formulas()))
    assert not any(guards.reasons(crystals.formulas())), "known, not neutral, radioactive, ..."
    assert KnownFormulas.embedded().holds(crystals.formulas()).all(), "what the default generator learnt from"
    assert crystals.valid(min_contact=0.7).all()
    assert (crystals.properties["e_above_hull"] <= 0.1).all()
    assert (crystals.properties["e_above_hull"] >= crystals.properties["e_above_reference"].clamp(min=0) - 1e-9).all()
    keys = near_copies(crystals)
    assert len(set(keys)) == len(keys), "no near-copies"
    parents = read_columns(dataset_path("grown"), ["parent"])["parent"]
    assert 0.1 < (parents != "").mean() < 0.9
