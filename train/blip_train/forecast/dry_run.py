"""`blip-fast train --dry-run`: what a recipe would ask of each GPU, as a table or
JSON lines. Nothing is started."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from blip_train.forecast.estimate import (
    PUBLISHED_PAIRS_PER_SECOND,
    Plan,
    assumptions,
    forecast,
    host_memory,
    memory,
    meta_pretraining,
    traffic,
)
from blip_train.forecast.gpus import GPUS
from blip_train.recipe import Recipe


def plans(recipe: Recipe, gpus: Sequence[int], caption_tokens: float) -> Iterator[Plan]:
    """For each number of GPUs, the recipe under each ZeRO stage that it allows.

    Raises:
        ValueError: a number of GPUs or tokens is impossible; the recipe is not one of
            ITC, ITM and LM, or has adapters.
    """
    if not recipe.step_kind.of_pairs or recipe.adapters is not None:
        raise ValueError(f"--dry-run knows ITC, ITM and LM over whole weights, not what {recipe.name} trains")
    for ranks in gpus:
        if ranks < 1:
            raise ValueError(f"--gpus is {ranks}: it must be at least 1")
    if not 3 <= caption_tokens <= recipe.tokenizer.max_tokens:
        raise ValueError(f"--caption-tokens is {caption_tokens:g}: it must be 3 to tokenizer.max_tokens, "
                         f"{recipe.tokenizer.max_tokens}")
    pretraining, runtime = meta_pretraining(recipe), recipe.runtime
    # As in the recipe's own checks: offloading needs shards, compiled blocks need whole weights.
    stages = range(1 if runtime.offload else 0, 3 if runtime.compile else 4)
    return (Plan(recipe, pretraining, ranks, stage, caption_tokens) for ranks in gpus for stage in stages)


def row(plan: Plan) -> dict[str, Any]:
    """A plan's figures for JSON: bytes of one GPU, FLOPs of one of its steps, and
    pairs/s of each kind of GPU."""
    held, sent, work = memory(plan), traffic(plan), plan.work
    batches = plan.recipe.runtime.accumulation
    return {
        "recipe": plan.recipe.name, "gpus": plan.ranks, "zero_stage": plan.stage,
        "global_batch": plan.ranks * plan.recipe.runtime.batch_size * batches,
        "parameters": sum(plan.trained), "momentum_parameters": sum(plan.momentum),
        "step_flops": batches * (work.forward + work.backward),
        "pair_flops": (work.forward + work.backward) / plan.recipe.runtime.batch_size,
        "memory": held, "memory_total": sum(held.values()),
        "host_memory": host_memory(plan), "sent": sent, "sent_total": sum(sent.values()),
        "pairs_per_second_per_gpu": {gpu.name: dataclasses.asdict(forecast(plan, gpu)) for gpu in GPUS},
        "published_pairs_per_second_per_gpu": PUBLISHED_PAIRS_PER_SECOND,
        "assumptions": assumptions(plan),
    }


def print_json(chosen: Iterator[Plan]) -> None:
    for plan in chosen:
        print(json.dumps(row(plan)))


def print_table(chosen: Iterator[Plan]) -> None:
    """Print one GPU's memory by part, then what it sends and the speed that the roofline expects, with the
    recipe's own stage in bold."""
    rows = list(chosen)
    first, runtime, work = rows[0], rows[0].recipe.runtime, rows[0].work
    console = Console()
    console.print(f"[bold]{first.recipe.name}[/bold]: {sum(first.trained):,} trained parameters, "
                  f"{sum(first.momentum):,} in the momentum copy; {runtime.batch_size} pairs × "
                  f"{runtime.accumulation} a GPU and step, {first.precision}, "
                  f"{(work.forward + work.backward) / runtime.batch_size / 1e9:.1f} GFLOP a pair")
    console.print(_table("memory of a GPU, GB (10⁹ bytes)", _memory_columns, rows))
    console.print(_table("sent by a GPU a step, and pairs/s of a GPU as a roofline expects them (published: "
                         f"{PUBLISHED_PAIRS_PER_SECOND})", _speed_columns, rows))
    for sentence in assumptions(first):
        console.print(f"[dim]- {sentence}[/dim]")


def _memory_columns(plan: Plan) -> dict[str, str]:
    held = memory(plan)
    weights = sum(held.pop(name, 0.0) for name in ("weights", "gathered weights"))
    gradients = sum(held.pop(name, 0.0) for name in ("gradients", "exchange"))
    parts = {"weights": weights, "gradients": gradients, "AdamW": held.pop("optimiser"), **held}
    total = {"total": f"{sum(parts.values()) / 1e9:.1f}"}
    if plan.recipe.runtime.offload:
        parts.pop("AdamW")  # it is in host memory
        total["host"] = f"{host_memory(plan) / 1e9:.2f}"
    return {name: f"{value / 1e9:.2f}" for name, value in parts.items()} | total


def _speed_columns(plan: Plan) -> dict[str, str]:
    return {"GB sent": f"{sum(traffic(plan).values()) / 1e9:.2f}"} | {
        gpu.name: f"{forecast(plan, gpu).expected:.0f}" for gpu in GPUS}


def _table(title: str, columns: Callable[[Plan], dict[str, str]], rows: list[Plan]) -> Table:
    table = Table("GPUs", "ZeRO", *columns(rows[0]), box=SIMPLE_HEAD, title=title, title_justify="left",
                  padding=(0, 0, 0, 1), pad_edge=False)
    for column in table.columns:
        column.justify = "right"
    for plan in rows:
        own = plan.stage == plan.recipe.runtime.zero_stage
        table.add_row(f"{plan.ranks:,}", str(plan.stage), *columns(plan).values(),
                      style="bold" if own else None, end_section=plan.stage == rows[-1].stage)
    return table
