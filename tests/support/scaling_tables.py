"""The tables of docs/scaling.md, from `blip_train.forecast.estimate`.

`python tests/support/scaling_tables.py` rewrites them.
"""

from __future__ import annotations

import re
from pathlib import Path

from blip_train.forecast.estimate import Plan, forecast, memory, meta_pretraining, traffic
from blip_train.forecast.gpus import GPUS
from blip_train.recipe import load_recipe

DOC = Path("docs/scaling.md")
SIZES, RANKS, STAGES = ("base", "large"), (8, 64, 512, 4096), (0, 1, 2, 3)


def plans(size: str) -> dict[tuple[int, int], Plan]:
    """Plans by number of ranks and stage."""
    recipe = load_recipe(f"train/blip_train/recipes/pretrain_{size}.yaml")
    pretraining = meta_pretraining(recipe)
    return {(ranks, stage): Plan(recipe, pretraining, ranks, stage) for ranks in RANKS for stage in STAGES}


def tables() -> dict[str, str]:
    """The tables as Markdown, by their names in the document's markers."""
    found = {}
    for size in SIZES:
        every = plans(size)
        parts = list(memory(every[64, 3]))
        found[f"memory {size}"] = _table(
            ["ZeRO", *parts, "sum at 64", *[f"at {ranks:,}" for ranks in RANKS if ranks != 64]],
            [[str(stage), *[_gb(memory(every[64, stage]).get(part, 0.0)) for part in parts],
              *[_gb(sum(memory(every[ranks, stage]).values())) for ranks in (64, 8, 512, 4096)]]
             for stage in STAGES])
        found[f"traffic {size}"] = _table(
            ["ZeRO", *[f"{ranks:,} GPUs" for ranks in RANKS], "gradients at 64", "weights at 64",
             "features at 4,096"],
            [[str(stage), *[_gb(sum(traffic(every[ranks, stage]).values())) for ranks in RANKS],
              *[_gb(traffic(every[64, stage])[part]) for part in ("gradients", "weights")],
              _gb(traffic(every[4096, stage])["features"])] for stage in STAGES])
        stage = every[8, 0].recipe.runtime.zero_stage
        found[f"speed {size}"] = _table(
            ["GPUs", *[gpu.name for gpu in GPUS]],
            [[f"{ranks:,}", *[f"{one.expected:.0f} (≤ {one.bound:,.0f})" for one in
                              (forecast(every[ranks, stage], gpu) for gpu in GPUS)]] for ranks in RANKS])
    return found


def written() -> dict[str, str]:
    """The document's text between the markers."""
    return dict(re.findall(r"<!-- (.+?) -->\n(.*?)<!-- end -->", DOC.read_text(), re.DOTALL))


def _gb(value: float) -> str:
    return f"{value / 1e9:.2f}" if value else "–"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    text = DOC.read_text()
    for name, table in tables().items():
        text = re.sub(rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, new=table: m[1] + new + m[2], text,
                      flags=re.DOTALL)
    DOC.write_text(text)
