"""`blip-fast train`: pre-train or fine-tune from a recipe."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from blip_fast.commands import Command


def _arguments(parser: ArgumentParser) -> None:
    from blip_train.recipe import add_recipe_arguments

    add_recipe_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of runs/NAME")


def _run(arguments: Namespace) -> int:
    from blip_train.launch import launch, must_launch
    from blip_train.prepare import check_sources
    from blip_train.recipe import read_recipe

    recipe = read_recipe(arguments)
    check_sources(recipe)
    if must_launch(recipe):
        return launch(recipe, arguments.resume)
    from blip_train.run import train

    print(train(recipe, arguments.resume))
    return 0


COMMAND = Command(
    help="pre-train or fine-tune BLIP from a recipe",
    example="blip-fast train --config train/blip_train/recipes/flickr8k.yaml --data.root data/flickr8k",
    arguments=_arguments,
    run=_run,
)
