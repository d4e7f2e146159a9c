"""Settings: defaults, then cfrl.toml, then flags; every mistake named; help that is quick."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from cfrl import config
from cfrl.config import SECTIONS, DataConfig, FinetuneConfig, PretrainConfig, SampleConfig, read_run_config, resolve
from cfrl.errors import UserError
from cfrl.settings import build, to_toml

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cfrl(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "cfrl.cli", *words], capture_output=True, text=True, **options)


def test_order(folder):
    assert resolve(PretrainConfig).epochs == PretrainConfig().epochs
    (folder / "cfrl.toml").write_text("[pretrain]\nepochs = 7\nlr = 1\n[sample]\nn = 3\n")
    assert resolve(PretrainConfig).epochs == 7
    assert resolve(PretrainConfig).lr == 1.0
    assert isinstance(resolve(PretrainConfig).lr, float)
    assert resolve(PretrainConfig, {"epochs": 9}).epochs == 9
    assert resolve(PretrainConfig, {"epochs": 9}).lr == 1.0
    assert resolve(SampleConfig).n == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[pretrain]\nepoch = 3", "unknown setting 'epoch' for PretrainConfig; did you mean 'epochs'?"),
        ("[pretrian]\nepochs = 3", r"unknown section \[pretrian\]; did you mean 'pretrain'?"),
        ("[pretrain]\nepochs = 3.5", "epochs = 3.5 should be a whole number at least 1 and at most 10,000,000. Pass"),
        ("[pretrain]\nepochs = true", "epochs = True should be a whole number"),
        ('[pretrain]\nlr = "fast"', "lr = 'fast' should be a number above 0 and at most 1. Peak learning rate"),
        ("[pretrain]\naugment = 1", "augment = 1 should be true or false"),
        ("[pretrain]\nlr = nan", "lr = nan should be a number above 0 and at most 1"),
        ('[pretrain]\nkeep = "bset"', "keep = 'bset' is none of best, last; did you mean 'best'?"),
        ("pretrain = 3", r"pretrain = 3 should be a section \[pretrain\]"),
        ("[pretrain]\nepochs = ", "cannot be read as TOML"),
        ("[data]\nsources = 3", "sources = 3 should be a table"),
    ],
)
def test_mistakes_are_named(folder, text, message):
    (folder / "cfrl.toml").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        resolve(DataConfig if "[data]" in text else PretrainConfig)
    assert str(caught.value).startswith("cfrl.toml: ")


def test_missing_file_is_an_error_only_if_named(folder):
    resolve(SampleConfig)
    with pytest.raises(UserError, match=r"nowhere\.toml"):
        resolve(SampleConfig, file=folder / "nowhere.toml")


@pytest.mark.parametrize("name", config.SECTIONS)
def test_every_section_round_trips(folder, name):
    cls = config.SECTIONS[name]
    (folder / "a.toml").write_text(to_toml({name: cls()}, comments=True))
    assert read_run_config(cls, folder / "a.toml") == cls()
    for field in fields(cls):
        assert field.metadata["help"].endswith((".", ")")), f"{name}.{field.name} has no proper help"


def test_awkward_strings_round_trip(folder):
    made = build(SampleConfig, {"model": 'tab\t"quote" \\ new\nline é'})
    (folder / "a.toml").write_text(to_toml({"sample": made}))
    assert read_run_config(SampleConfig, folder / "a.toml") == made


def test_nested_table_round_trips(folder):
    made = build(DataConfig, {"sources": {"mine": {"url": "https://x/y.csv", "sha256": "ab"}, "two": [{"url": "u"}]}})
    (folder / "a.toml").write_text(to_toml({"data": made}))
    assert read_run_config(DataConfig, folder / "a.toml") == made


def test_the_file_at_the_root_is_the_generated_one():
    made = subprocess.run([sys.executable, "-m", "cfrl.config"], capture_output=True, text=True, check=True).stdout
    assert (ROOT / "cfrl.toml").read_text() == made, "run: python -m cfrl.config > cfrl.toml"


def test_help_is_light():
    """Nothing that takes long to import is imported for the help."""
    script = (
        "import sys\nfrom cfrl.cli import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'h5py', 'pymatgen', 'moyopy', 'ase', 'chgnet', 'mace', 'matplotlib', 'scipy'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "HEAVY []" in done.stdout, done.stdout + done.stderr


def test_every_help_has_an_example():
    from typer.main import get_command

    from cfrl.cli import app

    def walk(name, command):
        yield name, command
        for word, inner in getattr(command, "commands", {}).items():
            yield from walk(f"{name} {word}", inner)

    found = dict(walk("cfrl", get_command(app)))
    assert {"cfrl", "cfrl finetune", "cfrl data import", "cfrl rewards train", "cfrl doctor"} <= found.keys()
    assert [name for name, command in found.items() if f"Example: {name}" not in command.help.replace("\n", " ")] == []


def test_faults_are_one_line(folder):
    done = cfrl("data", "info", "nothing-like-this")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("cfrl: error: no dataset named 'nothing-like-this'")
    traced = cfrl("data", "info", "nothing-like-this", "--debug")
    assert traced.returncode != 0
    assert "Traceback" in traced.stderr


def test_flags_are_the_fields(folder):
    (folder / "cfrl.toml").write_text("[data]\nsymprec = -1\n")
    help_text = cfrl("data", "import", "--help", env={"COLUMNS": "200", "PATH": "", "TERM": "dumb"}).stdout
    for field in fields(DataConfig):
        shown = f"--{field.name.replace('_', '-')}" in help_text
        assert shown == (field.name != "sources"), field.name


def test_settings_of_older_versions(tmp_path):
    """Their names, and 0 or nothing where today a value is not set."""
    old = '[finetune]\nbatch_size = 96\nsample_batch = 12\nminibatch = 24\nmax_atoms = 0\ncaution = -1.0\nhull = ""\n'
    (tmp_path / "config.toml").write_text(old)
    settings = read_run_config(FinetuneConfig, tmp_path / "config.toml")
    assert (settings.n, settings.draw_size, settings.batch_size) == (96, 12, 24)
    assert (settings.max_atoms, settings.caution, settings.hull) == (None, None, None)
    (tmp_path / "config.toml").write_text("[sample]\nbatch_size = 9\n")
    assert read_run_config(SampleConfig, tmp_path / "config.toml").draw_size == 9


@pytest.mark.parametrize("config", [cls() for cls in SECTIONS.values()], ids=list(SECTIONS))
def test_what_is_not_set_is_written_and_read(config, tmp_path):
    name = next(name for name, cls in SECTIONS.items() if isinstance(config, cls))
    (tmp_path / "config.toml").write_text(to_toml({name: config}))
    assert read_run_config(type(config), tmp_path / "config.toml") == config
    assert type(config)(**config.plain()) == config
