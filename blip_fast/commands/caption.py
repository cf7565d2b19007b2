"""`blip-fast caption`: captions for any number of images, printed or written to a JSON Lines file."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from blip_fast.command_line.caption_options import add_caption_options
from blip_fast.command_line.command import Command
from blip_fast.command_line.image_rows import Row, Work, Worker, add_image_options, named, run_images
from blip_fast.command_line.lists import read_list
from blip_fast.command_line.model_options import add_model_options, model_options

if TYPE_CHECKING:
    from blip_fast.generate import GenerationConfig
    from blip_fast.tasks.captioner import Caption, Captioned, Captioner
    from blip_fast.tasks.reranking import Scorer

BY_LABEL = ("belief", "bert-cnn")  # values of --rerank that use the image's likeliest label


def _arguments(parser: ArgumentParser) -> None:
    add_model_options(parser)
    add_image_options(parser, "one per line, optionally followed by a tab and its own prompt")
    add_caption_options(parser)
    add = parser.add_argument
    add("--strip-prompt", action="store_true", help="leave the prompt out of `caption`")
    add("--beams", type=int | None, help="1 is greedy (default: 3, with --n-best at least N, with --top-p 1)")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: repeat fewer words")
    add("--length-penalty", type=float, default=1.0, help="above 1: prefer long captions among beams")
    add("--top-p", type=float | None, help="nucleus sampling: draw from tokens that hold this probability")
    add("--top-k", type=int, default=50, help="with --top-p: from so many tokens at most")
    add("--temperature", type=float, default=1.0, help="with --top-p: above 1 is more varied")
    add("--seed", type=int, default=0, help="with --top-p; with the image's pixels it decides what is drawn")
    add("--n-best", type=int, default=1, metavar="N",
        help="texts per image, at most as many as beams, or samples")
    add("--rerank", type=str | None, metavar="BY",
        help="order the --n-best texts by what the image shows: itm, the probability that they match; "
             "belief, their own probability revised by the image's likeliest label; or bert-cnn, the "
             "probability that they belong to that label, by --reranker")
    add("--matcher", type=str | None, metavar="DIR_OR_ID",
        help="with --rerank: image-text retrieval or pre-training checkpoint that looks at them "
             "(default: --model)")
    add("--labels", type=str | None, metavar="FILE",
        help="with --rerank belief or bert-cnn: a label a line, or a .json list")
    add("--reranker", type=str | None, metavar="DIR",
        help="with --rerank bert-cnn: what `blip-fast train-reranker` wrote")
    add("--first-token", default="[CLS]",
        help="with --rerank itm: what texts start with, [CLS] as in transformers, [ENC] as in training")
    add("--banned", action="append", default=[], metavar="WORDS",
        help="what no caption may contain; may be repeated")
    add("--json", action="store_true",
        help="print JSON: image, caption, token_ids, score, with --rerank also rerank; or image, error")


def _run(args: Namespace) -> int:
    options = _caption_options(args)
    return run_images(args, partial(_worker, args, options, _labels(args, options["generation"])), _lines)


def _caption_options(args: Namespace) -> dict[str, Any]:
    """Keyword arguments of `Captioner.stream`."""
    from blip_fast.generate import GenerationConfig

    beams = args.beams if args.beams is not None else 1 if args.top_p is not None else max(3, args.n_best)
    generation = GenerationConfig(
        beams=beams, max_length=args.max_length, min_length=args.min_length, beam_rule=args.beam_rule,
        repetition_penalty=args.repetition_penalty, length_penalty=args.length_penalty, n_best=args.n_best,
        top_p=args.top_p, top_k=args.top_k, temperature=args.temperature, seed=args.seed)
    return {"prompt": args.prompt, "generation": generation, "banned": args.banned,
            "strip_prompt": args.strip_prompt, "batch_size": args.batch_size}


def _labels(args: Namespace, generation: GenerationConfig) -> list[str]:
    """The labels of --labels. Raises ValueError for options of re-ranking that do not fit together."""
    if args.rerank not in (None, "itm", *BY_LABEL):
        raise ValueError(f"--rerank must be itm, belief or bert-cnn, got {args.rerank!r}")
    if args.rerank is None and args.matcher is not None:
        raise ValueError("--matcher is for --rerank: say by what (itm, belief, bert-cnn)")
    if args.rerank is not None and args.n_best < 2:
        raise ValueError("--rerank chooses among several texts: ask for them, for example --n-best 20")
    if (args.rerank in BY_LABEL) != (args.labels is not None):
        raise ValueError("--rerank belief or bert-cnn and --labels FILE need each other")
    if (args.rerank == "bert-cnn") != (args.reranker is not None):
        raise ValueError("--rerank bert-cnn and --reranker DIR need each other")
    if args.labels is None:
        return []
    if args.rerank == "belief":
        from blip_fast.tasks.reranking import BeliefScorer

        BeliefScorer.check_scores(generation)
    return read_list(args.labels, "label")


def _worker(args: Namespace, options: dict[str, Any], labels: list[str]) -> Worker:
    from blip_fast.tasks.captioner import Captioner

    captioner = Captioner.from_pretrained(args.model, **model_options(args))
    scorer = None if args.rerank is None else _scorer(args, captioner, labels)
    return partial(_rows, captioner, options, scorer)


def _scorer(args: Namespace, captioner: Captioner, labels: list[str]) -> Scorer:
    from blip_fast.tasks.classifier import Classifier
    from blip_fast.tasks.matcher import Matcher
    from blip_fast.tasks.model_loading import load_for_task
    from blip_fast.tasks.reranking import BeliefScorer, BertCnnScorer, ItmScorer

    if args.matcher is None:
        loaded = captioner.model, captioner.tokenizer
    else:  # --image-size and --heads are for --model only
        loaded = load_for_task(args.matcher, dtype=args.dtype, device=args.device, tokenizer=args.tokenizer)
    if args.rerank == "itm":
        return ItmScorer(Matcher(*loaded), args.first_token)
    classifier = Classifier(*loaded)
    if args.rerank == "belief":
        return BeliefScorer(classifier, classifier.labels(labels))
    from blip_fast.checkpoint.bert import load_bert_cnn

    return BertCnnScorer(classifier, classifier.labels(labels), *load_bert_cnn(args.reranker))


def _rows(captioner: Captioner, options: dict[str, Any], scorer: Scorer | None,
          work: Iterable[Work]) -> Generator[Row]:
    """A row for each image: image, prompt (if the image has its own), caption, token_ids, score, and rerank
    and others if requested; or image, prompt and error."""
    from blip_fast.tasks.reranking import reranked

    given = (image if prompt is None else (image, prompt) for image, prompt in work)
    stream = captioner.stream(given, **options)
    if scorer is not None:
        stream = reranked(captioner, stream, scorer, options["prompt"], options["batch_size"])
    for captioned in stream:
        yield _row(captioned)


def _row(captioned: Captioned) -> Row:
    from blip_fast.media.images import ImageError

    row = named(captioned.image, captioned.prompt)
    if isinstance(captioned.result, ImageError):
        return {**row, "error": str(captioned.result)}
    others = [_caption_fields(other) for other in captioned.result.others]
    return {**row, **_caption_fields(captioned.result)} | ({"others": others} if others else {})


def _caption_fields(caption: Caption) -> Row:
    fields = {"caption": caption.caption, "token_ids": caption.token_ids, "score": caption.score}
    return fields if caption.rerank is None else {**fields, "rerank": caption.rerank}


def _lines(row: Row) -> Iterable[str]:
    return (f"{row['image']}\t{text['caption']}" for text in (row, *row.get("others", ())))


COMMAND = Command(
    help="write captions for images",
    example="blip-fast caption --model Salesforce/blip-image-captioning-base --json photos/",
    arguments=_arguments,
    run=_run,
)
