"""All training steps: which losses choose each, and what the rest of a run must know of it.

A further task is a module with its step and its batch, and a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig
from blip_fast.model.tokenizer import Tokenizer
from blip_train.steps.answering import Answering, QuestionBatch
from blip_train.steps.dialogues import DialogueBatch, Dialogues
from blip_train.steps.pretraining import Batch, Objective, Pretraining
from blip_train.steps.reasoning import PairBatch, Reasoning
from blip_train.steps.step import TrainingStep

if TYPE_CHECKING:
    from blip_fast.data.input.decoding import ReadBatch


@dataclass(frozen=True)
class Loss:
    """`title`: of the loss's plot. `needs`: the model parts that the loss reads, in a recipe's words. `fits`:
    whether a model has them."""

    title: str
    needs: str
    fits: Callable[[BlipConfig], bool]


@dataclass(frozen=True)
class TextLimits:
    """Where texts are cut: after `tokens` tokens, and questions after `words` words. (Captions were cut after
    as many words when they were read.)"""

    tokens: int
    words: int


@dataclass(frozen=True)
class StepKind:
    """A training step and its batch. An objective whose losses are some of `losses` chooses it.

    Attributes:
        losses: by their names in recipes, logs and `StepOutput`.
        make: (model, objective, seed) → the step. The seed is for the queue's first entries, if there is one.
        collate: (read samples, tokenizer, limits) → the step's batch.
        of_pairs: the losses are ITC, ITM and LM over pairs of image and text. The formulas in forecast/
            (FLOPs, memory) and the measurements at the end of a run hold for these alone.
        two_images: each sample has two images.
    """

    losses: Mapping[str, Loss]
    make: Callable[[BlipModel, Objective, int], TrainingStep]
    collate: Callable[[ReadBatch, Tokenizer, TextLimits], Any]
    of_pairs: bool = False
    two_images: bool = False


STEPS = (
    StepKind(
        losses={
            "itc": Loss("Contrastive loss (ITC)", "contrastive: true", lambda model: model.contrastive),
            "itm": Loss("Matching loss (ITM)", "matching: true", lambda model: model.matching),
            "lm": Loss("Language loss (LM)", "text_stacks: tied or decoder",
                       lambda model: model.text_stacks in ("tied", "decoder")),
        },
        make=Pretraining,
        collate=lambda read, tokenizer, limits: Batch.collate(read, tokenizer, limits.tokens),
        of_pairs=True,
    ),
    StepKind(
        losses={"answer": Loss("Answer loss (VQA)", "text_stacks: untied",
                               lambda model: model.text_stacks == "untied")},
        make=lambda model, objective, _seed: Answering(model, objective.label_smoothing),
        collate=lambda read, tokenizer, limits: QuestionBatch.collate(read, tokenizer, limits.tokens,
                                                                      limits.words),
    ),
    StepKind(
        losses={"reasoning": Loss("Reasoning loss (NLVR2)",
                                  "reasoning: true and text.twin_cross_attention: true",
                                  lambda model: model.reasoning and model.text.twin_cross_attention)},
        make=lambda model, _objective, _seed: Reasoning(model),
        collate=lambda read, tokenizer, limits: PairBatch.collate(read, tokenizer, limits.tokens),
        two_images=True,
    ),
    StepKind(
        losses={"dialogue": Loss("Dialogue loss (VisDial)", "matching: true", lambda model: model.matching)},
        make=lambda model, _objective, _seed: Dialogues(model),
        collate=lambda read, tokenizer, limits: DialogueBatch.collate(read, tokenizer, limits.tokens),
    ),
)
LOSSES = {name: loss for kind in STEPS for name, loss in kind.losses.items()}


def step_kind(losses: Sequence[str]) -> StepKind:
    """The step that computes these losses. Raises ValueError if no step computes them together."""
    for kind in STEPS:
        if losses and kind.losses.keys() >= set(losses):
            return kind
    raise ValueError("objective.losses must name some of itc, itm, lm, or answer, reasoning or dialogue "
                     f"alone; got {list(losses)}")
