"""`cfrl model`: looks into model files, imports published weights, packs them to share."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from cfrl.errors import UserError
from cfrl.files import check_writable
from cfrl.io.datasets import load_dataset
from cfrl.model.files import EMBEDDED, Extras, load_extras, load_model, model_path, save_model
from cfrl.model.network import space_group_shares
from cfrl.model.published import import_published, read_checkpoint


def describe_model(model: str | Path | None) -> str:
    """Sizes, training data and figures of a model file, for people. Raises UserError where there is none."""
    path = model_path(model)
    header, network = load_extras(path).header, load_model(path)
    lines = [f"{path}: {sum(p.numel() for p in network.parameters()):,} parameters"]
    lines += [f"  {name} = {value}" for name, value in asdict(network.config).items()]
    shares = network.space_group_log_prob.exp()
    lines.append(f"  space groups in training: {int((shares > 0).sum())}; most often {shares.topk(5).indices.tolist()}")
    lines += [f"  {name}: {value}" for name, value in header.items() if name not in ("format", "config") and value]
    return "\n".join(lines)


def pack_model(model: str | Path, output: str | Path, dataset: str | None = None) -> None:
    """`cfrl model pack`: a trained or tuned model as it is shipped: float16, and a header without local paths.

    Args:
        model: weights file or run folder.
        output: the file to write.
        dataset: what it was trained on, for the header; None: keep the name of the file.
    """
    check_writable(output, (".safetensors",))
    extras = load_extras(model)
    header = extras.header
    told = ("preset", "training_crystals", "metrics", "reward", "algorithm", "step")
    info = {name: header[name] for name in told if name in header}
    info["dataset"] = dataset or Path(header.get("dataset", "")).name
    if header.get("base_model") in EMBEDDED:
        info["base_model"] = header["base_model"]
    network, most = load_model(model), torch.finfo(torch.float16).max
    if any((parameter.abs() > most).any() for parameter in network.parameters()):
        raise UserError(f"{model}: holds weights above {most:,.0f}, the most that float16 can; share the file as it is")
    save_model(network, output, replace(extras, header=info), dtype=torch.float16)


def run_import(
    checkpoint: str,
    output: str,
    dataset: str | None,
    num_heads: int | None,
    coord_components: int | None,
    console: Console,
) -> None:
    """`cfrl model import`: published pickle -> our weights file.

    Raises:
        UserError: a file that is no such checkpoint, or a dataset that cannot be read.
    """
    check_writable(output, (".safetensors",))
    parameters = read_checkpoint(checkpoint)
    try:
        model = import_published(parameters, num_heads, coord_components)
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    if dataset:
        model.space_group_log_prob.copy_(space_group_shares(load_dataset(dataset).space_group))
    save_model(model, output, Extras({"source": Path(checkpoint).name, "dataset": dataset or ""}))
    config = model.config
    console.print(
        f"{output}: {sum(p.numel() for p in model.parameters()):,} parameters, {config.num_layers} layers of "
        f"{config.num_heads} heads x {config.key_size}, {config.coord_components} components a coordinate"
    )
    if not dataset:
        console.print(
            "Space groups will be drawn evenly: such a checkpoint does not hold their distribution (--dataset)."
        )
