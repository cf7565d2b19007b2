"""The options that name a checkpoint and say how to run it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

if TYPE_CHECKING:
    from blip_fast.command_line.jsonl import JsonLines


def add_model_options(parser: ArgumentParser, required: bool = True, models: Sequence[str] = ("model",),
                      several_devices: bool = False) -> None:
    """Add `--model` (or the names in `models`, if a command takes several) and the options for all of its
    models. With `several_devices`, `--devices` replaces `--device`."""
    for model in models:
        parser.add_argument(f"--{model}", type=str | None, required=required, metavar="DIR_OR_ID",
                            help="checkpoint directory, Hugging Face Hub name, or a published .pth")
    parser.add_argument("--dtype", default="auto",
                        help="auto: bfloat16 where the device multiplies it, else float32 (on a GPU "
                             "float16); or float32, as published figures want it, bfloat16, float16, or "
                             "int8: images in 8 bits where the processor has VNNI, elsewhere weights for "
                             "less memory (needs torchao)")
    if several_devices:
        parser.add_argument("--devices", type=str | None, metavar="NAME,NAME",
                            help="cpu, cuda:0,cuda:1 and so on (default: cuda where there is one)")
    else:
        parser.add_argument("--device", type=str | None,
                            help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--threads", type=int | None,
                        help="threads that a product on a CPU is shared by (default: one for each "
                             "physical core, or OMP_NUM_THREADS); fewer leave cores to other processes")
    parser.add_argument("--image-size", type=int | None,
                        help="resize images to this many pixels a side, and the model's position "
                             "embeddings with them")
    parser.add_argument("--heads", type=int | None,
                        help="attention heads of a .pth whose heads are not 64 wide")
    parser.add_argument("--tokenizer", type=str | None, metavar="DIR_OR_ID",
                        help="where vocab.txt or tokenizer.json is, if the checkpoint brings none")


def model_options(args: Namespace) -> dict[str, Any]:
    """Keyword arguments for a task's `from_pretrained`; with `--devices`, all except the device."""
    device = {} if "devices" in args else {"device": args.device}
    return {"dtype": args.dtype, **device, "image_size": args.image_size, "heads": args.heads,
            "tokenizer": args.tokenizer, "threads": args.threads}


def settled(name: str, device: str | None, differentiable: bool = False) -> tuple[str, str]:
    """The precision that a name stands for on a device, and the line that says so. Raises ValueError as
    `settle_precision` does."""
    from blip_fast.inference.precision import check, explained, resolve
    from blip_fast.tasks.model_loading import chosen_device

    target = chosen_device(device)
    precision = resolve(name, target, differentiable)
    check(precision, target)
    return precision, explained(name, target, differentiable, "; --dtype float32 for the published figures")


def settle_precision(args: Namespace, resumed: str | None = None, differentiable: bool = False) -> str:
    """Replace `args.dtype` by the precision that it stands for, for the whole command.

    Args:
        args: with the options of `add_model_options`. With `--ray`, a worker of the cluster decides for all
            workers.
        resumed: the precision of the work that is resumed; `auto` keeps it.
        differentiable: as for `load_for_task`.

    Returns:
        The line that says so. Print it only when the input can no longer be refused, since a refusal is to be
        the only line printed.

    Raises:
        ValueError: no such precision or device; float16 on a CPU without products of it.
    """
    name = resumed if resumed is not None and args.dtype == "auto" else args.dtype
    settle = partial(settled, name, args.device, differentiable)
    if getattr(args, "ray", None) is None:
        args.dtype, line = settle()
    else:
        from blip_fast.parallel.ray_cluster import ask_worker

        args.dtype, line = ask_worker(args.ray or None, settle, gpus=args.device != "cpu")
    return line


def settle_output(args: Namespace, output: JsonLines | None) -> str:
    """`settle_precision` for rows that may go into a file: a resumed file keeps its precision.

    Raises ValueError also if `--dtype` names a precision that differs from the resumed file's.
    """
    if output is None:
        return settle_precision(args)
    if output.precision is not None and args.dtype not in ("auto", output.precision):
        raise ValueError(f"{output.path} was begun in {output.precision}, not in {args.dtype}: leave "
                         "--dtype out, or name another file")
    line = settle_precision(args, output.precision)
    output.precision = args.dtype
    return line
