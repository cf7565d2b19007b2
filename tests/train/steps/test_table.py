"""The table of training steps: each loss belongs to one step, and a recipe's losses choose it."""

from typing import get_args, get_type_hints

import pytest
from blip_train.prepare import make_step
from blip_train.recipe import Recipe
from blip_train.steps.answering import Answering
from blip_train.steps.dialogues import Dialogues
from blip_train.steps.pretraining import Objective, Pretraining
from blip_train.steps.reasoning import Reasoning
from blip_train.steps.table import LOSSES, STEPS, step_kind

from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig, SpecialTokens, TextConfig, VisionConfig

VISION = VisionConfig(image_size=32, patch_size=16, width=32, layers=1, heads=2)
TEXT = TextConfig(vocab_size=40, width=32, layers=1, heads=2, mlp_width=64, max_positions=16)


def test_each_loss_that_a_recipe_can_name_belongs_to_one_step():
    (names,) = {get_args(part) for part in get_args(get_type_hints(Objective)["losses"]) if get_args(part)}
    assert list(LOSSES) == list(names) and sum(len(kind.losses) for kind in STEPS) == len(LOSSES)


@pytest.mark.parametrize(("losses", "parts", "step", "momentum"), [
    (("itc", "lm"), {}, Pretraining, True),
    (("lm",), {"text_stacks": "decoder", "contrastive": False, "matching": False}, Pretraining, False),
    (("answer",), {"text_stacks": "untied"}, Answering, False),
    (("reasoning",), {"text_stacks": "encoder", "reasoning": True}, Reasoning, False),
    (("dialogue",), {"text_stacks": "encoder"}, Dialogues, False),
])
def test_losses_choose_a_step(losses, parts, step, momentum):
    text = TextConfig(**{**vars(TEXT), "twin_cross_attention": "reasoning" in losses})
    config = BlipConfig(vision=VISION, text=text, embed_dim=16, tokens=SpecialTokens(0, 1, 2, 3, 4), **parts)
    recipe = Recipe(model=config, objective=Objective(losses=losses, queue_size=8))
    made = make_step(BlipModel(config), recipe)
    assert type(made) is step and (made.momentum_state() is not None) == momentum
    assert recipe.step_kind.of_pairs == (step is Pretraining)


@pytest.mark.parametrize("losses", [(), ("itc", "answer"), ("answer", "reasoning")])
def test_losses_of_several_steps_or_none_are_refused(losses):
    with pytest.raises(ValueError, match="or answer, reasoning or dialogue alone"):
        step_kind(losses)
    with pytest.raises(ValueError, match="or answer, reasoning or dialogue alone"):
        Recipe(objective=Objective(losses=losses))
