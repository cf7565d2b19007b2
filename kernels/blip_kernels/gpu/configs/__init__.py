"""Launch configurations: one JSON table per op, `OP.json` in this folder. Nothing autotunes during training.

    {"forward, head_dim 64": {"sm_80": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, …}, …}, …}

`blip-fast kernels --tune` measures candidates on the GPU at hand and writes a file of the same form, keyed by
op: `{"attention": {…}}`. If `BLIP_FAST_KERNEL_CONFIGS` names such a file, its entries take precedence.
"""

from __future__ import annotations

import json
import os
from functools import cache
from importlib.resources import files
from pathlib import Path

TUNED_VARIABLE = "BLIP_FAST_KERNEL_CONFIGS"

Config = dict[str, int]  # constexprs of tiling, num_warps, num_stages


def config(op: str, launch: str, generation: int) -> Config:
    """Return the configuration of a launch (`"forward, head_dim 64"`) of an op on a generation (80, 90, 100)."""
    return dict(table(op)[launch][f"sm_{generation}"])


@cache
def table(op: str) -> dict[str, dict[str, Config]]:
    """Return all configurations of an op: launch → `sm_80`, … → configuration.

    Raises ValueError if the file that `BLIP_FAST_KERNEL_CONFIGS` names is missing or not of this form.
    """
    known = json.loads((files(__name__) / f"{op}.json").read_text())
    tuned = os.environ.get(TUNED_VARIABLE)
    if not tuned:
        return known
    try:
        for launch, generations in json.loads(Path(tuned).read_text()).get(op, {}).items():
            for generation, chosen in generations.items():
                if chosen.keys() != known[launch][generation].keys():
                    raise KeyError(f"{op}, {launch}, {generation}")
                known[launch][generation] = chosen
    except (OSError, KeyError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{TUNED_VARIABLE} names {tuned}, which is no table of launch configurations ({error}): write "
                         "it with blip-fast kernels --tune") from error
    return known
