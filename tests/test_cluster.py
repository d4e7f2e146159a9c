"""Ray: what it is given at once, and what a lost machine costs. That it is an engine like others: test_engine.py."""

import csv
import json
import os
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from pymatgen.io.cif import CifWriter

from cfrl.io.datasets import load_dataset
from cfrl.io.importing import read_files
from cfrl.io.options import ImportOptions
from cfrl.runs.engine import RayEngine
from cfrl.runs.journal import Record, Work

ray = pytest.importorskip("ray", reason="needs pip install 'cfrl[ray]'")


def squares(items: list[int]) -> list[int]:
    return [item**2 for item in items]


def gpus_seen(items: list[int]) -> list[str]:
    return [os.environ.get("CUDA_VISIBLE_DEVICES", "") for _ in items]


def noted_squares(items: list[int], folder: str) -> list[Record]:
    """Takes its time, and leaves word of the machine that it is on."""
    Path(folder, ray.get_runtime_context().get_node_id()).touch()
    time.sleep(0.2)
    return [{"square": item**2} for item in items]


def test_a_cluster_gets_no_more_than_it_can_soon_begin() -> None:
    taken = []
    with RayEngine(2) as engine:
        results = engine.map(squares, (taken.append(i) or [i] for i in range(100)))
        for done, _ in enumerate(results, 1):
            assert len(taken) <= done + 2 * 2
    assert len(taken) == 100


def test_an_import_is_the_same(tmp_path: Path) -> None:
    cifs = [str(CifWriter(structure)) for structure in load_dataset("prototypes")[:150].to_structures()]
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["cif"], *([text] for text in [*cifs, "no crystal", *cifs])])
    here, there = (
        read_files([str(path)], ImportOptions(workers=workers, engine=engine))
        for workers, engine in ((1, "local"), (2, "ray"))
    )
    assert len(here.crystals) > 250
    assert here.dropped == there.dropped
    assert here.crystals.ids == there.crystals.ids
    for name in ("space_group", "wyckoff", "species", "frac_coords", "lattice"):
        assert torch.equal(getattr(here.crystals, name), getattr(there.crystals, name))


def test_a_chunk_that_needs_a_gpu_has_one_to_itself() -> None:
    """Ray takes our word for how many there are."""
    ray.init(num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    try:
        for device, seen in (("cuda", "0"), ("cpu", "")):
            with RayEngine(2, device=device) as engine:
                assert dict(engine.map(gpus_seen, [[1]])) == {0: [seen]}
    finally:
        ray.shutdown()


def test_a_machine_that_is_lost_costs_nothing_but_time(tmp_path: Path) -> None:
    """Two machines, one of which is killed at work: every row is in the journal, and none twice."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    other, seen = cluster.add_node(num_cpus=1), tmp_path / "seen"
    seen.mkdir()

    def kill() -> None:
        while not (seen / other.node_id).exists():
            time.sleep(0.02)
        cluster.remove_node(other, allow_graceful=False)

    killer = threading.Thread(target=kill)
    try:
        cluster.wait_for_nodes()
        with RayEngine(2, cluster.address) as engine:
            killer.start()
            work = Work(tmp_path / "journals", engine, "", None)
            items = {row: row for row in range(60)}
            records = work.run("squares", partial(noted_squares, folder=str(seen)), items, {}, chunk=2)
            killer.join(60)
    finally:
        cluster.shutdown()
    assert len(list(seen.iterdir())) == 2, "both machines were at work"
    assert records == {row: {"square": row**2} for row in range(60)}
    [journal] = (tmp_path / "journals").iterdir()
    written = [key for line in journal.read_text().splitlines() for key in json.loads(line)]
    assert sorted(written, key=int) == [str(row) for row in range(60)]
