"""What a GPU would have to do, counted on any machine: python tests/benchmarks/bench_roofline.py [--draws 8192]

Operations of drawing, of a log-probability and of a training step as they are dispatched: floating-point operations,
bytes that kernels read and write when nothing is fused or cached, kernels launched, and waits of the host for the
device. From these, and from what a device can do (by default an H100 SXM in float32, 67 TFLOP/s and 3.35 TB/s, with 5
microseconds for a launch and 20 for a wait), the least time that each of them leaves, and the largest of the four.
"""

import argparse
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import cfrl
from cfrl.config import PretrainConfig
from cfrl.model import training, transformer
from cfrl.model.drawing import draw
from cfrl.model.sampler import seeded, space_group_prior
from cfrl.model.training import Trainer, epoch_batches

GPU_CHUNK = transformer.chunk_size(torch.device("cuda"))
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal")


class Counter(TorchDispatchMode):
    """Counts kernels, their bytes, and operations whose result the host must know."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.waits = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        schema = func._schema
        if schema.name in WAITS:
            self.waits += 1
        elif schema.name == "aten::index" and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in tree_leaves(args[1])
        ):
            self.waits += 1  # a mask: how many rows are there?
        if not any(x.alias_info and not x.alias_info.is_write for x in schema.returns):  # a view moves nothing
            self.launches += 1
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            self.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result


@dataclass
class Device:
    """FLOP/s, bytes/s, seconds for a launch, seconds for a wait."""

    flops: float
    bandwidth: float
    launch: float
    wait: float


def count(name: str, work, crystals: int, device: Device) -> list[str]:
    work()  # tables are made once
    flops = FlopCounterMode(display=False)
    with flops:
        work()
    with Counter() as counter:
        work()
    flop = flops.get_total_flops()
    times = (
        flop / device.flops,
        counter.bytes / device.bandwidth,
        counter.launches * device.launch,
        counter.waits * device.wait,
    )
    limit = ("arithmetic", "memory", "launches", "waits")[times.index(max(times))]
    counts = (f"{flop / 1e9:.1f}", f"{counter.bytes / 1e9:.2f}", f"{counter.launches:,}", f"{counter.waits:,}")
    return [name, *counts, *(f"{1000 * t:.1f}" for t in times), f"{crystals / max(times):,.0f} ({limit})"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--draws", type=int, default=8192, help="crystals drawn at once")
    parser.add_argument("--batch-size", type=int, default=512, help="crystals of a training step")
    parser.add_argument("--tflops", type=float, default=67)
    parser.add_argument("--bandwidth", type=float, default=3.35, help="TB/s")
    parser.add_argument("--launch", type=float, default=5, help="microseconds")
    parser.add_argument("--wait", type=float, default=20, help="microseconds")
    given = parser.parse_args()
    device = Device(given.tflops * 1e12, given.bandwidth * 1e12, given.launch * 1e-6, given.wait * 1e-6)
    model = cfrl.load_model(given.model, "cpu")
    transformer.chunk_size = training.chunk_size = lambda device, half=False: GPU_CHUNK
    groups = torch.multinomial(space_group_prior(model).exp(), given.draws, True, generator=seeded(model.device, 0))
    some = draw(model, groups, generator=seeded(model.device, 0))
    trainer = Trainer(PretrainConfig(batch_size=given.batch_size), some, some[:0], torch.device("cpu"), init=model)
    rows = epoch_batches(some.num_sites, given.batch_size, 0, 0)[0]

    @torch.no_grad()
    def score() -> None:
        model.log_prob(some)

    measures = ("FLOP", "GB", "launches", "waits")
    table = Table("work", "GFLOP", *measures[1:], *(f"ms by {measure}" for measure in measures))
    table.add_column("crystals/s at most")
    drawing = lambda: draw(model, groups, generator=seeded(model.device, 0))  # noqa: E731
    table.add_row(*count(f"drawing {given.draws}", drawing, given.draws, device))
    table.add_row(*count(f"log-probability of {given.draws}", score, given.draws, device))
    table.add_row(*count(f"training step of {len(rows)}", lambda: trainer._train_step(rows), len(rows), device))
    Console(width=150).print(table)
