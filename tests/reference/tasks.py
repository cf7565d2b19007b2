"""The published task models, assembled from `model.py`. Token ids as in bert-base-uncased + [DEC] + [ENC]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .losses import language_loss, token_losses
from .model import Sizes, TextDecoder, TextStack, VisionTransformer

PAD, CLS, SEP, DEC, ENC = 0, 101, 102, 30_522, 30_523


def with_first_token(input_ids: Tensor, token: int) -> Tensor:
    """The same texts behind another first token: [CLS] unimodal, [ENC] image-grounded encoder, [DEC] decoder."""
    return torch.cat([torch.full_like(input_ids[:, :1], token), input_ids[:, 1:]], dim=1)


def targets_of(input_ids: Tensor, ignored: int = 0) -> Tensor:
    """LM targets: the tokens themselves, -100 for padding and for the first `ignored` tokens (the prompt)."""
    targets = input_ids.masked_fill(input_ids == PAD, -100)
    targets[:, :ignored] = -100
    return targets


class Matcher(nn.Module):
    """ITC and ITM (published: BLIP_ITM)."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.visual_encoder = VisionTransformer(sizes)
        self.text_encoder = TextStack(sizes, sizes.vision_width)
        self.vision_proj = nn.Linear(sizes.vision_width, sizes.projection)
        self.text_proj = nn.Linear(sizes.text_width, sizes.projection)
        self.itm_head = nn.Linear(sizes.text_width, 2)

    def image_features(self, image_embeds: Tensor) -> Tensor:  # [B, T, D] → [B, d], length 1
        return F.normalize(self.vision_proj(image_embeds[:, 0]), dim=-1)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # [B, L] → [B, d], length 1
        return F.normalize(self.text_proj(self.text_encoder(input_ids, attention_mask)[:, 0]), dim=-1)

    def matching_logits(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, 2] (not matched, matched). The first token is the caller's: [ENC] as trained, or [CLS]."""
        return self.itm_head(self.text_encoder(input_ids, attention_mask, image_embeds)[:, 0])


class Captioner(nn.Module):
    """LM on images (published: BLIP_Decoder). Texts begin with [DEC] and the prompt."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.visual_encoder = VisionTransformer(sizes)
        self.text_decoder = TextDecoder(sizes, sizes.vision_width)

    def loss(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, prompt_length: int) -> Tensor:
        logits = self.text_decoder(input_ids, attention_mask, self.visual_encoder(images))
        return language_loss(logits, targets_of(input_ids, ignored=prompt_length))

    def next_token_logits(self, image: Tensor) -> Callable[[Tensor], Tensor]:
        """For one image [3, H, H]: a function from n unfinished texts [n, L] to their next token's logits [n, V]."""
        return next_token_logits(self.text_decoder, self.visual_encoder(image[None]))


def next_token_logits(decoder: TextDecoder, states: Tensor) -> Callable[[Tensor], Tensor]:
    """The next token's logits after looking at `states` [1, S, D], all of them visible; nothing is cached."""

    def logits(input_ids: Tensor) -> Tensor:
        return decoder(input_ids, torch.ones_like(input_ids), states.expand(len(input_ids), -1, -1))[:, -1]

    return logits


