"""BLIP's pre-training and retrieval fine-tuning step, with all ranks emulated in one process."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .losses import (
    contrastive_loss,
    diagonal_positives,
    equal_id_positives,
    fine_tuning_negative_weights,
    language_loss,
    matching_loss,
    pretraining_negative_weights,
)
from .model import Sizes, TextDecoder
from .tasks import CLS, DEC, ENC, Matcher, targets_of, with_first_token

EMPTY = -100  # the id of a queue slot that nothing has been written to


class Batch(NamedTuple):
    """One rank's pairs. Texts are padded to the same L on all ranks; their first token does not matter."""

    images: Tensor  # [B, 3, H, H]
    input_ids: Tensor  # [B, L]
    attention_mask: Tensor  # [B, L]
    image_ids: Tensor | None = None  # [B], for retrieval fine-tuning: equal ids are positives of each other


class Negatives(NamedTuple):
    """What one rank drew: indices [B] into its own batch, or into all ranks' pairs in rank order if `all_ranks`."""

    negative_image_for_text: Tensor
    negative_text_for_image: Tensor


class StepOutput(NamedTuple):
    loss: Tensor  # mean over ranks of ITC + ITM + LM: its gradients are what data-parallel averaging gives
    itc: Tensor  # [W], each rank's own
    itm: Tensor  # [W]
    lm: Tensor  # [W], zeros without a decoder
    weights_t2i: list[Tensor]  # for each rank [B, B or all pairs]: of drawing image j as text i's negative
    weights_i2t: list[Tensor]  # for each rank: of drawing text j as image i's negative
    matching_logits: list[Tensor]  # for each rank [3B, 2]


