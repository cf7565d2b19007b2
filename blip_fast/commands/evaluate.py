"""`blip-fast evaluate`: measure a model on annotated images."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jsonargparse import ArgumentParser, Namespace

from blip_fast.command_line.caption_options import add_caption_options
from blip_fast.command_line.command import Command
from blip_fast.command_line.model_options import add_model_options, model_options, settled

if TYPE_CHECKING:
    from blip_fast.data.shards.annotated import AnnotatedImage
    from blip_fast.parallel.ranks import Ranks


def _arguments(parser: ArgumentParser) -> None:
    tasks = parser.add_subcommands(dest="task", metavar="TASK")
    for name, named in TASKS.items():
        task = ArgumentParser(description=named.help,
                              epilog=f"example: blip-fast evaluate {name} {named.example}",
                              exit_on_error=False)
        add_model_options(task)
        task.add_argument("--data", required=True, metavar="DIR",
                          help="folder with annotations.jsonl and images, or packed shards")
        task.add_argument("--split", type=str | None, default="test", help="rows to take; null takes all")
        named.add_arguments(task)
        task.add_argument("--json", action="store_true", help="print the figures as one JSON object")
        tasks.add_subcommand(name, task, help=named.help)


def _retrieval_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--top-k", type=int, default=256,
        help="candidates that the matching head re-ranks, of each image and of each text; 0 for "
             "cosines alone")
    add("--first-token", default="[ENC]", help="what the matching head's texts start with, [ENC] or [CLS]")


def _caption_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add_caption_options(parser)
    add("--beams", type=int, default=3, help="1 is greedy")
    add("--metrics", type=str | None,
        help="also measure by java-free (BLEU, ROUGE-L and CIDEr, words split without Java), "
             "coco-without-spice (these and METEOR over PTB tokens, as published; needs Java) or coco (SPICE "
             "too), of each domain too where rows name a \"domain\" (NoCaps); needs blip-fast[eval]")
    add("--matcher", type=str | None, metavar="DIR_OR_ID",
        help="also itm_score: the mean probability, by this checkpoint's matching head, that a caption "
             "belongs to its image")
    add("--output", type=str | None, metavar="FILE.jsonl", help="write image, caption, references here")


def _vqa_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--answers", type=str | None, metavar="FILE",
        help="choose from these, as published: an answer a line, or a .json list; without it answers "
             "are written")
    add("--top-k", type=int, default=128,
        help="with --answers: how many, chosen by their first tokens, are compared in full")
    add("--beams", type=int, default=3, help="without --answers: 1 is greedy")
    add("--max-length", type=int, default=10, help="without --answers: tokens at most, the first one counted")
    add("--min-length", type=int, default=1,
        help="without --answers: tokens before the end may come, counted alike")
    add("--first-token", default="[ENC]",
        help="what questions start with: [ENC] as published, [CLS] in transformers")
    add("--output", type=str | None, metavar="FILE.json",
        help="write the test server's list of question_id and answer; rows need a question_id")


def _nlvr2_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--output", type=str | None, metavar="FILE.csv",
                        help="write what the published evaluation reads, a line of identifier and True "
                             "or False for each pair; rows need an identifier")


def _visdial_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--caption-in", choices=("attention", "text"), default="attention",
                        help="where the image's caption stands: in the cross-attention with the "
                             "image, as in the paper, or in the text before the history, for models whose "
                             "images and texts differ in width or that were not trained on dialogues")


def _video_retrieval_arguments(parser: ArgumentParser) -> None:
    _retrieval_arguments(parser)
    parser.set_defaults(top_k=64)  # as published
    parser.add_argument("--frames", type=int, default=8, help="of each video, evenly apart")


def _video_qa_arguments(parser: ArgumentParser) -> None:
    _vqa_arguments(parser)
    parser.add_argument("--frames", type=int, default=16, help="of each video, evenly apart")


def _run(args: Namespace) -> None:
    from blip_fast.data.shards.annotated import annotated_images
    from blip_fast.parallel.ranks import torchrun_ranks

    options = getattr(args, args.task)
    images = annotated_images(options.data, options.split)
    with torchrun_ranks() as ranks:
        if ranks.count > 1 and not TASKS[args.task].shared:
            raise ValueError(f"evaluate {args.task} is the work of one process: start it without torchrun")
        _settle(options, ranks)
        figures = TASKS[args.task].run(options, images, ranks)
    if ranks.rank > 0:
        return
    if options.json:
        print(json.dumps({"task": args.task, "images": len(images), "precision": options.dtype, **figures}))
    else:
        _print_table(args.task, len(images), {"precision": options.dtype, **figures})


def _settle(options: Namespace, ranks: Ranks) -> None:
    """Choose the precision by the first rank's device, for all ranks. It is printed among the figures."""
    own, _ = settled(options.dtype, options.device)
    options.dtype = ranks.share(lambda those: [own for _ in those], range(ranks.count))[0]


