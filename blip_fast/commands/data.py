"""`blip-fast data`: make data to train and evaluate on. It packs images into shards, turns published
annotations into rows, and draws scenes, tasks about scenes, and clips."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from blip_fast.command_line.command import Command


def _arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subcommands(dest="action", metavar="ACTION")
    for name, add, help, example in (
        ("pack", _pack_arguments, "pack a folder of images and captions into shards",
         "blip-fast data pack photos/ --annotations captions.csv --output shards/"),
        ("annotations", _annotations_arguments, "turn a published data set's annotations into "
         "annotations.jsonl",
         "blip-fast data annotations karpathy dataset_coco.json --output coco/annotations.jsonl"),
        ("scenes", _scenes_arguments, "draw pictures with captions whose truth is known",
         "blip-fast data scenes scenes/train --count 20000 --noise 0.3"),
        ("clips", _clips_arguments, "draw videos of moving things with captions, questions and answers",
         "blip-fast data clips clips/ --count 200"),
        ("scene-task", _scene_task_arguments, "draw questions, pairs or dialogues about scenes, with "
         "right answers",
         "blip-fast data scene-task questions vqa/train --count 6000"),
    ):
        action = ArgumentParser(description=help, epilog=f"example: {example}", exit_on_error=False)
        add(action)
        action.add_argument("--json", action="store_true", help="print what was written as one JSON object")
        actions.add_subcommand(name, action, help=help)


def _pack_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="where the images are, at any depth")
    add("--output", required=True, metavar="DIR",
        help="directory for the shards; images that training could not "
             "decode are left out and named in its quarantine.jsonl")
    add("--annotations", type=str | None, metavar="FILE",
        help="JSONL or CSV: image (path below FOLDER), caption or captions, perhaps split and id; in JSONL "
             "also question and answers, or second_image and label (default: annotations.jsonl in "
             "FOLDER, else every image is packed without captions)")
    add("--split", type=str | None, help="pack the rows of this split only")
    add("--samples-per-shard", type=int, default=1000, metavar="N", help="images in one tar file")
    add("--shuffle-seed", type=int | None, metavar="N",
        help="shuffle first: training itself shuffles within a buffer only")


def _annotations_arguments(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("format", choices=("karpathy", "coco", "vqa", "visual-genome", "nlvr2", "visdial", "msrvtt",
                            "msrvtt-qa", "msvd-qa"),
        help="karpathy (COCO, Flickr30k), coco (also NoCaps), vqa (v2), visual-genome, nlvr2, visdial "
             "(1.0), or of videos msrvtt, msrvtt-qa or msvd-qa; the first three, nlvr2 and msrvtt also as "
             "published with BLIP")
    add("files", nargs="+", metavar="FILE",
        help="as published; vqa: questions and annotations, a test set's questions "
             "alone; visual-genome: question_answers.json image_data.json; "
             "visdial: dialogues, optionally dense annotations too, after the "
             "training set's dataset_coco.json of Karpathy's split; msvd-qa: "
             "questions and youtube_mapping.txt")
    add("--output", required=True, metavar="FILE.jsonl", help="annotations.jsonl in the folder of images")
    add("--split", type=str | None, help="give this to rows that have no split of their own")
    add("--prefix", default="", metavar="FOLDER",
        help="put before every image: its folder's place below that")


def _scenes_arguments(parser: ArgumentParser) -> None:
    _drawing_arguments(parser)
    parser.add_argument("--noise", type=float, default=0.0, metavar="SHARE",
                        help="share of wrong captions, 0 to 1")


def _scene_task_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("task", choices=("questions", "pairs", "dialogues"),
                        help="rows for VQA, NLVR2 (--count is of pairs) or VisDial")
    _drawing_arguments(parser)


def _clips_arguments(parser: ArgumentParser) -> None:
    _drawing_arguments(parser, "new folder for the MP4 files and their annotations.jsonl, and in it a folder "
                               "questions, whose annotations.jsonl asks about them")
    parser.set_defaults(count=200, split="test")


def _drawing_arguments(parser: ArgumentParser,
                       folder: str = "new folder for the PNG files and their annotations.jsonl") -> None:
    add = parser.add_argument
    add("folder", metavar="DIR", help=folder)
    add("--count", type=int, default=1000, metavar="N", help="pictures or videos to draw")
    add("--split", choices=("train", "test"), default="train",
        help="what is drawn of test shows combinations that train never shows")
    add("--seed", type=int, default=0)
    add("--image-size", type=int, default=224, metavar="N", help="pixels a side, of videos an even number")


def _run(args: Namespace) -> None:
    actions = {"pack": _pack, "annotations": _annotations, "scenes": _scenes, "clips": _clips,
               "scene-task": _scene_task}
    actions[args.action](getattr(args, args.action))


def _pack(args: Namespace) -> None:
    from blip_fast.data.shards.annotated import ANNOTATIONS
    from blip_fast.data.shards.pack import QUARANTINE, pack

    default = Path(args.folder) / ANNOTATIONS
    annotations = args.annotations or (default if default.is_file() else None)
    report = pack(args.folder, annotations, args.output, split=args.split,
                  samples_per_shard=args.samples_per_shard, shuffle_seed=args.shuffle_seed)
    quarantine = report.directory / QUARANTINE
    if args.json:
        print(json.dumps({**asdict(report), "directory": str(report.directory),
                          "quarantine": str(quarantine)}))
        return
    print(f"{report.directory}: {report.samples} images in {report.shards} shards, "
          f"{report.without_caption} of them without a caption")
    if report.quarantined:
        print(f"{quarantine}: {report.quarantined} images left out, and why")


def _annotations(args: Namespace) -> None:
    from blip_fast.data.shards.published import published_rows

    output, partial, count = Path(args.output), Path(f"{args.output}.partial"), 0
    if output.exists():
        raise FileExistsError(f"{output} exists: remove it or name another file")
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row in published_rows(args.format, args.files, args.split, args.prefix):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        partial.rename(output)
    finally:
        partial.unlink(missing_ok=True)
    print(json.dumps({"annotations": str(output), "rows": count}) if args.json else f"{output}: {count} rows")


def _scenes(args: Namespace) -> None:
    from blip_fast.scenes.scenes import write_scenes

    folder = _new_folder(args)
    rows = write_scenes(folder, args.count, args.split, args.seed, args.noise, args.image_size)
    wrong = sum(not row["caption_is_right"] for row in rows)
    if args.json:
        print(json.dumps({"directory": str(folder), "images": len(rows), "wrong_captions": wrong}))
    else:
        print(f"{folder}: {len(rows)} scenes of split {args.split}, {wrong} of them with a wrong caption")


def _clips(args: Namespace) -> None:
    from blip_fast.scenes.clips import QUESTIONS, write_clips

    folder = _new_folder(args)
    rows = write_clips(folder, args.count, args.split, args.seed, args.image_size)
    if args.json:
        print(json.dumps({"directory": str(folder), "videos": len(rows),
                          "questions": str(folder / QUESTIONS)}))
    else:
        print(f"{folder}: {len(rows)} clips of split {args.split}; questions about them in "
              f"{folder / QUESTIONS}")


def _scene_task(args: Namespace) -> None:
    from blip_fast.scenes.scene_tasks import write_scene_task

    folder = _new_folder(args)
    written = write_scene_task(args.task, folder, args.count, args.split, args.seed, args.image_size)
    if args.json:
        print(json.dumps({"directory": str(folder), **written}))
        return
    print(f"{folder}: {written['rows']} rows of split {args.split}")
    for kind, answers in written["balance"].items():
        print(f"{kind}: {', '.join(f'{answer} {count}' for answer, count in answers.items())}")
    print(f"chance: {', '.join(f'{name} {value:.3f}' for name, value in written['chance'].items())}")


def _new_folder(args: Namespace) -> Path:
    """The folder to draw into. Raises if it is not empty, or if --count or --image-size is too small."""
    folder = Path(args.folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already: remove it or name another folder")
    if args.count < 1 or args.image_size < 1:
        raise ValueError(f"--count and --image-size must be at least 1, got {args.count} and "
                         f"{args.image_size}")
    return folder


COMMAND = Command(
    help="pack images into shards, read published annotations, or draw scenes and clips",
    example="blip-fast data pack photos/ --annotations captions.csv --output shards/",
    arguments=_arguments,
    run=_run,
)
