"""A model that writes letters and elements first, then cell and coordinates, of one that writes site after site.

reorder.py MODEL OUT.safetensors: the weights stay, what the other order has besides begins at random. To be trained on
(`cfrl pretrain --init OUT.safetensors`): letters and elements need not be learnt again, coordinates gain a nat.
"""

import sys
from dataclasses import replace

import torch

from cfrl.model.files import Extras, load_extras, load_model, save_model
from cfrl.model.transformer import CrystalTransformer

if __name__ == "__main__":
    name, out = sys.argv[1:]
    old = load_model(name)
    torch.manual_seed(0)
    new = CrystalTransformer(replace(old.config, order="composition"))
    new.load_state_dict(old.state_dict(), strict=False)
    torch.nn.init.zeros_(new.place_out.weight)  # surroundings say nothing yet
    save_model(new, out, Extras({"base_model": name, "dataset": load_extras(name).header.get("dataset", "")}))
    print(f"{out}: {sum(p.numel() for p in new.parameters()):,} parameters")
