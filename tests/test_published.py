"""Import of published checkpoints: the restricted unpickler, and parameters finding their places."""

import pickle

import numpy as np
import pytest
import torch

from cfrl.errors import UserError
from cfrl.model.published import import_published, read_checkpoint
from cfrl.model.transformer import CrystalTransformer
from tests.test_model import TINY


def published_layout(model: CrystalTransformer) -> dict[str, dict[str, np.ndarray]]:
    """Our weights under the names of the published code (haiku counts modules in the order of their making)."""
    p = {name: t.numpy() for name, t in model.state_dict().items()}
    modules = {"~": {f"{n[0]}_embeddings": p[f"{n}_embedding.weight"] for n in ("wyckoff",)}}
    modules["~"] |= {"g_embeddings": p["space_group_embedding.weight"], "a_embeddings": p["species_embedding.weight"]}
    order = ["first_hidden", "first_wyckoff", "wyckoff_in", "species_in", "coords_in.0", "coords_in.1", "coords_in.2"]
    order += ["blocks.0.mlp.0", "blocks.0.mlp.2", "blocks.1.mlp.0", "blocks.1.mlp.2", "head"]
    for i, name in enumerate(order):
        modules["linear" + (f"_{i}" if i else "")] = {"w": p[f"{name}.weight"].T, "b": p[f"{name}.bias"]}
    norms = ["blocks.0.norm_attention", "blocks.0.norm_mlp", "blocks.1.norm_attention", "blocks.1.norm_mlp", "norm"]
    for i, name in enumerate(norms):
        modules["layer_norm" + (f"_{i}" if i else "")] = {"scale": p[f"{name}.weight"], "offset": p[f"{name}.bias"]}
    for i in range(2):
        for ours, theirs in (("query", "query"), ("key", "key"), ("value", "value"), ("out", "linear")):
            attention, name = f"blocks.{i}.attention.{ours}", "multi_head_attention" + (f"_{i}" if i else "")
            modules[f"{name}/{theirs}"] = {"w": p[f"{attention}.weight"].T, "b": p[f"{attention}.bias"]}
    return modules


def test_round_trip_of_every_parameter(tmp_path):
    torch.manual_seed(0)
    model = CrystalTransformer(TINY)
    path = tmp_path / "epoch_000007.pkl"
    path.write_bytes(pickle.dumps({"params": published_layout(model), "opt_state": None}))
    back = import_published(read_checkpoint(path), num_heads=2, coord_components=4)
    ours, theirs = model.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert back.config.likelihood == "published"


class Hostile:
    def __reduce__(self):
        import os

        return os.system, ("touch hacked",)


@pytest.mark.parametrize(
    "content",
    [
        {"params": {"linear": {"w": Hostile()}}},
        {"params": {}, "opt_state": Hostile()},
        {"params": {}, "opt_state": np.float64},  # a class that no checkpoint needs
    ],
)
def test_a_pickle_with_anything_else_in_it_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=r"bad\.pkl: refused.*which no checkpoint"):
        read_checkpoint("bad.pkl")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a pickle", "refused"),
        (b"", "refused"),
        (pickle.dumps([1, 2]), "no 'params'"),
        (pickle.dumps({"params": {"linear": {"w": "text"}}}), "not an array of numbers"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, content, message):
    (tmp_path / "file.pkl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / "file.pkl")


def test_missing_and_misfitting_parameters():
    parameters = {
        f"{m}/{n}": a for m, names in published_layout(CrystalTransformer(TINY)).items() for n, a in names.items()
    }
    with pytest.raises(UserError, match="linear_3/w"):
        import_published({k: v for k, v in parameters.items() if k != "linear_3/w"}, 2, 4)
    with pytest.raises(UserError, match="not a CrystalFormer checkpoint"):
        import_published({**parameters, "linear_1/b": np.zeros(5)}, 2, 4)
    with pytest.raises(UserError, match="--num-heads"):
        import_published(parameters)