def _retrieval(args: Namespace, images: list[AnnotatedImage], ranks: Ranks) -> dict[str, Any]:
    from blip_fast.evaluation import evaluate_retrieval
    from blip_fast.tasks.model_loading import load_for_task

    model, tokenizer = load_for_task(args.model, **model_options(args))
    with _progress(ranks) as (track, pairs_done):
        result, image_of_text = evaluate_retrieval(model, tokenizer, images, top_k=args.top_k,
                                                   first_token=args.first_token, track=track,
                                                   progress=pairs_done)
    return {"texts": len(image_of_text), "top_k": args.top_k, "pairs": result.pairs,
            **result.recalls(image_of_text),
            **result.median_ranks(image_of_text), "chance": result.chances(image_of_text)}


def _caption(args: Namespace, images: list[AnnotatedImage], ranks: Ranks) -> dict[str, Any]:
    from blip_fast.data.shards.annotated import annotated_images
    from blip_fast.evaluation import evaluate_captions, itm_score
    from blip_fast.generate import GenerationConfig
    from blip_fast.metrics.captions import CaptionMetrics
    from blip_fast.tasks.captioner import Captioner
    from blip_fast.tasks.matcher import Matcher

    generation = GenerationConfig(beams=args.beams, max_length=args.max_length, min_length=args.min_length,
                                  beam_rule=args.beam_rule)
    train = [] if args.split == "train" else [caption for image in annotated_images(args.data, None)
                                              if image.row.get("split") == "train"
                                              for caption in image.captions]
    metrics = None if args.metrics is None else CaptionMetrics(args.metrics)
    captioner = Captioner.from_pretrained(args.model, **model_options(args))
    matcher = None if args.matcher is None else Matcher.from_pretrained(
        args.matcher, **{**model_options(args), "image_size": None})
    with _progress(ranks) as (track, _):
        result = evaluate_captions(captioner, images, generation, prompt=args.prompt, train_captions=train,
                                   metrics=metrics, track=track)
        matched = None if matcher is None else itm_score(matcher, images, result.captions, track=track)
    if args.output is not None:
        rows = ({"image": image.name, "caption": caption, "references": image.captions}
                for image, caption in zip(images, result.captions, strict=True))
        _write(args.output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    figures = {"lm_loss": result.loss, "unigram_entropy": result.unigram_entropy,
               "unigram_cross_entropy": result.unigram_cross_entropy}
    if metrics is not None:
        figures |= {"metrics": metrics.which, **result.metrics}
        figures |= metrics.by_domain(result.captions, [image.captions for image in images],
                                     [image.row.get("domain") for image in images])
    figures |= {} if matched is None else {"itm_score": matched}
    if result.slots is not None:
        scores = asdict(result.slots)
        chance = {name: scores.pop(f"chance_{name}") for name in ("slot_accuracy", "exact_match")}
        figures |= {**scores, "chance": chance}
    return figures


def _vqa(args: Namespace, images: list[AnnotatedImage], ranks: Ranks) -> dict[str, Any]:
    from blip_fast.command_line.lists import read_list
    from blip_fast.evaluation import evaluate_answers
    from blip_fast.generate import GenerationConfig
    from blip_fast.tasks.answerer import Answerer

    generation = GenerationConfig(beams=args.beams, max_length=args.max_length, min_length=args.min_length)
    choices = [] if args.answers is None else read_list(args.answers, "answer")
    _check_names(args.output, images, "question_id")
    answerer = Answerer.from_pretrained(args.model, **model_options(args))
    with _progress(ranks) as (track, _):
        found = evaluate_answers(answerer, images, generation, choices=choices, top_k=args.top_k,
                                 first_token=args.first_token, track=track, ranks=ranks)
    if args.output is not None and ranks.rank == 0:
        content = [{"question_id": image.row["question_id"], "answer": answer}
                   for image, answer in zip(images, found.answers, strict=True)]
        _write(args.output, json.dumps(content))
    by_type = {f"vqa_accuracy_{name}": value for name, value in sorted(found.by_type.items())}
    return {"vqa_accuracy": found.vqa_accuracy, **by_type, "commonest_answer": found.commonest}


def _nlvr2(args: Namespace, images: list[AnnotatedImage], ranks: Ranks) -> dict[str, Any]:
    from blip_fast.evaluation import evaluate_pairs
    from blip_fast.tasks.reasoner import Reasoner

    _check_names(args.output, images, "identifier")
    reasoner = Reasoner.from_pretrained(args.model, **model_options(args))
    with _progress(ranks) as (track, _):
        found = evaluate_pairs(reasoner, images, track=track, ranks=ranks)
    if args.output is not None and ranks.rank == 0:
        _write(args.output, "".join(f"{image.row['identifier']},{judged}\n"
                                    for image, judged in zip(images, found.judged, strict=True)))
    return {"accuracy": found.accuracy, "consistency": found.consistency}


def _visdial(args: Namespace, images: list[AnnotatedImage], ranks: Ranks) -> dict[str, Any]:
    from blip_fast.evaluation import evaluate_dialogues
    from blip_fast.tasks.dialog_ranking import DialogRanker

    ranker = DialogRanker.from_pretrained(args.model, **model_options(args))
    with _progress(ranks) as (track, _):
        return evaluate_dialogues(ranker, images, caption_in=args.caption_in, track=track, ranks=ranks)


def _video_retrieval(args: Namespace, images: list[AnnotatedImage], ranks: Ranks) -> dict[str, Any]:
    from blip_fast.data.shards.videos import as_videos

    return {"frames": args.frames, **_retrieval(args, as_videos(images, args.frames), ranks)}


def _video_qa(args: Namespace, images: list[AnnotatedImage], ranks: Ranks) -> dict[str, Any]:
    from blip_fast.data.shards.videos import as_videos

    figures = _vqa(args, as_videos(images, args.frames), ranks)
    return {"frames": args.frames, "accuracy": figures["commonest_answer"]}


def _check_names(output: str | None, images: list[AnnotatedImage], key: str) -> None:
    """Raises ValueError if predictions are to be written and a row lacks the key that identifies it."""
    if output is not None and (unnamed := next((image.name for image in images if key not in image.row),
                                               None)):
        raise ValueError(f"{unnamed} has a row without {key}: --output needs one in every row")


def _write(output: str, content: str) -> None:
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(content, "utf-8")


@contextmanager
def _progress(ranks: Ranks) -> Iterator[tuple[Callable[[Iterable[Any]], Iterable[Any]],
                                              Callable[[int, int], None]]]:
    """Progress bars on the first rank's error stream, if that is a terminal. Yields two functions: one wraps
    the iteration over images, the other takes the number of re-ranked pairs and their total."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    hidden = ranks.rank > 0 or not sys.stderr.isatty()
    with Progress(*columns, console=Console(stderr=True), disable=hidden) as progress:
        pairs = progress.add_task("pairs", total=None, visible=False)
        yield (lambda items: progress.track(items, description="images"),
               lambda done, total: progress.update(pairs, completed=done, total=total, visible=True))


def _print_table(task: str, images: int, figures: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    chance = figures.pop("chance", {})
    table = Table(f"{task}, {images} images", "", box=SIMPLE_HEAD)
    table.columns[1].justify = "right"
    if chance:
        table.add_column("chance", justify="right")
    for name, value in figures.items():
        cells = [f"{100 * chance[name]:.1f} %" if name in chance else ""] if chance else []
        table.add_row(name, _format(value, name in chance), *cells)
    Console().print(table)


def _format(value: float | str | None, percent: bool) -> str:
    if value is None or isinstance(value, str):
        return value or "–"
    return f"{100 * value:.1f} %" if percent else f"{value:.4g}"


class _Task(NamedTuple):
    help: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace, list[AnnotatedImage], Ranks], dict[str, Any]]
    example: str
    shared: bool = False  # whether the work can be shared among ranks


TASKS = {
    "retrieval": _Task("texts found for images and images for texts", _retrieval_arguments, _retrieval,
                       "--model Salesforce/blip-itm-base-flickr --data flickr8k --top-k 128"),
    "caption": _Task("captions, and the loss of those of people", _caption_arguments, _caption,
                     "--model Salesforce/blip-image-captioning-base --data flickr8k --metrics java-free"),
    "vqa": _Task("answers to questions, by VQA's official accuracy", _vqa_arguments, _vqa,
                 "--model Salesforce/blip-vqa-base --data vqa --split val --answers "
                 "answer_list.json", shared=True),
    "nlvr2": _Task("whether sentences are true of pairs of images", _nlvr2_arguments, _nlvr2,
                   "--model model_base_nlvr.pth --tokenizer bert-base-uncased --data nlvr2 --split "
                   "dev", shared=True),
    "visdial": _Task("answers ranked in dialogues, by VisDial's measures", _visdial_arguments, _visdial,
                     "--model models/visdial --data visdial --split val", shared=True),
    "video-retrieval": _Task("texts found for videos and videos for texts", _video_retrieval_arguments,
                             _video_retrieval, "--model Salesforce/blip-itm-base-coco --data msrvtt"),
    "video-qa": _Task("answers to questions about videos: the share that is right",
                      _video_qa_arguments, _video_qa,
                      "--model Salesforce/blip-vqa-base --data msvd --answers answer_list.json", shared=True),
}

COMMAND = Command(
    help="measure a model: retrieval, captions, answers (VQA), pairs (NLVR2), dialogues (VisDial), videos",
    example="blip-fast evaluate retrieval --model Salesforce/blip-itm-base-flickr --data flickr8k "
            "--top-k 128 --json",
    arguments=_arguments,
    run=_run,
)
