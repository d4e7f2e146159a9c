"""A potential in an environment of its own: this file runs there, by its path, and needs no other of cfrl.

    python worker.py FAMILY MODEL DEVICE

It needs numpy, ASE, and what the family is made of. What it speaks with the process that started it, over stdin and
stdout, are messages: the four bytes "cfrl", the length of a header (4 bytes), the header (JSON; `arrays` lists name,
kind and shape of each array), and the arrays' bytes after one another. First it says what it is, or the error that
keeps it from being anything; then each request, a batch of n crystals, is answered by n messages in their order. It
ends with its stdin.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # the modules beside this file are no modules of this environment
    sys.path = [path for path in sys.path if os.path.abspath(path) != os.path.dirname(os.path.abspath(__file__))]

import json
import math
import struct
import threading
import time
import warnings

import numpy as np

MAGIC = b"cfrl"
KINDS = {"float": "<f8", "int": "<i8"}
MAX_HEADER, MAX_BYTES = 1 << 20, 1 << 30
STRESS = [0, 3, 5, 3, 1, 4, 5, 4, 2]  # xx yy zz xy yz zx, SevenNet's order, as a matrix


# ---- messages ----


def write_message(stream, header, **arrays):
    """Send a header, a dict of plain values, and arrays of numbers."""
    listed, parts = [], []
    for name, array in arrays.items():
        array = np.asarray(array)
        kind = "int" if array.dtype.kind in "iu" else "float"
        listed.append([name, kind, list(array.shape)])
        parts.append(np.ascontiguousarray(array, dtype=KINDS[kind]).tobytes())
    text = json.dumps({**header, "arrays": listed}).encode()
    stream.write(b"".join([MAGIC, struct.pack("<I", len(text)), text, *parts]))
    stream.flush()


def read_message(stream):
    """Header and arrays by name. Raises EOFError at the end of the stream, ValueError for what is no message."""
    if _read(stream, len(MAGIC)) != MAGIC:
        raise ValueError("no message of a worker")
    (length,) = struct.unpack("<I", _read(stream, 4))
    if length > MAX_HEADER:
        raise ValueError(f"a header of {length} bytes")
    header = json.loads(_read(stream, length))
    if not isinstance(header, dict):
        raise ValueError("a header that is no table")
    arrays = {}
    for name, kind, shape in header.pop("arrays", ()):
        size = 8 * math.prod(shape)
        if not 0 <= size <= MAX_BYTES:
            raise ValueError(f"an array of {size} bytes")
        arrays[name] = np.frombuffer(_read(stream, size), dtype=KINDS[kind]).reshape(shape)
    return header, arrays


def _read(stream, size):
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


# ---- models ----


class Model:
    """Crystals by an ASE calculator, one after the other.

    elements: atomic numbers that it knows, None where it does not tell. cutoff: angstrom, likewise.
    """

    def __init__(self, calculator, elements=None, cutoff=None):
        if not callable(getattr(calculator, "get_potential_energy", None)):
            raise TypeError(f"a {type(calculator).__name__} is no ASE calculator")
        self.calculator, self.elements, self.cutoff = calculator, elements, cutoff

    def evaluate(self, crystals, forces, stress):
        """Yield for each ASE Atoms the energy (eV), forces (eV/angstrom) and stress (eV/angstrom^3), where wanted."""
        for atoms in crystals:
            getattr(self.calculator, "reset", int)()  # one that failed believes that it has seen the crystal
            atoms.calc = self.calculator
            found = {"energy": atoms.get_potential_energy()}
            if forces:
                found["forces"] = atoms.get_forces()
            if stress:
                found["stress"] = atoms.get_stress(voigt=False)
            yield found


class SevenNet(Model):
    """Crystals by a SevenNet network, all of a batch at once."""

    def evaluate(self, crystals, forces, stress):
        from sevenn.atom_graph_data import AtomGraphData
        from sevenn.train.dataload import unlabeled_atoms_to_graph
        from torch_geometric.loader.dataloader import Collater

        own = self.calculator
        graphs = [unlabeled_atoms_to_graph(atoms, own.cutoff, with_shift=False) for atoms in crystals]
        graphs = [AtomGraphData.from_numpy_dict(graph) for graph in graphs]
        for graph in graphs if own.modal else ():
            graph["data_modality"] = own.modal
        own.model.set_is_batch_data(True)
        out = own.model(Collater([], None, None)(graphs).to(own.device))
        energy, force, pressure = (
            out[f"inferred_{name}"].detach().double().cpu().numpy() for name in ("total_energy", "force", "stress")
        )
        ends = np.cumsum([len(atoms) for atoms in crystals])
        for row, (end, atoms) in enumerate(zip(ends, crystals, strict=True)):
            yield {
                "energy": energy[row],
                "forces": force[end - len(atoms) : end],
                "stress": -pressure[row][STRESS].reshape(3, 3),
            }


def sevennet(model, device):
    from sevenn.calculator import SevenNetCalculator

    name, _, modal = model.partition("/")  # 7net-omni/mpa: one of the kinds of energies that the model has learnt
    calculator = SevenNetCalculator(name, device=device, modal=modal or None)
    return SevenNet(calculator, [int(z) for z in calculator.type_map], float(calculator.cutoff))


def orb(model, device):
    from orb_models.forcefield import pretrained

    try:
        from orb_models.forcefield.inference.calculator import ORBCalculator
    except ImportError:  # before 0.6
        from orb_models.forcefield.calculator import ORBCalculator
    network = getattr(pretrained, model.replace("-", "_"))(device=device, compile=False)
    parts = network if isinstance(network, tuple) else (network,)  # since 0.6 with what makes its graphs
    return Model(ORBCalculator(*parts, device=device), cutoff=6.0)


def mattersim(model, device):
    from mattersim.forcefield import MatterSimCalculator

    return Model(MatterSimCalculator(load_path=f"{model}.pth", device=device), list(range(1, 90)), 5.0)


def fairchem(model, device):
    from fairchem.core import FAIRChemCalculator, pretrained_mlip

    name, _, task = model.partition("/")  # uma-s-1p2/omat
    unit = pretrained_mlip.get_predict_unit(name, device=device)
    return Model(FAIRChemCalculator(unit, task_name=task or None), cutoff=6.0)


def nequip(model, device):
    from nequip.integrations.ase import NequIPCalculator

    if model.endswith((".nequip.pt2", ".nequip.pth")):  # compiled by nequip-compile
        return Model(NequIPCalculator.from_compiled_model(model, device=device))
    package = model if model.endswith((".zip", ".ckpt")) else f"nequip.net:mir-group/{model}"  # NequIP-OAM-L:0.1
    return Model(NequIPCalculator._from_saved_model(package, device=device))


def matgl(model, device):
    import matgl
    from matgl.ext.ase import PESCalculator

    potential = matgl.load_model(model).to(device)
    return Model(PESCalculator(potential, stress_unit="eV/A3"), cutoff=float(potential.model.cutoff))  # else GPa


def grace(model, device):
    from tensorpotential.calculator import grace_fm

    return Model(grace_fm(model), cutoff=6.0)  # tensorflow takes the device that there is


def ase(model, device):
    """`package.module:factory`; a factory that has a `device` gets it."""
    import importlib
    import inspect

    module, _, name = model.partition(":")
    factory = getattr(importlib.import_module(module), name)
    parameters = inspect.signature(factory).parameters
    return Model(factory(device=device) if "device" in parameters else factory())


FAMILIES = {f.__name__: f for f in (sevennet, orb, mattersim, fairchem, nequip, matgl, grace, ase)}


# ---- the worker ----


def serve(family, model, device):
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what packages print goes to stderr, where it disturbs no message
    requests = os.fdopen(os.dup(0), "rb")
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    warnings.simplefilter("ignore")
    try:
        model = FAMILIES[family](model, device)
    except BaseException as error:  # SystemExit too: whatever it is, it is to be told
        write_message(answers, {"error": describe(error)})
        return
    write_message(answers, {"elements": model.elements, "cutoff": model.cutoff})
    while True:
        try:
            header, arrays = read_message(requests)
        except EOFError:
            return
        for found in _answers(model, list(_crystals(arrays)), header["forces"], header["stress"]):
            write_message(answers, {"status": found.pop("status", "")}, **found)


def _answers(model, crystals, forces, stress):
    """One for each crystal; where a batch fails, each of those that are left alone."""
    done = 0
    try:
        for found in model.evaluate(crystals, forces, stress):
            yield found
            done += 1
    except Exception as error:
        if len(crystals) == 1:
            yield {"status": f"failed: {describe(error)}"}
            return
        for atoms in crystals[done:]:
            yield from _answers(model, [atoms], forces, stress)


def _crystals(arrays):
    from ase import Atoms

    ends = np.cumsum(arrays["atoms"])
    for end, size, matrix in zip(ends, arrays["atoms"], arrays["matrix"], strict=True):
        numbers, frac = (arrays[name][end - size : end] for name in ("numbers", "frac"))
        yield Atoms(numbers, scaled_positions=frac, cell=matrix, pbc=True)


def describe(error):
    """Kind and first line of an error, and of the one that it began with."""
    first = error
    while first.__cause__ is not None:
        first = first.__cause__
    texts = []
    for one in (error, first)[: 1 + (first is not error)]:
        lines = [line.strip() for line in str(one).splitlines() if line.strip()]
        texts.append(f"{type(one).__name__}: {lines[0] if lines else ''}"[:200])
    return "; at first ".join(texts)


def _end_with_parent(parent):
    """A killed command must not leave a worker at work."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    serve(*sys.argv[1:4])
