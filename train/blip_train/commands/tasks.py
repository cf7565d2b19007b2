"""`blip-fast tasks`: VQA, NLVR2, VisDial and video on drawn scenes, in minutes, with a report."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from blip_fast.command_line.command import Command
from blip_train.commands.needs import require_training


def _arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", default="runs/tasks", help="directory of data, runs and report; what an earlier call "
                                               "left there is replaced")
    add("--model", type=str | None, metavar="DIR",
        help="fine-tune this model, pre-trained by an earlier call (its OUTPUT/pretrain/model); without it "
             "one is pre-trained")
    add("--ranks", type=int | None, metavar="N", help="processes of each training (default: the recipes')")


def _run(arguments: Namespace) -> None:
    require_training()
    from pathlib import Path

    from blip_train.commands.figures import print_figures
    from blip_train.experiments.task_demo import task_demo
    from blip_train.experiments.task_demo_report import task_figures, write_task_report

    output, model = Path(arguments.output), None if arguments.model is None else Path(arguments.model)
    options = [] if arguments.ranks is None else [f"--runtime.ranks={arguments.ranks}"]
    result = task_demo(output, model, options=options)
    page = write_task_report(result, output / "report.html")
    print_figures(task_figures(result), sum(result.seconds.values()), page)


COMMAND = Command(
    help="fine-tune on questions, pairs and dialogues about drawn scenes in minutes, try clips, and write a "
         "report",
    example="blip-fast tasks --output runs/tasks",
    arguments=_arguments,
    run=_run,
)
