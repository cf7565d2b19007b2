"""Which parameters a recipe means: `vision.blocks.0-5`, `text.*.norm`, `temperature`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from blip_train.steps.step import TrainingStep


def named_below(patterns: Sequence[str], names: Sequence[str], option: str) -> list[str]:
    """The names that begin with a pattern. A part of a pattern is a literal, `*`,
    or a range of numbers (`0-5`).

    Args:
        names: dotted names of parameters or modules.
        option: the recipe's key, for the message.

    Raises:
        ValueError: a pattern matches none of them.
    """
    found: set[str] = set()
    for pattern in patterns:
        below = [name for name in names if _leads_to(pattern, name)]
        if not below:
            first_parts = ", ".join(dict.fromkeys(name.split(".")[0] for name in names))
            raise ValueError(f"{option}: {pattern!r} names nothing in this model, whose parts are "
                             f"{first_parts}")
        found.update(below)
    return [name for name in names if name in found]


def freeze(step: TrainingStep, patterns: Sequence[str]) -> None:
    """Exclude what the patterns name from training. Raises ValueError if one names
    nothing, or nothing is left."""
    parameters = dict(step.model.named_parameters())
    for name in named_below(patterns, list(parameters), "optimizer.frozen"):
        parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError("optimizer.frozen names the whole model: nothing is left to train")


def _leads_to(pattern: str, name: str) -> bool:
    wanted, parts = pattern.split("."), name.split(".")
    return len(wanted) <= len(parts) and all(map(_is_part, wanted, parts))


def _is_part(wanted: str, part: str) -> bool:
    numbers = re.fullmatch(r"(\d+)-(\d+)", wanted)
    if numbers and part.isdecimal():
        return int(numbers[1]) <= int(part) <= int(numbers[2])
    return wanted in ("*", part)
