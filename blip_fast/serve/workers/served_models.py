"""The models of a worker process, and the jobs that it does with them: captions in a continuous batch, scores
and answers in batches of the waiting jobs, all others one at a time."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from blip_fast.generate import GenerationConfig
from blip_fast.inference.precision import explained
from blip_fast.media.images import ImageError
from blip_fast.report.heat import overlay, word_sheet
from blip_fast.search import Index
from blip_fast.search.store import file_of, is_member, printable
from blip_fast.serve.refusals import Refused, bad_value
from blip_fast.serve.workers.messages import Message
from blip_fast.tasks.answerer import Answerer
from blip_fast.tasks.captioner import CaptionBatch, Captioned, Captioner
from blip_fast.tasks.explainer import Explainer
from blip_fast.tasks.matcher import Matcher, image_of_each
from blip_fast.tasks.model_loading import chosen_device, load_for_task, pixel_batches

if TYPE_CHECKING:
    from torch import Tensor

    from blip_fast.model.blip import BlipModel
    from blip_fast.search import Hit

# Score or question jobs that a CPU computes together. With a small model 8 together are twice as fast as one
# by one; more bring nothing, and captions wait meanwhile.
CPU_TOGETHER = 8

Result = tuple[int, Message | Refused]  # a job's number and its outcome


@dataclass(frozen=True)
class WorkerOptions:
    """The options of a worker process.

    `model` serves all tasks that its kind can do (captions, answers, matching); `matcher` and `answerer`
    replace it for their task. `loading` are keyword arguments of `load_for_task`, `caption` those of
    `GenerationConfig`.
    """

    loading: dict[str, Any]
    caption: dict[str, Any]
    batch_size: int
    prompt: str
    strip_prompt: bool
    captions: int  # most alternatives per picture
    model: str | None = None
    matcher: str | None = None
    answerer: str | None = None
    index: str | None = None
    rerank: int = 64
    explain: bool = False


class ServedModels:
    """The loaded models, and the jobs done with them. Raises ValueError or OSError, with one sentence, if a
    model cannot be loaded."""

    def __init__(self, options: WorkerOptions) -> None:
        self.options = options
        self.index = None if options.index is None else Index.open(
            options.index, device=options.loading["device"], threads=options.loading["threads"])
        self.captioner, self.matcher, self.answerer = self._tasks()
        self.explainer = self._explainer() if options.explain else None
        self.generation = GenerationConfig(**options.caption,
                                           n_best=min(options.captions, options.caption["beams"]))
        self.batch = None if self.captioner is None else self._batch(self.captioner)

    def _tasks(self) -> tuple[Captioner | None, Matcher | None, Answerer | None]:
        """The captioner, the matcher and the answerer. One model may serve several tasks. An index brings its
        own matcher, unless another one is named."""
        options = self.options
        loaded = None if options.model is None else load_for_task(options.model, **options.loading)
        captioner = Captioner(*loaded) if loaded is not None and _captions(loaded[0]) else None
        matcher = Matcher(*loaded) if loaded is not None and _matches(loaded[0]) else None
        answerer = (Answerer(*loaded) if loaded is not None and loaded[0].config.text_stacks == "untied"
                    else None)
        if options.matcher is not None:
            matcher = Matcher.from_pretrained(options.matcher, **options.loading)
        elif self.index is not None:
            matcher = self.index.matcher
        if options.answerer is not None:
            answerer = Answerer.from_pretrained(options.answerer, **options.loading)
        if captioner is None and matcher is None and answerer is None:
            raise ValueError(
                f"{options.model} neither captions nor matches nor answers: name another --model")
        return captioner, matcher, answerer

    def _explainer(self) -> Explainer:
        """An explainer with its own copy of the weights: no gradient passes layers packed for the CPU."""
        of_index = None if self.index is None else self.index.model_name
        source = self.options.matcher or of_index or self.options.model
        assert source is not None
        return Explainer.from_pretrained(source, **self.options.loading)

    def _batch(self, captioner: Captioner) -> CaptionBatch:
        captioner.checked_prompt(self.options.prompt, self.generation)
        return CaptionBatch(captioner, self.generation, self.options.batch_size, self.options.strip_prompt)

    @property
    def precision(self) -> str:
        """A sentence that names the precision on the worker's device."""
        loading = self.options.loading
        return explained(loading["dtype"], chosen_device(loading["device"]))

    @cached_property
    def about(self) -> dict[str, Any]:
        """The "ready" message: `sizes`, the image size in pixels of every task that is served."""
        tasks = {"caption": self.captioner, "score": self.matcher, "ask": self.answerer,
                 "explain": self.explainer, "search": None if self.index is None else self.index.matcher}
        served = {name: task.model.config for name, task in tasks.items() if task is not None}
        return {"sizes": {name: config.vision.image_size for name, config in served.items()}}

    def enter(self, jobs: list[Message]) -> list[Result]:
        """Start caption jobs together. Returns the results of those that are refused at once."""
        assert self.captioner is not None and self.batch is not None
        prompts = [self.options.prompt if head["prompt"] is None else head["prompt"] for head, _ in jobs]
        reads = [self.captioner.read(head["id"], _pixels(blob, head["size"]), None, prompt, self.generation)
                 for (head, blob), prompt in zip(jobs, prompts, strict=True)]
        return [self._caption_result(captioned) for captioned in self.batch.enter(reads)]

    def step(self) -> list[Result]:
        """Compute one token of every caption. Returns the results of the finished ones."""
        finished = [] if self.batch is None else self.batch.step()
        return [self._caption_result(captioned) for captioned in finished]

    def together(self, kind: str) -> int:
        """How many jobs of a kind (other than captions) `do` takes at a time."""
        task = {"score": self.matcher, "ask": self.answerer}.get(kind)
        if task is None:
            return 1
        on_cpu = task.model.vision.cls_token.device.type == "cpu"
        return min(CPU_TOGETHER, self.options.batch_size) if on_cpu else self.options.batch_size

    def do(self, jobs: list[Message]) -> list[Result]:
        """The results of jobs of one kind (other than captions)."""
        task = {"score": self._score, "ask": self._ask, "search": self._search, "explain": self._explain}
        try:
            found = task[jobs[0][0]["kind"]](jobs)
        except ValueError as error:  # a text or a picture does not fit the task
            if len(jobs) > 1:  # do each alone, so that only the bad one is refused
                return [result for job in jobs for result in self.do([job])]
            return [(jobs[0][0]["id"], bad_value(str(error)))]
        return [(head["id"], message) for (head, _), message in zip(jobs, found, strict=True)]

    def _caption_result(self, captioned: Captioned) -> Result:
        result = captioned.result
        if isinstance(result, ImageError):
            return captioned.place, bad_value(str(result).removeprefix(f"{captioned.image}: "))
        captions = [{"text": caption.caption, "score": caption.score} for caption in (result, *result.others)]
        return captioned.place, ({"captions": captions, "batch": len(self.batch or ()) + 1}, b"")

    def _score(self, jobs: list[Message]) -> list[Message]:
        assert self.matcher is not None
        texts = [head["texts"] for head, _ in jobs]
        packed = self.matcher.pack([text for mine in texts for text in mine])
        (pixels,) = pixel_batches([_pixels(blob, head["size"]) for head, blob in jobs],
                                  self.matcher.model.config.vision.image_size, len(jobs))
        scores = self.matcher.score_pairs(pixels, packed, image_of_each(texts))
        counts = [len(mine) for mine in texts]
        each = zip(texts, scores.itm.split(counts), scores.itc.split(counts), strict=True)
        return [({"scores": _rows(*mine), "batch": len(jobs)}, b"") for mine in each]

    def _ask(self, jobs: list[Message]) -> list[Message]:
        assert self.answerer is not None
        answers = self.answerer([_pixels(blob, head["size"]) for head, blob in jobs],
                                [head["question"] for head, _ in jobs])
        return [({"answer": answer.answer, "score": answer.score, "batch": len(jobs)}, b"")
                for answer in answers]

    def _search(self, jobs: list[Message]) -> list[Message]:
        assert self.index is not None
        ((head, blob),) = jobs
        if head["text"] is not None:
            hits = self.index.query(head["text"], top=head["k"], rerank=self.options.rerank)
        else:
            hits = self.index.query(image=_pixels(blob, head["size"]), top=head["k"])
        return [({"hits": [_hit(hit) for hit in hits]}, b"")]

    def _explain(self, jobs: list[Message]) -> list[Message]:
        """The map of one word over the picture, or a sheet with the maps of all words."""
        assert self.explainer is not None
        ((head, blob),) = jobs
        size, (width, height) = head["size"], head["panel"]
        picture = Image.frombytes("RGB", (width, height), blob[3 * size**2 :])
        pixels, word = _pixels(blob[: 3 * size**2], size), head["word"]
        explanation = self.explainer(pixels, head["text"], () if word is None else (word,))
        drawn = (word_sheet(picture, [explanation.text, *explanation.words]) if word is None
                 else overlay(picture, explanation.words[0].map.numpy()))
        stream = io.BytesIO()
        drawn.save(stream, "PNG")
        return [({"itm": explanation.itm}, stream.getvalue())]


def _captions(model: BlipModel) -> bool:
    # An untied decoder reads questions.
    return model.config.has_decoder and model.config.text_stacks != "untied"


def _matches(model: BlipModel) -> bool:
    return model.config.matching and model.config.contrastive


def _pixels(blob: bytes, size: int) -> NDArray[np.uint8]:
    """[size, size, 3]"""
    return np.frombuffer(blob, np.uint8).reshape(size, size, 3)


def _rows(texts: list[str], itm: Tensor, itc: Tensor) -> list[dict[str, Any]]:
    rows = zip(texts, itm.tolist(), itc.tolist(), strict=True)
    return [{"text": text, "itm": matching, "itc": cosine} for text, matching, cosine in rows]


def _hit(hit: Hit) -> dict[str, Any]:
    """`where` (the path of the picture) stays in the server and is not sent to clients."""
    where = {"path": str(file_of(hit.image)), "start": hit.image.start,
             "length": hit.image.size if is_member(hit.image) else None}
    name = "/".join(hit.image.name.split("/")[-2:])  # hide the rest of the local path
    return {"name": printable(name), "score": hit.score, "cosine": hit.itc,
            "where": {**where, "name": hit.image.name}}
