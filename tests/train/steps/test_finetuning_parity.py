"""Captioning, VQA, NLVR2 and VisDial against the textbook models: the loss and every gradient of two
steps, and of the last three under the engine on two ranks. (Retrieval's are in
test_training_parity.py and test_engine.py.)"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from blip_train.engine import engine as engines
from blip_train.engine.batches import SeededBatch
from blip_train.recipe import Recipe, RuntimeRecipe
from blip_train.schedule import Schedule
from blip_train.steps.answering import Answering, QuestionBatch, answer_weights
from blip_train.steps.dialogues import DialogueBatch, Dialogues
from blip_train.steps.pretraining import Batch, Objective, Pretraining
from blip_train.steps.reasoning import PairBatch, Reasoning
from blip_train.steps.step import StepContext
from ranks import join, spawn
from reference import tasks
from reference.model import Sizes
from small_pretraining import check_gradients, everyone, make_model

from blip_fast.checkpoint.names import original_layout
from blip_fast.model.config import BlipConfig, TextConfig, VisionConfig
from blip_fast.model.packed_texts import PackedTexts

# layers: NLVR2 averages its two eyes in the first six, merges them in the rest
STEPS, BATCH, LR, LAYERS = 2, 3, 0.2, 8
CONFIG = BlipConfig(
    vision=VisionConfig(image_size=32, patch_size=16, width=32, layers=2, heads=2),
    text=TextConfig(width=32, layers=LAYERS, heads=2, mlp_width=64, max_positions=32, dropout=0.0),
    text_stacks="decoder", contrastive=False, matching=False,
)
SIZES = Sizes(image_size=32, patch_size=16, vision_width=32, vision_layers=2, vision_heads=2, positions=32,
              text_width=32, text_layers=LAYERS, text_heads=2, text_feed_forward=64)
PROMPT = 4


def make_texts(first: int, lengths: list[int], generator: torch.Generator) -> PackedTexts:
    """Texts of that many words between the first token and [SEP]."""
    return PackedTexts.from_lists([[first, *torch.randint(1000, 2000, (n,), generator=generator).tolist(),
                                    102]
                                   for n in lengths])


def captioning():
    """Captions after a prompt of three words, whose tokens have no loss."""
    step = Pretraining(make_model(CONFIG), Objective(losses=("lm",), prompt_tokens=PROMPT), seed=0)

    def batch(generator):
        return Batch(torch.randn(BATCH, 3, 32, 32, generator=generator),
                     make_texts(101, [4, 9, 6], generator), torch.arange(BATCH))

    def loss(textbook, batch):
        ids, mask = padded(batch.texts.with_first(tasks.DEC))
        return textbook.loss(batch.images, ids, mask, PROMPT)

    return step, "lm", tasks.Captioner(SIZES), batch, loss


def answering():
    """Questions with two, one and three answers of one to three words, weighted."""
    step = Answering(make_model(replace(CONFIG, text_stacks="untied")), label_smoothing=0.1)

    def batch(generator):
        return QuestionBatch(torch.randn(BATCH, 3, 32, 32, generator=generator),
                             make_texts(tasks.ENC, [5, 2, 7], generator),
                             make_texts(tasks.DEC, [1, 3, 1, 2, 1, 1], generator),
                             torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([0.7, 0.3, 0.2, 0.5, 0.4, 0.1]))

    def loss(textbook, batch):
        return textbook.loss(batch.images, *padded(batch.questions), *padded(batch.answers),
                             batch.question_of, batch.weights)

    return step, "answer", tasks.QuestionAnswerer(SIZES), batch, loss


def reasoning():
    """True and false sentences about pairs of images; the textbook's own cross-entropy of the logits."""
    config = replace(CONFIG, text_stacks="encoder", reasoning=True,
                     text=replace(CONFIG.text, twin_cross_attention=True))
    step = Reasoning(make_model(config))

    def batch(generator):
        return PairBatch(torch.randn(BATCH, 2, 3, 32, 32, generator=generator),
                         make_texts(tasks.ENC, [6, 2, 9], generator), torch.tensor([1, 0, 1]))

    def loss(textbook, batch):
        logits = textbook(batch.images[:, 0], batch.images[:, 1], *padded(batch.sentences))
        return -logits.log_softmax(dim=1)[torch.arange(BATCH), batch.labels].mean()

    return step, "reasoning", tasks.PairReasoner(SIZES), batch, loss


