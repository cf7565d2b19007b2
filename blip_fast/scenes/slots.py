"""Scores captions of drawn scenes slot by slot, against the known ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blip_fast.scenes.scenes import Scene, chance_levels, score_caption


@dataclass(frozen=True)
class SlotScores:
    """Shares from 0 to 1: of slots that are right (sizes, colours, shapes, relation, background), and of
    captions in which all slots are right. `chance_*` are the shares when each scene gets another scene's
    caption."""

    slot_accuracy: float
    exact_match: float
    chance_slot_accuracy: float
    chance_exact_match: float


def slot_scores(captions: Sequence[str], scenes: Sequence[Scene]) -> SlotScores:
    """Score one caption per scene. Raises ValueError if there is no scene, or the number of captions
    differs."""
    if not scenes or len(captions) != len(scenes):
        raise ValueError("one caption per scene is needed, "
                         f"got {len(captions)} captions for {len(scenes)} scenes")
    scores = [score_caption(caption, scene) for caption, scene in zip(captions, scenes, strict=True)]
    right, slots, whole = (sum(column) for column in zip(*scores, strict=True))
    chance_slots, chance_whole = chance_levels(list(scenes), seed=0)
    return SlotScores(right / slots, whole / len(scenes), chance_slots, chance_whole)
