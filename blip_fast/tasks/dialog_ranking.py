"""Ranks candidate answers to the questions of a dialogue about an image (VisDial; BLIP section 5.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blip_fast.inference.encoding import encode_images, evaluating
from blip_fast.media.images import ImageSource
from blip_fast.model.blip import BlipModel
from blip_fast.model.image_kv import ImageKV
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.text import TextStream
from blip_fast.model.tokenizer import Tokenizer, clean_caption, clean_question
from blip_fast.tasks.matcher import texts_at_a_time
from blip_fast.tasks.model_loading import PretrainedTask, pixel_batches

CAPTION_IN = ("attention", "text")


@dataclass(frozen=True)
class Round:
    """A question, the answer that was given (later rounds read it), and the answers to rank, if any."""

    question: str
    answer: str = ""
    candidates: Sequence[str] = ()


@dataclass(frozen=True)
class Dialogue:
    """A dialogue about one image: the image's caption, and the rounds in order."""

    caption: str
    rounds: Sequence[Round]

    @classmethod
    def from_rows(cls, caption: str, rows: Sequence[Mapping[str, Any]]) -> Dialogue:
        """From the rows that annotations hold under `dialog` (`read_annotations`)."""
        return cls(caption, [Round(row["question"], row.get("answer", ""), row.get("candidates", []))
                             for row in rows])


class DialogRanker(PretrainedTask):
    """Scores candidate answers: `DialogRanker.from_pretrained("model")("photo.jpg", dialogue)`.

    A text consists of [ENC], the previous rounds, the question and a candidate, with [SEP] after each round.
    The matching head says how well it fits. `caption_in` says where the caption goes: in the
    cross-"attention", encoded, next to the image (as in the paper), or in the "text", before the history
    (docs/decisions/tasks.md). An image's keys and values are projected once for all candidates of all its
    rounds.
    """

    def __init__(self, model: BlipModel, tokenizer: Tokenizer) -> None:
        """Raises ValueError if the model has no matching head."""
        if not model.config.matching:
            raise ValueError("this model has no matching head: take an image-text retrieval or "
                             "pre-training checkpoint")
        super().__init__(model, tokenizer)

    def __call__(self, image: ImageSource, dialogue: Dialogue, *,
                 caption_in: str = "attention") -> list[Tensor]:
        """Score the candidates of every round.

        Returns:
            For each round with candidates, float32 [candidates] on the CPU: the log-odds that an answer fits.

        Raises:
            ImageError: the image cannot be read.
            ValueError: as `score_pixels`.
        """
        pixels = next(pixel_batches([image], self.model.config.vision.image_size, 1))
        return self.score_pixels(pixels, [dialogue], caption_in=caption_in)[0]

    def score_pixels(self, pixels: Tensor, dialogues: Sequence[Dialogue], *,
                     caption_in: str = "attention") -> list[list[Tensor]]:
        """Score one dialogue about each image of a batch, [images, 3, image_size, image_size] after the
        evaluation transform.

        Raises:
            ValueError: another `caption_in`; `attention` in a model whose images and texts differ in width; a
                question and an answer that are too long together.
        """
        if caption_in not in CAPTION_IN:
            raise ValueError(f"caption_in must be one of {', '.join(CAPTION_IN)}, got {caption_in!r}")
        widths = self.model.config.vision.width, self.model.config.text.width
        if caption_in == "attention" and widths[0] != widths[1]:
            raise ValueError(f"this model's images are {widths[0]} wide and its texts {widths[1]}, so a "
                             "caption cannot join the image in one segment: put it in the text (caption_in text)")
        found: list[list[Tensor]] = []
        with evaluating(self.model):
            for image_embeds in encode_images(self.model, [pixels]):
                found += [self._scores(embeds, dialogue, caption_in)
                          for embeds, dialogue in zip(image_embeds, dialogues, strict=True)]
        return found

    def pack(self, dialogue: Dialogue, number: int, caption_in: str = "attention") -> PackedTexts:
        """A text for each candidate of round `number`: `candidate_texts` that fit the model's positions."""
        return PackedTexts.from_lists(candidate_texts(self.tokenizer, dialogue, number, caption_in,
                                                      self.model.config.text.max_positions))

    def _scores(self, image_embeds: Tensor, dialogue: Dialogue, caption_in: str) -> list[Tensor]:
        """image_embeds: [tokens, vision width]."""
        asked = [number for number, one in enumerate(dialogue.rounds) if one.candidates]
        if not asked:
            return []
        rounds = [self.pack(dialogue, number, caption_in) for number in asked]
        texts = PackedTexts.cat(rounds).to(image_embeds.device)
        caption = dialogue.caption if caption_in == "attention" else None
        image_kv = self._attended_kv(image_embeds[None], caption)
        logits = []
        for some in torch.arange(len(texts), device=texts.device).split(texts_at_a_time(texts.device)):
            logits.append(self.model.match_logits(texts.select(some), torch.zeros_like(some), image_kv))
        scores = torch.cat(logits).cpu()
        return list((scores[:, 1] - scores[:, 0]).split([len(one) for one in rounds]))

    def _attended_kv(self, image_embeds: Tensor, caption: str | None) -> ImageKV:
        """The keys and values of an image [1, tokens, vision width], and of its caption if there is one."""
        if caption is None:
            return self.model.stack("encoder").image_kv(image_embeds)
        return captioned_kv(self.model, image_embeds, self.tokenizer.pack([clean_caption(caption)]))


