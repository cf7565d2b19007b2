"""`blip-fast train`: pre-train or fine-tune from a recipe."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from blip_fast.command_line.command import Command
from blip_train.commands.needs import require_training


def _arguments(parser: ArgumentParser) -> None:
    from blip_train.recipe import Recipe, add_recipe_arguments

    add_recipe_arguments(parser, Recipe)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of runs/NAME")
    parser.add_argument("--profile", type=int, nargs="?", const=3, default=0, metavar="STEPS",
                        help="trace the run's third and following steps into runs/NAME/profile (3 unless "
                             "given)")
    parser.add_argument("--dry-run", action="store_true",
                        help="start nothing, and say what the recipe would ask of each GPU, stage by ZeRO "
                             "stage")
    parser.add_argument("--gpus",
                        help="for --dry-run: numbers of GPUs, 8,64,512 (runtime.ranks unless given)")
    parser.add_argument("--caption-tokens", type=float,
                        help="for --dry-run: tokens of a mean caption (default: 14)")
    parser.add_argument("--json", action="store_true",
                        help="for --dry-run: a JSON object a line instead of the table")


def _run(arguments: Namespace) -> None:
    require_training()
    import os

    from blip_train.recipe import Recipe, read_recipe

    recipe = read_recipe(arguments, Recipe)
    if arguments.dry_run:
        _dry_run(arguments, recipe)
        return
    if arguments.gpus or arguments.caption_tokens or arguments.json:
        raise ValueError("--gpus, --caption-tokens and --json belong to --dry-run: add it, or set "
                         "--runtime.ranks")
    if arguments.profile < 0:
        raise ValueError(f"--profile is {arguments.profile}: name how many steps to trace, at least 1")

    from blip_train.launch import carry_out

    model = carry_out(recipe, arguments.resume, arguments.profile)
    # One rank prints for all; a process that only launched them is not a rank.
    if os.environ.get("RANK") == "0":
        print(model)


def _dry_run(arguments: Namespace, recipe) -> None:
    from blip_train.forecast import dry_run
    from blip_train.forecast.estimate import CAPTION_TOKENS

    try:
        gpus = [int(part) for part in (arguments.gpus or str(recipe.runtime.ranks)).split(",")]
    except ValueError:
        raise ValueError(f"--gpus is {arguments.gpus!r}: name whole numbers, as in --gpus 8,64") from None
    chosen = dry_run.plans(recipe, gpus, arguments.caption_tokens or CAPTION_TOKENS)
    dry_run.print_json(chosen) if arguments.json else dry_run.print_table(chosen)


COMMAND = Command(
    help="pre-train or fine-tune BLIP from a recipe",
    example="blip-fast train --config train/blip_train/recipes/flickr8k.yaml --data.root data/flickr8k",
    arguments=_arguments,
    run=_run,
)
