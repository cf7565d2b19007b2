"""`blip-fast convert`: convert a checkpoint from one form to another, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from blip_fast.command_line.command import Command
from blip_fast.model.config import TASK_PARTS

if TYPE_CHECKING:
    from torch import Tensor

    from blip_fast.model.blip import BlipModel
    from blip_fast.model.tokenizer import Tokenizer

FORMS = ("hf", "original", "native")


def _arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("source", metavar="SRC", help="checkpoint directory, Hugging Face Hub name, or a published .pth")
    add("destination", metavar="DST", help="directory to write; for original the .pth file")
    add("--to", required=True, choices=FORMS,
        help="hf: directory for transformers; original: the published .pth; native: our own directory")
    add("--task", choices=tuple(TASK_PARTS),
        help="keep only the parts of one task: a captioner from a pre-trained model")
    add("--image-size", type=int | None,
        help="resize the position embeddings for images of this many pixels a side")
    add("--heads", type=int | None, help="attention heads of a .pth whose heads are not 64 wide")
    add("--tokenizer", type=str | None, metavar="DIR_OR_ID",
        help="where vocab.txt or tokenizer.json is, if the checkpoint brings none")
    add("--drop-training-state", action="store_true",
        help="leave out queues and momentum copies (hf and a single task cannot hold them)")
    add("--json", action="store_true", help="print a JSON summary")


def _run(args: Namespace) -> int:
    check_destination(Path(args.destination), args.to)
    from blip_fast.checkpoint import load_model, load_training_state
    from blip_fast.model.blip import task_model
    from blip_fast.model.tokenizer import Tokenizer

    tokenizer = None if args.tokenizer is None else Tokenizer.from_pretrained(args.tokenizer)
    model, tokenizer = load_model(args.source, tokenizer=tokenizer, image_size=args.image_size,
                                  heads=args.heads, dtype=None)
    training_state = {} if args.drop_training_state else load_training_state(args.source, model.config)
    if training_state and (args.to == "hf" or args.task is not None):
        raise ValueError(f"{args.source} holds training state (queues and momentum copies) that "
                         f"{'transformers' if args.to == 'hf' else 'a single task'} has no place for: add "
                         "--drop-training-state to leave it out")
    if args.task is not None:
        model = task_model(model, args.task)
    save(args, model, tokenizer, training_state)
    report(args, model, tokenizer, training_state)
    return 0


def check_destination(destination: Path, form: str) -> None:
    """Raise ValueError if writing this form would replace something."""
    if destination.is_file() or (destination.is_dir() and (form == "original" or any(destination.iterdir()))):
        raise ValueError(f"{destination} exists already: remove it or choose another name")


def save(args: Namespace, model: BlipModel, tokenizer: Tokenizer | None,
         training_state: dict[str, Tensor]) -> None:
    """Write `args.destination` in the form `args.to`."""
    from blip_fast.checkpoint import save_hugging_face, save_native, save_original

    if args.to == "hf":
        save_hugging_face(model, tokenizer, args.destination)
    elif args.to == "original":
        save_original(model, tokenizer, args.destination, training_state)
    else:
        save_native(model, tokenizer, args.destination, training_state)


def report(args: Namespace, model: BlipModel, tokenizer: Tokenizer | None,
           training_state: dict[str, Tensor]) -> None:
    """Print a line (with `args.json`: JSON) about what was converted from `args.source`."""
    config = model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    heads = [head for head in ("contrastive", "matching", "reasoning") if getattr(config, head)]
    if args.json:
        print(json.dumps({
            "source": args.source, "destination": args.destination, "form": args.to, "parameters": parameters,
            "image_size": config.vision.image_size, "text_stacks": config.text_stacks, "heads": heads,
            "tokenizer": tokenizer is not None, "training_tensors": len(training_state),
        }))
        return
    parts = f"text {config.text_stacks}" + (f", heads {' and '.join(heads)}" if heads else "")
    extras = ", ".join(["tokenizer" if tokenizer is not None else "no tokenizer",
                        *([f"{len(training_state)} tensors of training state"] if training_state else [])])
    print(f"{args.destination}: {parameters / 1e6:.1f} M parameters, {config.vision.image_size} px, "
          f"{parts}; {extras}")


COMMAND = Command(
    help="convert a checkpoint between transformers' layout, the published .pth and our own",
    example="blip-fast convert --to native model_base_caption_capfilt_large.pth captioner",
    arguments=_arguments,
    run=_run,
)
