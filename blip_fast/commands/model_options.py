"""The options by which a command names a checkpoint and says how to run it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace


def add_model_options(parser: ArgumentParser, required: bool = True, models: Sequence[str] = ("model",),
                      several_devices: bool = False) -> None:
    """`--model`, or other names where a command takes several models; the other options are for all of them.
    `--device`, or `--devices` where a command uses several."""
    for model in models:
        parser.add_argument(f"--{model}", type=str | None, required=required, metavar="DIR_OR_ID",
                            help="checkpoint directory, Hugging Face Hub name, or a published .pth")
    parser.add_argument("--dtype", default="float32",
                        help="float32, bfloat16 (fastest on a CPU), float16 (for GPUs), or int8: weights in 8 bits for "
                             "less memory, slower than bfloat16 (needs torchao)")
    if several_devices:
        parser.add_argument("--devices", type=str | None, metavar="NAME,NAME",
                            help="cpu, cuda:0,cuda:1 and so on (default: cuda where there is one)")
    else:
        parser.add_argument("--device", type=str | None, help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--threads", type=int | None,
                        help="threads that a product on a CPU is shared by (default: one for each physical core, or "
                             "OMP_NUM_THREADS); fewer leave cores to other processes")
    parser.add_argument("--image-size", type=int | None,
                        help="resize images to this many pixels a side, and the model's position embeddings with them")
    parser.add_argument("--heads", type=int | None, help="attention heads of a .pth whose heads are not 64 wide")
    parser.add_argument("--tokenizer", type=str | None, metavar="DIR_OR_ID",
                        help="where vocab.txt or tokenizer.json is, if the checkpoint brings none")


def model_options(args: Namespace) -> dict[str, Any]:
    """Keyword arguments of a task's `from_pretrained`, behind its first one; with `--devices` all but the device."""
    device = {} if "devices" in args else {"device": args.device}
    return {"dtype": args.dtype, **device, "image_size": args.image_size, "heads": args.heads,
            "tokenizer": args.tokenizer, "threads": args.threads}
