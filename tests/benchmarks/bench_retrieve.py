"""Rate of `cfrl retrieve`: likelihood ratios of real crystals under two models, streamed from a file.

    python tests/benchmarks/bench_retrieve.py [DATASET.h5] [--preset alex-20] [-n 512] [--device cpu]

Prints crystals/s (each is scored under both models) and the peak memory; the dataset is repeated as often as it takes.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Iterator

import torch

from cfrl.crystals.crystal import CrystalBatch
from cfrl.io.catalogue import dataset_path
from cfrl.io.storage import iter_crystals
from cfrl.model.options import PRESETS
from cfrl.model.transformer import CrystalTransformer
from cfrl.screening.retrieval import rank


def stream(path: str, n: int) -> Iterator[CrystalBatch]:
    """n crystals of a file, from its start again when it ends."""
    while n > 0:
        for batch in iter_crystals(path, 1024):
            yield batch[:n]
            n -= len(batch[:n])
            if n <= 0:
                return


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("dataset", nargs="?", default="prototypes")
    parser.add_argument("--preset", default="alex-20", choices=PRESETS)
    parser.add_argument("-n", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    tuned, base = (CrystalTransformer(PRESETS[args.preset]).eval().to(args.device) for _ in range(2))
    path = dataset_path(args.dataset)
    rank(tuned, base, stream(path, 64))
    start = time.perf_counter()
    columns, _ = rank(tuned, base, stream(path, args.n))
    seconds = time.perf_counter() - start
    n, peak = len(columns["id"]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{args.preset}, {n} crystals of {args.dataset} on {args.device}, {torch.get_num_threads()} threads")
    print(f"{n / seconds:8.1f} crystals/s under both models, {2 * n / seconds:8.1f} log-probabilities/s")
    print(f"{peak:8.2f} GiB peak memory")


if __name__ == "__main__":
    main()
