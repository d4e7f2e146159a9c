"""Where work is done that many workers can share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cfrl.settings import Settings, Workers, option


@dataclass(frozen=True)
class EngineOptions(Settings):
    """Worker processes, of this machine or of a Ray cluster (`engine.py`)."""

    workers: Workers | None = option(None, "Worker processes; 0: one for each core on a CPU, one on a GPU.", unset=0)
    engine: Literal["local", "ray"] = option(
        "local", "Where workers run: local (this machine) or ray (pip install 'cfrl[ray]')."
    )
    address: str | None = option(
        None, "Of the Ray cluster, e.g. `auto` or `host:6379`; empty: start one on this machine.", unset=""
    )
