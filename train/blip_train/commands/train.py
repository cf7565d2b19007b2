"""`blip-fast train`: pre-train or fine-tune from a recipe."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from blip_fast.commands import Command


def _arguments(parser: ArgumentParser) -> None:
    from blip_train.recipe import add_recipe_arguments

    add_recipe_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of runs/NAME")


def _run(arguments: Namespace) -> None:
    import os

    from blip_train.launch import carry_out
    from blip_train.recipe import read_recipe

    model = carry_out(read_recipe(arguments), arguments.resume)
    if os.environ.get("RANK") == "0":  # one rank speaks for all; a process that only launched them is none
        print(model)


COMMAND = Command(
    help="pre-train or fine-tune BLIP from a recipe",
    example="blip-fast train --config train/blip_train/recipes/flickr8k.yaml --data.root data/flickr8k",
    arguments=_arguments,
    run=_run,
)