class TextbookPretraining(Matcher):
    """Model, momentum copies and queues; `step` computes one step's losses.

    Pre-training by default; `retrieval` for fine-tuning on ids. Buffers are named as in the published checkpoints.
    The momentum copies start as the model's own weights.
    """

    image_queue: Tensor  # [d, queue_length], as the text queue
    text_queue: Tensor
    idx_queue: Tensor  # [1, queue_length], with `retrieval` alone

    def __init__(
        self,
        sizes: Sizes,
        queue_length: int = 57_600,
        momentum: float = 0.995,
        decoder: bool = True,  # the LM loss, with a decoder tied to the encoder
        retrieval: bool = False,  # id-equality positives; fine-tuning's negative weights
        all_ranks: bool = False,  # negatives from all ranks' pairs (retrieval only)
    ) -> None:
        super().__init__(sizes)
        if all_ranks and not retrieval:
            raise ValueError("all_ranks needs retrieval=True: pre-training draws negatives from the local batch")
        self.temp = torch.nn.Parameter(torch.tensor(0.07))
        self.text_decoder = TextDecoder(sizes, sizes.vision_width, tied_to=self.text_encoder) if decoder else None
        self.momentum, self.retrieval, self.all_ranks = momentum, retrieval, all_ranks
        self.restart_momentum()
        self.register_buffer("image_queue", F.normalize(torch.randn(sizes.projection, queue_length), dim=0))
        self.register_buffer("text_queue", F.normalize(torch.randn(sizes.projection, queue_length), dim=0))
        if retrieval:
            self.register_buffer("idx_queue", torch.full((1, queue_length), EMPTY))
        self.pointer_name = "ptr_queue" if retrieval else "queue_ptr"
        self.register_buffer(self.pointer_name, torch.zeros(1, dtype=torch.long))

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """The model's own weights in the published names; the momentum copies restart from them."""
        missing, unexpected = self.load_state_dict(state, strict=False)
        missing = [key for key in missing if "_m." not in key and "queue" not in key]
        if missing or unexpected:
            raise ValueError(f"missing weights {missing}, unexpected weights {unexpected}")
        self.restart_momentum()

    def restart_momentum(self) -> None:
        for name in ("visual_encoder", "vision_proj", "text_encoder", "text_proj"):
            setattr(self, f"{name}_m", copy.deepcopy(getattr(self, name)).requires_grad_(False))

    @torch.no_grad()
    def update_momentum(self) -> None:
        for name in ("visual_encoder", "vision_proj", "text_encoder", "text_proj"):
            averages, weights = getattr(self, f"{name}_m").parameters(), getattr(self, name).parameters()
            for average, weight in zip(averages, weights, strict=True):
                average.copy_(self.momentum * average + (1 - self.momentum) * weight)

    @torch.no_grad()
    def momentum_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Image and text features [B, d] of the momentum encoders."""
        ids = with_first_token(batch.input_ids, CLS)
        image = self.vision_proj_m(self.visual_encoder_m(batch.images)[:, 0])
        text = self.text_proj_m(self.text_encoder_m(ids, batch.attention_mask)[:, 0])
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1)

    @torch.no_grad()
    def enqueue(self, image_features: Tensor, text_features: Tensor, ids: Tensor | None) -> None:
        """Write all ranks' features [W B, d] over the oldest, from the pointer on and around the end."""
        pointer, length = getattr(self, self.pointer_name), self.image_queue.shape[1]
        if len(image_features) > length:
            raise ValueError(f"{len(image_features)} pairs do not fit a queue of {length}: use a longer queue")
        slots = (pointer + torch.arange(len(image_features))) % length
        self.image_queue[:, slots] = image_features.T.to(self.image_queue.dtype)
        self.text_queue[:, slots] = text_features.T.to(self.text_queue.dtype)
        if ids is not None:
            self.idx_queue[0, slots] = ids
        pointer.copy_((slots[-1:] + 1) % length)

    def step(self, batches: list[Batch], alpha: float, negatives: list[Negatives]) -> StepOutput:
        """One forward step of W ranks. Changes the temperature, the momentum copies and the queues.

        The order is the published one: clamp the temperature; features; EMA; momentum features; ITC against the
        queues as they were; enqueue; ITM; LM.
        """
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        embeds = [self.visual_encoder(b.images) for b in batches]
        images = [self.image_features(e) for e in embeds]
        texts = [self.text_features(with_first_token(b.input_ids, CLS), b.attention_mask) for b in batches]
        self.update_momentum()
        images_m, texts_m = map(list, zip(*(self.momentum_features(b) for b in batches), strict=True))

        itc = [self.itc(alpha, *rank) for rank in zip(batches, images, texts, images_m, texts_m, strict=True)]
        weights = self.negative_weights(batches, images, texts, images_m, texts_m)
        ids = torch.cat([b.image_ids for b in batches]) if self.retrieval else None
        self.enqueue(torch.cat(images_m), torch.cat(texts_m), ids)

        logits = self.matching(batches, embeds, negatives)
        itm = [matching_loss(rank_logits) for rank_logits in logits]
        if self.text_decoder is None:
            lm = [torch.zeros(()) for _ in batches]
        else:
            lm = [self.lm(b, e) for b, e in zip(batches, embeds, strict=True)]
        itc, itm, lm = torch.stack(itc), torch.stack(itm), torch.stack(lm)
        return StepOutput((itc + itm + lm).mean(), itc, itm, lm, *weights, logits)

    def itc(
        self, alpha: float, batch: Batch, image: Tensor, text: Tensor, image_m: Tensor, text_m: Tensor
    ) -> Tensor:
        """Mean of both directions, against this rank's momentum features in front of the queue."""
        image_keys = torch.cat([image_m, self.image_queue.T])  # [B + Q, d]
        text_keys = torch.cat([text_m, self.text_queue.T])
        if self.retrieval:
            positives = equal_id_positives(batch.image_ids, torch.cat([batch.image_ids, self.idx_queue[0]]))
        else:
            positives = diagonal_positives(len(image), len(image_keys))
        i2t = contrastive_loss(image, image_m, text_keys, positives, self.temp, alpha)
        t2i = contrastive_loss(text, text_m, image_keys, positives, self.temp, alpha)
        return (i2t + t2i) / 2

    @torch.no_grad()
    def negative_weights(
        self,
        batches: list[Batch],
        images: list[Tensor],
        texts: list[Tensor],
        images_m: list[Tensor],
        texts_m: list[Tensor],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(t2i, i2t) for each rank. Pre-training: the local batch's columns of the ITC similarities, whose keys are
        momentum features. Fine-tuning: similarities of the trained features, of this rank or of all ranks."""
        t2i, i2t = [], []
        for rank, batch in enumerate(batches):
            if self.retrieval:
                pool = slice(None) if self.all_ranks else slice(rank, rank + 1)
                ids = batch.image_ids, torch.cat([b.image_ids for b in batches[pool]])
                to_images = texts[rank] @ torch.cat(images[pool]).T / self.temp
                to_texts = images[rank] @ torch.cat(texts[pool]).T / self.temp
                t2i.append(fine_tuning_negative_weights(to_images, *ids))
                i2t.append(fine_tuning_negative_weights(to_texts, *ids))
            else:
                t2i.append(pretraining_negative_weights(texts[rank] @ images_m[rank].T / self.temp))
                i2t.append(pretraining_negative_weights(images[rank] @ texts_m[rank].T / self.temp))
        return t2i, i2t

    def matching(self, batches: list[Batch], embeds: list[Tensor], negatives: list[Negatives]) -> list[Tensor]:
        """ITM logits [3B, 2] of each rank: its pairs; its texts with negative images; its images with negative texts.

        With `all_ranks` the negatives' gradients flow into the images of the ranks that they came from.
        """
        logits = []
        for rank, drawn in enumerate(negatives):
            pool = slice(None) if self.all_ranks else slice(rank, rank + 1)
            pool_images = torch.cat(embeds[pool])
            pool_ids = torch.cat([b.input_ids for b in batches[pool]])
            pool_masks = torch.cat([b.attention_mask for b in batches[pool]])
            images, ids, mask = embeds[rank], batches[rank].input_ids, batches[rank].attention_mask
            negative_images = pool_images[drawn.negative_image_for_text]
            negative_ids = pool_ids[drawn.negative_text_for_image]
            negative_masks = pool_masks[drawn.negative_text_for_image]
            all_images = torch.cat([images, negative_images, images])
            all_ids = with_first_token(torch.cat([ids, ids, negative_ids]), ENC)
            all_masks = torch.cat([mask, mask, negative_masks])
            logits.append(self.matching_logits(all_images, all_ids, all_masks))
        return logits

    def lm(self, batch: Batch, image_embeds: Tensor) -> Tensor:
        ids = with_first_token(batch.input_ids, DEC)
        return language_loss(self.text_decoder(ids, batch.attention_mask, image_embeds), targets_of(ids))
