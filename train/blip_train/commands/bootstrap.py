"""`blip-fast bootstrap`: pre-train, clean web pairs with that model (CapFilt), pre-train anew."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from blip_fast.command_line.command import Command
from blip_train.commands.needs import require_training


def _arguments(parser: ArgumentParser) -> None:
    require_training()  # importing the recipe's class needs it
    from blip_train.experiments.bootstrap_recipe import BootstrapRecipe
    from blip_train.recipe import add_recipe_arguments

    add_recipe_arguments(parser, BootstrapRecipe)
    parser.add_argument("--resume", action="store_true",
                        help="go on with runs/NAME where it was cut short; finished stages are not done again")
    parser.add_argument("--json", action="store_true",
                        help="print what metrics.json holds instead of the tables")


def _run(args: Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from blip_train.experiments.bootstrap import bootstrap
    from blip_train.experiments.bootstrap_recipe import BootstrapRecipe
    from blip_train.experiments.bootstrap_report import METRICS, comparison, removal, write_figures
    from blip_train.recipe import read_recipe

    recipe = read_recipe(args, BootstrapRecipe)
    figures = bootstrap(recipe, args.resume)
    page = write_figures(recipe, figures)
    if args.json:
        print((recipe.directory / METRICS).read_text(), end="")
        return
    console = Console()
    for columns, rows in (removal(figures), comparison(figures)):
        table = Table(*columns)
        for row in rows:
            table.add_row(*row)
        if rows:
            console.print(table)
    console.print(f"look at {page}")


COMMAND = Command(
    help="pre-train, clean the web pairs with that model (CapFilt), and pre-train anew on what was kept",
    example="blip-fast bootstrap --config train/blip_train/recipes/bootstrap_scenes.yaml --seeds '[0, 1, 2]'",
    arguments=_arguments,
    run=_run,
)
