"""`blip-fast ask`: answers to questions about images, generated or chosen from a list."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from blip_fast.command_line.command import Command
from blip_fast.command_line.lists import read_list
from blip_fast.command_line.model_options import add_model_options, model_options, settle_precision
from blip_fast.command_line.rows import Row, Work, read_rows, run_rows

if TYPE_CHECKING:
    from torch import Tensor

    from blip_fast.tasks.answerer import Answer, Answerer


def _arguments(parser: ArgumentParser) -> None:
    add_model_options(parser)
    add = parser.add_argument
    add("image", nargs="?", type=str | None, metavar="IMAGE", help="image file")
    add("asked", nargs="*", metavar="QUESTION", help="questions about the image")
    add("--questions", type=str | None, metavar="FILE",
        help='instead: a .jsonl file with "image" and "question" in every line (other keys are kept), or '
             "a .tsv file of both; prints JSON lines")
    add("--answers", type=str | None, metavar="FILE",
        help="choose from these: an answer a line, or a .json list; without it answers are written "
             "word by word")
    add("--top-k", type=int, default=128,
        help="with --answers: how many, chosen by their first tokens, are compared in full")
    add("--n-best", type=int, default=1, help="with --answers: also list so many of the best")
    add("--beams", type=int, default=3, help="without --answers: 1 is greedy")
    add("--max-length", type=int, default=10, help="without --answers: tokens at most, the first one counted")
    add("--min-length", type=int, default=1,
        help="without --answers: tokens before the end may come, counted alike")
    add("--first-token", type=str | None,
        help="what questions start with: [CLS] as in transformers (default), [ENC] as in the published "
             "training and evaluation (default with --answers)")
    add("--batch-size", type=int, default=16, help="images at a time")
    add("--json", action="store_true", help="print JSON: image, question, answer, token_ids, score")
    add("--output", type=str | None, metavar="FILE.jsonl",
        help="with --questions: write here instead of printing")
    add("--resume", action="store_true",
        help="with --output: go on with the file, leave out questions that it holds")


def _run(args: Namespace) -> int:
    if (args.questions is None) == (args.image is None):
        raise ValueError("name an image and questions about it, or --questions FILE")
    for name in ("top_k", "n_best"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.n_best > 1 and args.answers is None:
        raise ValueError("--n-best lists answers of --answers FILE: name one")
    answers = None if args.answers is None else read_list(args.answers, "answer")
    if args.questions is not None:
        return run_rows(args, read_rows(args.questions, "question"), "question", lambda: _work(args, answers))
    if not args.asked or not all(question.strip() for question in args.asked):
        raise ValueError(f"no question about {args.image}: name one at least, and none that is empty")
    if args.output is not None or args.resume:
        raise ValueError("--output and --resume are for --questions FILE")
    return _ask_one(args, answers)


def _ask_one(args: Namespace, answers: list[str] | None) -> int:
    from blip_fast.inference.precision import say
    from blip_fast.media.images import evaluation_transform, load_image

    image = load_image(args.image)
    line = settle_precision(args)
    work, image_size = _work(args, answers)
    say(line)
    for question, row in zip(args.asked, work(evaluation_transform([image], image_size), [args.asked]),
                             strict=True):
        if args.json:
            print(json.dumps({"image": args.image, "question": question, **row}, ensure_ascii=False))
            continue
        print(row["answer"] if len(args.asked) == 1 else f"{question}\t{row['answer']}")
        for other in row.get("answers", ())[1:]:
            print(f"  {other['score']:8.3f}  {other['answer']}")
    return 0


def _work(args: Namespace, answers: list[str] | None) -> tuple[Work, int]:
    from blip_fast.generate import GenerationConfig
    from blip_fast.tasks.answerer import Answerer

    generation = GenerationConfig(beams=args.beams, max_length=args.max_length, min_length=args.min_length)
    answerer = Answerer.from_pretrained(args.model, **model_options(args))
    first_token = args.first_token or ("[CLS]" if answers is None else "[ENC]")
    answerer.pack([], first_token)  # refuses an unknown first token before any work is done
    work = (_generating_work(answerer, generation, first_token) if answers is None
            else _ranking_work(answerer, answers, args.top_k, args.n_best, first_token))
    return work, answerer.model.config.vision.image_size


def _generating_work(answerer: Answerer, generation: Any, first_token: str) -> Work:
    from blip_fast.tasks.matcher import image_of_each

    def write(pixels: Tensor, questions: list[list[str]]) -> Iterable[Row]:
        packed = answerer.pack([question for mine in questions for question in mine], first_token)
        return map(asdict, answerer.answer_pixels(pixels, packed, generation, image_of_each(questions)))

    return write


def _ranking_work(answerer: Answerer, answers: list[str], top_k: int, n_best: int, first_token: str) -> Work:
    from blip_fast.model.tokenizer import clean_question
    from blip_fast.tasks.matcher import image_of_each

    choices = answerer.answer_list(answers)

    def row(best: list[Answer]) -> Row:
        others = {"answers": [{"answer": each.answer, "score": each.score}
                              for each in best]} if n_best > 1 else {}
        return asdict(best[0]) | others

    def choose(pixels: Tensor, questions: list[list[str]]) -> Iterable[Row]:
        packed = answerer.pack([clean_question(question) for mine in questions for question in mine],
                               first_token)
        images = image_of_each(questions)
        return map(row, answerer.rank_pixels(pixels, packed, choices, images, top_k=top_k, n_best=n_best))

    return choose


COMMAND = Command(
    help="answer questions about images: written word by word, or the likeliest of a list",
    example='blip-fast ask --model Salesforce/blip-vqa-base photo.jpg "how many dogs are there?"',
    arguments=_arguments,
    run=_run,
)