class QuestionAnswerer(nn.Module):
    """VQA (published: BLIP_VQA): two untied stacks; the decoder looks at the encoded question, not at the image."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.visual_encoder = VisionTransformer(sizes)
        self.text_encoder = TextStack(sizes, sizes.vision_width)
        self.text_decoder = TextDecoder(sizes, sizes.text_width)

    def question_states(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # [B, L, D]
        return self.text_encoder(with_first_token(input_ids, ENC), attention_mask, self.visual_encoder(images))

    def loss(
        self,
        images: Tensor,
        question_ids: Tensor,
        question_mask: Tensor,
        answer_ids: Tensor,  # [A, L], all answers of all questions
        answer_mask: Tensor,
        question_of_answer: Tensor,  # [A]
        weights: Tensor,  # [A]
    ) -> Tensor:
        """Sum over answers of weight x summed token losses, divided by the number of images."""
        states = self.question_states(images, question_ids, question_mask)
        answer_ids = with_first_token(answer_ids, DEC)
        logits = self.text_decoder(
            answer_ids, answer_mask, states[question_of_answer], question_mask[question_of_answer]
        )
        return (weights * token_losses(logits, targets_of(answer_ids)).sum(dim=1)).sum() / len(images)

    def rank(
        self,
        images: Tensor,
        question_ids: Tensor,
        question_mask: Tensor,
        answer_ids: Tensor,  # [A, L], the answer list
        answer_mask: Tensor,
        shortlist: int,
    ) -> Tensor:
        """Index [B] of each question's best answer: least smoothed loss, among the likeliest by their first token."""
        states = self.question_states(images, question_ids, question_mask)
        answer_ids = with_first_token(answer_ids, DEC)
        best = []
        for state, mask in zip(states, question_mask, strict=True):
            chosen = self.first_token_probabilities(state, mask, answer_ids).topk(shortlist).indices
            best.append(chosen[self.answer_scores(state, mask, answer_ids[chosen], answer_mask[chosen]).argmax()])
        return torch.stack(best)

    def first_token_probabilities(self, state: Tensor, mask: Tensor, answer_ids: Tensor) -> Tensor:
        """Of one question, states [L, D] and mask [L]: the probability [A] of each answer's first token."""
        first = self.text_decoder(torch.tensor([[DEC]]), torch.tensor([[1]]), state[None], mask[None])[0, 0]
        return first.softmax(dim=0)[answer_ids[:, 1]]

    def answer_scores(self, state: Tensor, mask: Tensor, answer_ids: Tensor, answer_mask: Tensor) -> Tensor:
        """Of one question: minus the smoothed loss [A] of answers [A, L] that begin with [DEC]."""
        count = len(answer_ids)
        logits = self.text_decoder(answer_ids, answer_mask, state.expand(count, -1, -1), mask.expand(count, -1))
        return -token_losses(logits, targets_of(answer_ids)).sum(dim=1)


class DialogueEncoder(nn.Module):
    """VisDial (the paper's section 5.5; no code was published): does the answer that ends a text fit? Cross-attention
    reads the image and, behind it, the encoded caption."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.visual_encoder = VisionTransformer(sizes)
        self.text_encoder = TextStack(sizes, sizes.vision_width)
        self.itm_head = nn.Linear(sizes.text_width, 2)

    def loss(
        self,
        images: Tensor,
        caption_ids: Tensor,  # [B, L], one an image
        caption_mask: Tensor,
        input_ids: Tensor,  # [N, L], rounds with an answer each
        attention_mask: Tensor,
        image_of_text: Tensor,  # [N]
        labels: Tensor,  # [N], 1 where the answer is right
    ) -> Tensor:
        image_embeds = self.visual_encoder(images)
        caption_states = self.text_encoder(with_first_token(caption_ids, CLS), caption_mask)
        states = torch.cat([image_embeds, caption_states], dim=1)
        mask = torch.cat([torch.ones(image_embeds.shape[:2], dtype=caption_mask.dtype), caption_mask], dim=1)
        hidden = self.text_encoder(with_first_token(input_ids, ENC), attention_mask, states[image_of_text],
                                   mask[image_of_text])
        return F.cross_entropy(self.itm_head(hidden[:, 0]), labels)


class PairReasoner(nn.Module):
    """NLVR2 (published: BLIP_NLVR): is the text true of a pair of images?"""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        width = sizes.text_width
        self.visual_encoder = VisionTransformer(sizes)
        self.text_encoder = TextStack(sizes, sizes.vision_width, twin=True)
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    def forward(self, images0: Tensor, images1: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits [B, 2] (false, true) of B texts, each about one pair of images."""
        pair = self.visual_encoder(images0), self.visual_encoder(images1)
        return self.cls_head(self.text_encoder(with_first_token(input_ids, ENC), attention_mask, pair)[:, 0])


def twin_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """An ordinary checkpoint's cross-attention initialises both twins of NLVR2's."""
    twins = {}
    for key, value in state.items():
        for part in ("crossattention.self", "crossattention.output.dense"):
            if f".{part}." in key:
                twins[key.replace(part, f"{part}0")] = value
                twins[key.replace(part, f"{part}1")] = value
                break
        else:
            twins[key] = value
    return twins
