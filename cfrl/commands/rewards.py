"""`cfrl rewards`: the registry as a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from cfrl import config
from cfrl.rewards.expression import FUNCTIONS
from cfrl.rewards.registry import RewardInfo, all_rewards

NOTES = """\
A bare name is maximised or minimised as the table says; in an expression you write the signs:
  --reward ehull                               as stable as possible
  --reward "dielectric_bandgap - 2*ehull"      large figure of merit, at two units a eV/atom
  --reward "only(band_gap, ehull < 0.1)"       gate
  --reward "target(band_gap, 1.4, 0.2)"        distance to a wanted value, in units of 0.2 eV
  --reward "dielectric(kind=electronic)"       parameters
Also: property:FILE (`cfrl rewards train`), package.module:function, file.py:function; in quotes inside expressions.
Names of your own: a table \\[rewards.NAME] with expression = "..." in cfrl.toml.
Functions:"""


def show_rewards(console: Console) -> None:
    """Print every reward: name, what it returns, unit, goal, parameters, needs; then how to combine them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("name", "unit", "goal", "returns", "parameters", "needs"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "name")
    for info in all_rewards():
        table.add_row(
            info.name, info.unit, info.goal, info.description, _parameters(info), ", ".join(info.needs) or "-"
        )
    for name, definition in config.reward_definitions().items():
        table.add_row(name, "", "max", definition["expression"], "", "(cfrl.toml)")
    console.print(table, highlight=False)
    console.print("\n" + NOTES, highlight=False)
    for *_, usage in FUNCTIONS.values():
        console.print(f"  {usage}", highlight=False, markup=False)


def _parameters(info: RewardInfo) -> str:
    values = {name: info.choices(name) or (default,) for name, default in info.parameters.items()}
    return ", ".join(f"{name}={'|'.join(map(str, some))}" for name, some in values.items()) or "-"
