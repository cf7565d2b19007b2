"""`blip-fast demo`: the whole method on drawn scenes, in minutes, with a report."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from blip_fast.command_line.command import Command
from blip_train.commands.needs import require_training


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--output", default="runs/demo", help="directory of the runs and the report; an "
                                                              "earlier demo there is replaced")
    parser.add_argument("--recipe", choices=["scenes.yaml", "scenes_long.yaml"], default="scenes.yaml",
                        help="pre-training: minutes, or up to half an hour")


def _run(arguments: Namespace) -> None:
    require_training()
    from pathlib import Path

    from blip_train.commands.figures import print_figures
    from blip_train.experiments.demo import demo
    from blip_train.experiments.demo_report import figures, write_demo_report

    result = demo(Path(arguments.output), arguments.recipe)
    page = write_demo_report(result, Path(arguments.output) / "report.html")
    print_figures(figures(result), sum(result.seconds.values()), page)


COMMAND = Command(
    help="pre-train, clean and caption drawn scenes in minutes, and write a report",
    example="blip-fast demo --output runs/demo",
    arguments=_arguments,
    run=_run,
)
