"""The BLIP model: vision transformer, text stack(s) and heads. No training code, no decoding loop."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blip_fast.model.config import TASK_PARTS, BlipConfig
from blip_fast.model.image_kv import ImageKV, ImageStates
from blip_fast.model.linear_layer import Linear
from blip_fast.model.lm_head import LMHead
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.text import Mode, TextStack, TextStream
from blip_fast.model.vision import VisionTransformer

INITIAL_TEMPERATURE = 0.07


class BlipModel(nn.Module):
    """Everything that a checkpoint holds for inference.

    The config says which parts exist: `text_stacks` gives one or two text stacks, `contrastive` the
    projections and the temperature, `matching` the ITM head, `reasoning` NLVR2's head. A decoder brings its
    LM head.
    """

    def __init__(self, config: BlipConfig) -> None:
        super().__init__()
        self.config = config
        vision_width, width = config.vision.width, config.text.width
        self.vision = VisionTransformer(config.vision)
        stacks: dict[str, tuple[Mode, ...]] = {
            "tied": {"tied": ("encoder", "decoder")},
            "untied": {"encoder": ("encoder",), "decoder": ("decoder",)},
            "encoder": {"encoder": ("encoder",)},
            "decoder": {"decoder": ("decoder",)},
        }[config.text_stacks]
        # VQA's decoder reads the encoder's states of the question, which are as wide as the text, not as the
        # image.
        read_width = {"decoder": width} if config.text_stacks == "untied" else {}
        self.text = nn.ModuleDict({name: TextStack(config.text, read_width.get(name, vision_width), modes)
                                   for name, modes in stacks.items()})
        self.lm_head = LMHead(config.text, config.tied_lm_head) if config.has_decoder else None
        if config.contrastive:
            self.vision_projection = Linear(vision_width, config.embed_dim)
            self.text_projection = Linear(width, config.embed_dim)
            # One element, not a scalar: DeepSpeed cannot broadcast parameters without a dimension.
            self.temperature = nn.Parameter(torch.full((1,), INITIAL_TEMPERATURE))
        self.itm_head = Linear(width, 2) if config.matching else None
        if config.reasoning:
            self.reasoning_head = nn.Sequential(Linear(width, width), nn.ReLU(), Linear(width, 2))
        self._initialise()

    def stack(self, mode: Mode) -> TextStack:
        """The text stack that serves a mode. Raises ValueError where the model has none."""
        if not (self.config.has_encoder if mode == "encoder" else self.config.has_decoder):
            raise ValueError(f"this model has no text {mode} (text_stacks={self.config.text_stacks!r}): take "
                             f"a checkpoint that has one")
        stack = self.text["tied" if self.config.text_stacks == "tied" else mode]
        assert isinstance(stack, TextStack)
        return stack

    def recompute(self, blocks: int) -> None:
        """Keep no activations of the last `blocks` blocks of vision and text: the backward computes them
        again, with the same drop-out masks. This saves memory and costs a third more work on those blocks."""
        for stack in (self.vision, *self.text.values()):
            stack.recomputed = blocks  # type: ignore[assignment]

    def compile_blocks(self, **options: Any) -> None:
        """Give each block of vision and text to `torch.compile` with these `options`. It compiles at the
        first use, and once more when lengths change."""
        for stack in (self.vision.blocks, *(stack.layers for stack in self.text.values())):
            for block in stack:  # type: ignore[union-attr]
                block.compile(**options)

    def restricted_to(self, config: BlipConfig, drawn: Collection[str] = ()) -> BlipModel:
        """A new model with some of this one's text modes and heads, and copies of their weights (a captioner
        from pre-training).

        Args:
            config: this model's sizes, with `text_stacks`, `contrastive`, `matching`, `reasoning` or
                drop-outs changed.
            drawn: parameters that are drawn at random instead of copied.

        Raises:
            ValueError: the config asks for a part that this model does not have, or for another size or tying
                of one.
        """
        if config.has_decoder and config.tied_lm_head != self.config.tied_lm_head:
            raise ValueError(f"this model's tied_lm_head is {self.config.tied_lm_head}: a part of it keeps "
                             "that")
        part = BlipModel(config)
        own = self.state_dict()
        weights = {}
        for name, wanted in part.state_dict().items():
            if name in drawn:
                weights[name] = wanted
                continue
            source = name
            if name.startswith("text.") and self.config.text_stacks == "tied":
                source = "text.tied." + name.split(".", 2)[2]
            if source not in own or own[source].shape != wanted.shape:
                raise ValueError(f"cannot take {name} {tuple(wanted.shape)} from this model: it has "
                                 f"{'no such weight' if source not in own else tuple(own[source].shape)}")
            weights[name] = own[source]
        part.load_state_dict(weights)
        return part

    def encode_images(self, pixels: Tensor) -> Tensor:
        """[images, 3, size, size] → image_embeds [images, tokens, vision width]."""
        return self.vision(pixels)

    def image_features(self, image_embeds: Tensor) -> Tensor:
        """[images, tokens, vision width] → unit vectors [images, embed_dim] for ITC, float32. A video, which
        has the tokens of frame after frame, gets the unit vector of the mean over its frames."""
        self._require("contrastive")
        cls_rows = image_embeds[:, :: self.config.vision.tokens]
        return F.normalize(self.vision_projection(cls_rows).float().mean(dim=1), dim=-1)

    def text_features(self, texts: PackedTexts) -> Tensor:
        """Texts that start with [CLS] → unit vectors [texts, embed_dim] for ITC, float32."""
        self._require("contrastive")
        (first_rows,) = self.stack("encoder")([TextStream(texts, "encoder", first_row_only=True)])
        return F.normalize(self.text_projection(first_rows).float(), dim=-1)

    def match_logits(self, texts: PackedTexts, images: Tensor, image_kv: ImageKV) -> Tensor:
        """ITM logits (not matched, matched) of text-image pairs.

        Args:
            texts: the texts, first token as the checkpoint expects it ([ENC]; docs/decisions/tasks.md for
                [CLS]).
            images: int64 [texts], the image that each text is compared with.
            image_kv: `stack("encoder").image_kv(image_embeds)`.

        Returns:
            [texts, 2], float32.
        """
        self._require("matching")
        (first_rows,) = self.stack("encoder")([TextStream(texts, "encoder", images, first_row_only=True)],
                                              image_kv)
        return self.itm_head(first_rows).float()  # type: ignore[misc]

    def pair_logits(self, image_embeds: Tensor, sentences: PackedTexts) -> Tensor:
        """NLVR2's logits (false, true): is each sentence true of its pair of images?

        Args:
            image_embeds: [pairs, 2, tokens, vision width].
            sentences: one about each pair, first token [ENC].

        Returns:
            [pairs, 2], float32.
        """
        self._require("reasoning")
        stack = self.stack("encoder")
        pairs = torch.arange(len(image_embeds), device=image_embeds.device)
        (first_rows,) = stack([TextStream(sentences, "encoder", pairs, first_row_only=True)],
                              stack.image_kv(*image_embeds.unbind(1)))
        return self.reasoning_head(first_rows).float()

    def question_states(self, image_embeds: Tensor, questions: PackedTexts,
                        images: Tensor | None = None) -> ImageStates:
        """What VQA's answer decoder looks at: the states of the encoded questions' own tokens.

        Args:
            image_embeds: [images, tokens, vision width].
            questions: first token [ENC] as trained.
            images: int64 [questions], which image each is about; question i is about image i unless given.
        """
        encoder = self.stack("encoder")
        if images is None:
            images = torch.arange(len(image_embeds), device=image_embeds.device)
        (states,) = encoder([TextStream(questions, "encoder", images)], encoder.image_kv(image_embeds))
        return ImageStates(states, questions.offsets)

    def question_kv(self, image_embeds: Tensor, questions: PackedTexts,
                    images: Tensor | None = None) -> ImageKV:
        """Keys and values of `question_states` in the answer decoder."""
        states = self.question_states(image_embeds, questions, images)
        return self.stack("decoder").states_kv(states.rows, offsets=states.offsets)

    def lm_logits(self, texts: PackedTexts, images: Tensor, image_kv: ImageKV) -> Tensor:
        """Next-token logits [rows, vocab_size] of texts that start with [DEC]: see `vocabulary_logits`."""
        (hidden,) = self.stack("decoder")([TextStream(texts, "decoder", images)], image_kv)
        return self.vocabulary_logits(hidden)

    def vocabulary_logits(self, hidden: Tensor) -> Tensor:
        """Decoder states [..., width] → logits [..., vocab_size], float32 or wider: 16 bits cannot tell the
        best tokens from the next best (docs/decisions/precision.md)."""
        assert self.lm_head is not None
        return self.lm_head.logits(hidden, self.stack("decoder").word_embeds.weight)

    def vocabulary_projection(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Decoder states [..., width] → the operands of their logits: transformed states [..., width], weight
        [vocab_size, width] and bias [vocab_size], for a loss that never holds all logits."""
        assert self.lm_head is not None
        return self.lm_head(hidden, self.stack("decoder").word_embeds.weight)

    def _require(self, part: str) -> None:
        if not getattr(self.config, part):
            kind = "NLVR2" if part == "reasoning" else "image-text retrieval or pre-training"
            raise ValueError(f"this model has no {part} head: take a checkpoint that has one (an {kind} "
                             "checkpoint)")

    def _initialise(self) -> None:
        """Weights that keep their input's size (std 1/√fan-in), zero biases, unit norms.

        Visual positions start larger than patch embeddings: at ViT's std of 0.02 small models stay blind to
        where things are for thousands of steps (docs/decisions/model.md).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.vision.cls_token)
        nn.init.normal_(self.vision.position_embeds, std=2.0)


def task_model(model: BlipModel, task: str) -> BlipModel:
    """A model with only the parts that a task of `TASK_PARTS` needs. Raises ValueError if `model` lacks
    them."""
    dtype = model.vision.cls_token.dtype
    return model.restricted_to(replace(model.config, **TASK_PARTS[task])).to(dtype).eval()
