"""`blip-fast export`: write a run's checkpoint, sharded or not, as a model."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from blip_fast.command_line.command import Command
from blip_fast.commands.convert import FORMS, check_destination, report, save
from blip_fast.model.config import TASK_PARTS


def _arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="RUN", help="directory of a run (runs/NAME), ended or not")
    add("destination", metavar="DST", help="directory to write; for original the .pth file")
    add("--step", type=int | None, help="of the checkpoint (default: the newest)")
    add("--to", default="native", choices=FORMS,
        help="native: our own directory; hf: directory for transformers; original: the published .pth")
    add("--task", choices=tuple(TASK_PARTS),
        help="keep only the parts of one task: a captioner from a pre-trained model")
    add("--training-state", action="store_true",
        help="momentum copies and queue too, to train on from (native and original)")
    add("--json", action="store_true", help="print a JSON summary")


def _run(args: Namespace) -> None:
    check_destination(Path(args.destination), args.to)
    if args.training_state and (args.to == "hf" or args.task is not None):
        raise ValueError(f"{'transformers' if args.to == 'hf' else 'a single task'} has no place for "
                         "training state: leave out --training-state, or export to native or original")
    from blip_fast.model.blip import task_model
    from blip_train.export import read_checkpoint, training_state

    trained, tokenizer = read_checkpoint(Path(args.source), args.step)
    model = trained.model if args.task is None else task_model(trained.model, args.task)
    state = training_state(trained) if args.training_state else {}
    save(args, model, tokenizer, state)
    report(args, model, tokenizer, state)


COMMAND = Command(
    help="write a run's checkpoint, of any ZeRO stage and number of ranks, as a model",
    example="blip-fast export runs/pretrain captioner --task caption --to hf",
    arguments=_arguments,
    run=_run,
)
