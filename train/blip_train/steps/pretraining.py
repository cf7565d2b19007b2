"""One training step of BLIP: images and captions in, three losses out, in two passes through the text stack.

Pass 1 takes the captions alone, because ITC needs their features to choose negatives. Pass 2 takes ITM's
positives, both kinds of negatives and the LM captions together: they share all parameters except
self-attention, and read the same image keys and values, projected once per image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from blip_kernels import contrastive, hard_negatives, linear_cross_entropy
from blip_kernels.random import new_seed
from torch import Tensor, nn

from blip_fast.model.blip import BlipModel
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.text import TextStream
from blip_fast.model.tokenizer import Tokenizer
from blip_train import collectives
from blip_train.steps.exchange import Exchange, gathered_bytes
from blip_train.steps.momentum import MomentumEncoders
from blip_train.steps.queue import KeyQueue
from blip_train.steps.step import MomentumState, Negatives, StepContext, StepOutput, TrainingStep

if TYPE_CHECKING:
    from blip_fast.data.input.decoding import ReadBatch

TEMPERATURE_RANGE = (0.001, 0.5)
IGNORED = -100  # LM's target for tokens without loss


@dataclass(frozen=True)
class Objective:
    """What a step computes, with the paper's values.

    `losses`: any of itc, itm and lm (itm draws its negatives by itc's features), or one of answer (VQA),
    reasoning (NLVR2) and dialogue (VisDial) alone. Those three ignore the other values, except that answer
    uses `label_smoothing`. `positives`: `pair` (pre-training) or `id` (retrieval fine-tuning: captions of one
    image share the target). `negatives`: drawn from the rank's own batch, or from the batches of `all_ranks`.
    `negative_floor` is added to the softmax that negatives are drawn from.
    """

    losses: tuple[Literal["itc", "itm", "lm", "answer", "reasoning", "dialogue"], ...] = ("itc", "itm", "lm")
    queue_size: int = 57600
    momentum: float = 0.995
    alpha: float = 0.4
    alpha_ramp_epochs: float = 2.0
    label_smoothing: float = 0.1
    positives: Literal["pair", "id"] = "pair"
    negatives: Literal["local", "all_ranks"] = "local"
    negative_floor: float = 1e-4
    # The run's first steps train LM alone: for small models from scratch (docs/decisions/scenes-and-demo.md).
    language_first_steps: int = 0
    prompt_tokens: int = 0  # leading tokens of a caption, [DEC] included, without LM loss

    def __post_init__(self) -> None:
        object.__setattr__(self, "losses", tuple(self.losses))
        if self.language_first_steps and "lm" not in self.losses:
            raise ValueError("objective.language_first_steps is set but losses has no lm to start with")
        if "itm" in self.losses and "itc" not in self.losses:
            raise ValueError("objective.losses has itm without itc: ITM draws its negatives from ITC's "
                             "similarities")
        if not 0.0 <= self.momentum <= 1.0 or not 0.0 <= self.alpha <= 1.0:
            raise ValueError(f"objective.momentum and alpha must lie in [0, 1], got {self.momentum} and "
                             f"{self.alpha}")


@dataclass(frozen=True)
class Batch:
    """One rank's pairs: `images` [batch, 3, size, size], `texts` starting with [CLS], `ids` int64 [batch]."""

    images: Tensor
    texts: PackedTexts
    ids: Tensor

    @property
    def text_tokens(self) -> int:
        return len(self.texts.token_ids)

    @classmethod
    def collate(cls, read: ReadBatch, tokenizer: Tokenizer, max_tokens: int) -> Batch:
        """Read samples → a batch, captions cut at `max_tokens`."""
        return cls(read.images, tokenizer.pack(read.captions, max_tokens=max_tokens), read.ids)

    def to(self, device: torch.device) -> Batch:
        return Batch(self.images.to(device), self.texts.to(device), self.ids.to(device))


@dataclass(frozen=True)
class _Pairs:
    """ITM's pairs: `image_embeds` of the batch and of images fetched from other
    ranks, texts, and labels int64."""

    image_embeds: Tensor
    stream: TextStream
    labels: Tensor
    exchanged: tuple[int, int] | None


@dataclass(frozen=True)
class _Features:
    """Unit vectors [batch, embed_dim] of the model and of its momentum copy."""

    image: Tensor
    text: Tensor
    momentum_image: Tensor
    momentum_text: Tensor


class _LanguageLoss(nn.Module):
    """The LM loss. A module because ZeRO 3 gathers weights for the forward and backward of the module that
    reads them, and this loss reads the word embeddings."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, model: BlipModel, hidden: Tensor, targets: PackedTexts) -> Tensor:
        """Decoder states [rows, width] that predict `targets` → the mean loss."""
        ignored = targets.positions() < self.objective.prompt_tokens - 1
        return linear_cross_entropy(
            *model.vocabulary_projection(hidden), targets.token_ids.masked_fill(ignored, IGNORED),
            label_smoothing=self.objective.label_smoothing, ignore_index=IGNORED)


class Pretraining(TrainingStep):
    """The model with its momentum copy and queue. An optimiser step is `follow`, then the losses of one or
    more batches, then `enqueue` after their backward.

    Args:
        model: the model to train, with the parts that the objective's losses read.
        objective: what to compute.
        seed: for the queue's first entries; the same on all ranks.
    """

    def __init__(self, model: BlipModel, objective: Objective, seed: int) -> None:
        super().__init__()
        self.model, self.objective = model, objective
        self.language_loss = _LanguageLoss(objective)
        if "itc" in objective.losses:
            self.momentum = MomentumEncoders(model)
            self.queue = KeyQueue(objective.queue_size, model.config.embed_dim, seed)

    def follow(self) -> None:
        """Update the momentum copy with the current weights, once per optimiser step, before its first
        batch (BLIP section 3.2). The published code does it between the model's features and the
        copy's, with the same result."""
        if "itc" in self.objective.losses:
            self.momentum.update(self.model, self.objective.momentum)

    def forward(self, batch: Batch, context: StepContext) -> StepOutput:
        """Losses of one rank's batch."""
        if context.language_only:
            return StepOutput(self._grounded(batch, self.model.encode_images(batch.images), None))
        losses: dict[str, Tensor] = {}
        negatives = keys = pairs = None
        image_embeds = self.model.encode_images(batch.images)
        if "itc" in self.objective.losses:
            features = self._features(batch, image_embeds)
            losses["itc"] = self._contrastive(batch, features, context.alpha)
            if "itm" in self.objective.losses:
                negatives = self._negatives(batch, features)
                pairs = self._pairs(batch, image_embeds, negatives)
            keys = (features.momentum_image, features.momentum_text, batch.ids)
        losses.update(self._grounded(batch, image_embeds, pairs))
        return StepOutput(losses, negatives, keys, pairs.exchanged if pairs else None)

    def enqueue(self, *outputs: StepOutput) -> None:
        """Put the step's keys of all ranks into the queue, rank by rank. Called after the last backward,
        which reads the queue as it was."""
        keys = [output.keys for output in outputs if output.keys is not None]
        if keys:
            self.queue.enqueue(*(collectives.gather(torch.cat(parts)) for parts in zip(*keys, strict=True)))

    def momentum_state(self) -> MomentumState | None:
        if "itc" not in self.objective.losses:
            return None
        return MomentumState(self.momentum, self.queue, by_id=self.objective.positives == "id")

    def log_fields(self, output: StepOutput) -> dict[str, float]:
        """τ where ITC was computed, and with negatives of all ranks the MB of visual tokens that were fetched
        and that an all-gather would have moved."""
        fields: dict[str, float] = {}
        if "itc" in output.losses:
            fields["temperature"] = self.model.temperature.item()
        if output.exchanged is not None:
            fields["exchanged_mb"], fields["gathering_mb"] = (count / 1e6 for count in output.exchanged)
        return fields

    def _features(self, batch: Batch, image_embeds: Tensor) -> _Features:
        with torch.no_grad():
            self.model.temperature.clamp_(*TEMPERATURE_RANGE)
        image, text = self.model.image_features(image_embeds), self.model.text_features(batch.texts)
        return _Features(image, text, *self.momentum.features(batch.images, batch.texts))

    def _contrastive(self, batch: Batch, features: _Features, alpha: float) -> Tensor:
        """ITC, the mean of both directions. Keys are the batch's momentum
        features, followed by the queue's."""
        by_id = self.objective.positives == "id"
        ids: dict[str, Any] = {"ids": batch.ids, "queue_ids": self.queue.ids} if by_id else {}
        directions = ((features.image, features.momentum_image, features.momentum_text, self.queue.text),
                      (features.text, features.momentum_text, features.momentum_image, self.queue.image))
        losses = [contrastive(*tensors, self.model.temperature, alpha, **ids).mean()
                  for tensors in directions]
        return (losses[0] + losses[1]) / 2

    @torch.no_grad()
    def _negatives(self, batch: Batch, features: _Features) -> Negatives:
        """Draw one negative image per text and one negative text per image.

        As published, pre-training ranks candidates by the momentum features of the rank's batch, retrieval
        fine-tuning (`id` positives, or negatives of all ranks) by the model's own features.
        """
        objective, ids = self.objective, batch.ids
        if objective.positives == "pair" and objective.negatives == "local":
            image_keys, text_keys, key_ids = features.momentum_image, features.momentum_text, ids
        elif objective.negatives == "local":
            image_keys, text_keys, key_ids = features.image, features.text, ids
        else:
            image_keys, text_keys, key_ids = map(collectives.gather, (features.image, features.text, ids))
        excluded: dict[str, Any] = {"ids": ids, "key_ids": key_ids}
        if objective.positives == "pair":
            first = collectives.world()[0] * len(ids) if objective.negatives == "all_ranks" else 0
            excluded = {"first_own_key": first}
        seed = new_seed()
        drawn = [hard_negatives(queries, keys, self.model.temperature, floor=objective.negative_floor,
                                seed=seed, stream=stream, **excluded)
                 for stream, (queries, keys) in enumerate([(features.text, image_keys),
                                                           (features.image, text_keys)])]
        return Negatives(image_for_text=drawn[0], text_for_image=drawn[1])

    def _grounded(self, batch: Batch, image_embeds: Tensor, pairs: _Pairs | None) -> dict[str, Tensor]:
        """Pass 2: ITM and LM texts together through the stack, reading the same image keys and values."""
        own = torch.arange(len(batch.ids), device=image_embeds.device)
        decoder_stream = None
        if "lm" in self.objective.losses:
            captions = batch.texts.with_first(self.model.config.tokens.bos)
            decoder_stream = TextStream(captions.without_last(), "decoder", own)
        if pairs is not None:
            image_embeds = pairs.image_embeds
        hidden = self._pass(image_embeds, pairs.stream if pairs else None, decoder_stream)

        losses: dict[str, Tensor] = {}
        if pairs is not None:
            logits = self.model.itm_head(hidden["encoder"]).float()  # type: ignore[misc]
            losses["itm"] = F.cross_entropy(logits, pairs.labels)
        if decoder_stream is not None:
            losses["lm"] = self.language_loss(self.model, hidden["decoder"], captions.without_first())
        return losses

    def _pairs(self, batch: Batch, image_embeds: Tensor, negatives: Negatives) -> _Pairs:
        """ITM's pairs: positives; text with negative image; negative text with image. Labels 1, 0, 0."""
        texts = candidates = batch.texts.with_first(self.model.config.tokens.enc)
        own = torch.arange(len(batch.ids), device=image_embeds.device)
        negative_images, negative_texts, exchanged = negatives.image_for_text, negatives.text_for_image, None
        if self.objective.negatives == "all_ranks":
            images, others = (Exchange.plan(chosen, len(own)) for chosen in (negative_images, negative_texts))
            negative_images, negative_texts = images.positions, others.positions
            exchanged = images.received_bytes(image_embeds), gathered_bytes(image_embeds)
            image_embeds = torch.cat([image_embeds, images.fetch(image_embeds)])
            candidates = PackedTexts.cat([texts, others.fetch_texts(texts)])
        has_image, has_text = negative_images >= 0, negative_texts >= 0
        pairs = PackedTexts.cat([texts, texts.select(own[has_image]),
                                 candidates.select(negative_texts[has_text])])
        labels = torch.zeros(len(pairs), dtype=torch.int64, device=own.device)
        labels[: len(own)] = 1
        stream = TextStream(pairs, "encoder", torch.cat([own, negative_images[has_image], own[has_text]]),
                            first_row_only=True)
        return _Pairs(image_embeds, stream, labels, exchanged)

    def _pass(self, image_embeds: Tensor, encoder_stream: TextStream | None,
              decoder_stream: TextStream | None) -> dict[str, Tensor]:
        """Hidden states by mode. A tied stack takes both streams at once, untied stacks take one each."""
        streams = {"encoder": encoder_stream, "decoder": decoder_stream}
        present = {mode: stream for mode, stream in streams.items() if stream is not None}
        if self.model.config.text_stacks == "tied" and present:
            stack = self.model.stack("encoder")
            hidden = stack(list(present.values()), stack.image_kv(image_embeds))
            return dict(zip(present, hidden, strict=True))
        hidden = {}
        for mode, stream in present.items():
            stack = self.model.stack(stream.mode)
            (hidden[mode],) = stack([stream], stack.image_kv(image_embeds))
        return hidden
