"""`blip-fast train-reranker`: BERT-CNN for `blip-fast caption --rerank bert-cnn`, from
pairs of labels and captions."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from blip_fast.command_line.command import Command
from blip_fast.command_line.progress import progress_bar
from blip_fast.commands.convert import check_destination

if TYPE_CHECKING:
    from blip_train.experiments.reranker import Epoch


def _arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("pairs", metavar="FILE.tsv", help="a label, a caption, and 1 where they belong together or 0, a line")
    add("--bert", required=True, metavar="DIR",
        help="a BERT on this machine: config.json, weights, and vocab.txt or tokenizer.json, as transformers "
             "saves it")
    add("--output", required=True, metavar="DIR", help="directory to write, for --reranker of caption")
    add("--epochs", type=int, default=5, help="times that all pairs are gone over")
    add("--batch-size", type=int, default=128, help="pairs a step")
    add("--lr", type=float, default=1e-5, help="Adam's learning rate")
    add("--held-out", type=float, default=0.2, help="share of the pairs that is not trained on but measured")
    add("--seed", type=int, default=0, help="of the pairs that are held out, their order, drop-out and new "
                                            "weights")
    add("--device", type=str | None, help="cpu or cuda (default: cuda where there is one)")
    add("--json", action="store_true", help="print the figures as one JSON object")


def _run(args: Namespace) -> None:
    check_destination(Path(args.output), "native")
    from blip_fast.checkpoint.bert import load_bert, save_bert_cnn
    from blip_fast.tasks.model_loading import chosen_device
    from blip_train.experiments.reranker import RerankerRecipe, read_pairs, split_pairs, train_reranker

    recipe = RerankerRecipe(args.epochs, args.batch_size, args.lr, args.held_out, args.seed)
    device = chosen_device(args.device)
    pairs, held_out = split_pairs(read_pairs(args.pairs), recipe.held_out, recipe.seed)
    bert, tokenizer = load_bert(args.bert)
    steps = recipe.epochs * -(-len(pairs) // recipe.batch_size)
    with progress_bar("steps", "steps", lambda: steps) as advance:
        model, epochs = train_reranker(bert.to(device), tokenizer, pairs, held_out, recipe,
                                       on_epoch=_print_epoch, advance=advance)
    save_bert_cnn(model, tokenizer, args.output)
    commoner = sum(pair.belong for pair in held_out) / len(held_out)
    _report(args, {"pairs": len(pairs), "held_out": len(held_out), "loss": epochs[-1].loss,
                   "accuracy": epochs[-1].accuracy, "auc": epochs[-1].auc,
                   "chance": {"accuracy": max(commoner, 1 - commoner), "auc": 0.5},
                   "epochs": [asdict(epoch) for epoch in epochs]})


def _print_epoch(epoch: Epoch) -> None:
    print(f"epoch {epoch.number}: loss {epoch.loss:.4f}; of the held-out pairs: accuracy "
          f"{epoch.accuracy:.1%}, AUC {epoch.auc:.4f}", file=sys.stderr)


def _report(args: Namespace, figures: dict[str, Any]) -> None:
    if args.json:
        print(json.dumps({"output": args.output, **figures}))
        return
    print(f"{args.output}: trained on {figures['pairs']} pairs; of {figures['held_out']} held out: accuracy "
          f"{figures['accuracy']:.1%} (the commoner answer {figures['chance']['accuracy']:.1%}), AUC "
          f"{figures['auc']:.4f} (chance 0.5)")


COMMAND = Command(
    help="train the BERT-CNN by which caption re-ranks, from labels and captions",
    example="blip-fast train-reranker pairs.tsv --bert bert-base-uncased/ --output models/reranker",
    arguments=_arguments,
    run=_run,
)