def captioned_kv(model: BlipModel, image_embeds: Tensor, captions: PackedTexts) -> ImageKV:
    """What a dialogue's cross-attention reads (BLIP section 5.5): each image's tokens, followed by those of
    its encoded caption.

    Args:
        model: one whose images and texts have the same width.
        image_embeds: [images, tokens, vision width].
        captions: one per image, first token [CLS].
    """
    stack, captions = model.stack("encoder"), captions.to(image_embeds.device)
    images, tokens, _ = image_embeds.shape
    (states,) = stack([TextStream(captions, "encoder")])
    owners = torch.arange(images, device=states.device).repeat_interleave(tokens)
    order = torch.cat([owners, captions.text_of_row()]).argsort(stable=True)
    before = tokens * torch.arange(images + 1, dtype=torch.int32, device=states.device)
    return stack.states_kv(torch.cat([image_embeds.flatten(0, 1), states])[order],
                           offsets=captions.offsets + before)


def candidate_texts(tokenizer: Tokenizer, dialogue: Dialogue, number: int, caption_in: str,
                    max_tokens: int) -> list[list[int]]:
    """Token ids of a text for each candidate of round `number` (from 0): [ENC], the caption if it belongs to
    the text, the previous rounds, the question and the candidate, with [SEP] after each. The earliest rounds
    are left out if the text would exceed `max_tokens`.

    Raises:
        ValueError: a text does not fit even without previous rounds.
    """
    asked = dialogue.rounds[number]
    start = [tokenizer.enc_id]
    if caption_in == "text":
        start += tokenizer.encode(clean_caption(dialogue.caption))[1:]
    ends = [_turn(tokenizer, asked.question, candidate) for candidate in asked.candidates]
    room = max_tokens - len(start) - max(map(len, ends))
    if room < 0:
        raise ValueError(f"the question {asked.question!r} and an answer to it take more than "
                         f"{max_tokens} tokens")
    history: list[int] = []
    for earlier in reversed(dialogue.rounds[:number]):
        turn = _turn(tokenizer, earlier.question, earlier.answer)
        if len(history) + len(turn) > room:
            break
        history = turn + history
    return [start + history + end for end in ends]


def _turn(tokenizer: Tokenizer, question: str, answer: str) -> list[int]:
    """A question and an answer, both cleaned as questions are, and [SEP]."""
    return tokenizer.encode(f"{clean_question(question)} {clean_question(answer)}")[1:]