def dialogues():
    """Rounds of three dialogues with captions of different lengths; the second image has one answer alone."""
    step = Dialogues(make_model(replace(CONFIG, text_stacks="encoder", matching=True)))

    def batch(generator):
        return DialogueBatch(torch.randn(BATCH, 3, 32, 32, generator=generator),
                             make_texts(tasks.CLS, [4, 1, 8], generator),
                             make_texts(tasks.ENC, [5, 2, 7, 1, 9, 9], generator),
                             torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([1, 0, 0, 1, 1, 0]))

    def loss(textbook, batch):
        return textbook.loss(batch.images, *padded(batch.captions), *padded(batch.texts), batch.image_of,
                             batch.labels)

    return step, "dialogue", tasks.DialogueEncoder(SIZES), batch, loss


def padded(texts: PackedTexts) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = texts.to_padded(0)
    return ids, mask.long()


@pytest.mark.parametrize("task", [captioning, answering, reasoning, dialogues],
                         ids=lambda task: task.__name__)
def test_losses_and_gradients_equal_the_textbook(task):
    step, name, textbook, make_batch, textbook_loss = task()
    layout, parameters = original_layout(step.model.config), dict(step.model.named_parameters())
    state = layout.split(step.model.state_dict())
    textbook.load_state_dict(state | layout.stored_twice(state))
    for number in range(STEPS):
        batch = make_batch(torch.Generator().manual_seed(number))
        step.follow()
        output = step(batch, StepContext())
        step.zero_grad()
        output.total.backward()
        step.enqueue(output)
        expected = textbook_loss(textbook, batch)
        textbook.zero_grad()
        expected.backward()
        assert list(output.losses) == [name]
        torch.testing.assert_close(output.losses[name], expected, rtol=1e-4, atol=0)
        check_gradients(layout.split({key: p.grad for key, p in parameters.items()}),
                        dict(textbook.named_parameters()))
        with torch.no_grad():
            for parameter in (*parameters.values(), *textbook.parameters()):
                parameter -= LR * parameter.grad


STAGES = (0, 2, 3)


def note_gradients(engine: engines.TrainingEngine, stage: int) -> dict[str, torch.Tensor]:
    """Filled with the gradients that the next step is taken with."""
    from deepspeed.utils import safe_get_full_grad

    gradients, plain = {}, engine.engine.step

    def noting():
        for name, parameter in engine.training_step.model.named_parameters():
            gradients[name] = (parameter.grad if stage == 0 else safe_get_full_grad(parameter)).clone()
        plain()

    engine.engine.step = noting
    return gradients


def _rank(rank: int, ranks: int, port: int, path: str) -> None:
    """One step of each task under each ZeRO stage: the losses by rank and the
    gradients averaged over ranks."""
    device, record = join(rank, ranks, port), {}
    for task in (answering, reasoning, dialogues):
        for stage in STAGES:
            step, name, _, make_batch, _ = task()
            recipe = Recipe(schedule=Schedule(lr=0.01),
                            runtime=RuntimeRecipe(batch_size=BATCH, precision="float32", zero_stage=stage))
            engine = engines.TrainingEngine(step.train(), recipe, device)
            gradients = note_gradients(engine, stage)
            batch = SeededBatch(make_batch(torch.Generator().manual_seed(rank)), seed=rank)
            (output,) = engine.step([iter([batch])], 0.01, StepContext())
            record[task.__name__, stage] = everyone(output.losses[name].detach(), ranks), gradients
    if rank == 0:
        torch.save(record, path)
    dist.barrier()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> dict:
    path = str(tmp_path_factory.mktemp("record") / "record.pt")
    spawn(_rank, 2, path)
    return torch.load(path)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("task", [answering, reasoning, dialogues], ids=lambda task: task.__name__)
def test_two_ranks_under_every_stage_equal_the_textbook(two_ranks, task, stage):
    """Each rank divides by its own images; the gradient is the mean over ranks."""
    losses, gradients = two_ranks[task.__name__, stage]
    step, _, textbook, make_batch, textbook_loss = task()
    layout = original_layout(step.model.config)
    state = layout.split(step.model.state_dict())
    textbook.load_state_dict(state | layout.stored_twice(state))
    expected = torch.stack([textbook_loss(textbook, make_batch(torch.Generator().manual_seed(rank)))
                            for rank in range(2)])
    expected.mean().backward()
    torch.testing.assert_close(torch.stack(losses), expected.detach(), rtol=1e-4, atol=0)
    check_gradients(layout.split(gradients), dict(textbook.named_parameters()))


def test_answers_weigh_their_votes():
    """The published rule: a tenth per vote of ten people; 0.2 for Visual Genome's single answers."""
    votes = ["red", "red", "dark red", "red", "red", "red", "maroon", "red", "red", "dark red"]
    assert answer_weights(votes) == pytest.approx({"red": 0.7, "dark red": 0.2, "maroon": 0.1})
    assert answer_weights({"cat": 0.2}) == {"cat": 0.2}
