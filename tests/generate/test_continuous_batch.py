"""Generation over slots: no text depends on its neighbours, not by a bit, and slots are filled as they become
free."""

from dataclasses import replace

import pytest
import torch
from generating import keys_and_values, noise, prompts_of, see, small_models

from blip_fast.generate import Generation, GenerationConfig, Request, generate, generate_stream
from blip_fast.model.blip import BlipModel
from blip_fast.model.config import BlipConfig, SpecialTokens, TextConfig, VisionConfig
from blip_fast.model.image_kv import ImageStates
from blip_fast.model.packed_texts import PackedTexts
from blip_fast.model.text import TextStack, TextStream

SEP = 102
MODELS = {"narrow": (16, 2, 64, 1), "wide": (96, 3, 200, 2)}  # head_dim, heads, tokens of a text, layers
SEARCHES = {
    "greedy": GenerationConfig(), "two_beams": GenerationConfig(beams=2),
    "beams": GenerationConfig(beams=3, n_best=3),
    "authors": GenerationConfig(beams=3, beam_rule="authors", repetition_penalty=1.3),
    "five_beams": GenerationConfig(beams=5, banned=((7,), (11, 5)), min_length=4),
    "nucleus": GenerationConfig(top_p=0.9),
    "samples": GenerationConfig(top_p=0.95, temperature=1.5, n_best=5),
}


def model_of(head_dim: int, heads: int, positions: int, layers: int) -> BlipModel:
    torch.manual_seed(head_dim)
    width = head_dim * heads
    config = BlipConfig(VisionConfig(32, 8, width, 1, heads),
                        TextConfig(1000, width, layers, heads, 2 * width,
                                   max_positions=positions),
                        SpecialTokens(sep=3, cls=1, bos=998, enc=999), "decoder", contrastive=False,
                        matching=False)
    model = BlipModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=width**-0.5)
        model.lm_head.bias[3] += 2.5
    return model


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_models(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize("config", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
def test_neighbours_change_no_bit(sizes, config):
    """An image's texts and scores are the same, bit for bit, alone, in a batch of any size and in any order,
    among prompts of other lengths."""
    model = model_of(*sizes)
    bos, images = model.config.tokens.bos, 13
    pixels = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    prompts = [[bos, *range(20, 20 + n % 6)] for n in range(images)]
    requests = [Request(kv, prompt, 100 + i) for i, (kv, prompt) in
                enumerate(zip(see(model, pixels).split(), prompts, strict=True))]

    def written(slots: int, which: list[int]) -> dict[int, list[tuple[list[int], float]]]:
        found = generate_stream(model, (requests[i] for i in which), config, slots)
        return {which[place]: [(text.token_ids, text.score) for text in texts] for place, texts in found}

    alone = {i: texts for i in range(images) for texts in written(1, [i]).values()}
    assert len({len(texts[0][0]) for texts in alone.values()}) > 2
    assert all(len(texts) == config.n_best for texts in alone.values())
    for slots in (1, 2, 3, 5, 8, 13, 32):
        assert written(slots, list(range(images))) == alone
    assert written(4, [12, 0, 7, 5, *range(1, 5), 6, *range(8, 12)]) == alone


def test_questions_of_any_lengths():
    """What decoders of answers look at differs in length: no bit of an answer depends on the other
    questions."""
    config = BlipConfig(VisionConfig(32, 16, 32, 1, 2), TextConfig(140, 32, 2, 2, 64),
                        SpecialTokens(sep=SEP, cls=101, bos=138, enc=139),
                        "untied", contrastive=False, matching=False)
    torch.manual_seed(1)
    model = BlipModel(config).eval()
    lengths = [9, 70, 1, 33, 64, 65, 20]  # more than 64 need more room
    states = torch.randn(sum(lengths), 32)
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    for search in (GenerationConfig(), GenerationConfig(beams=3)):
        questions = ImageStates(states, offsets)
        together = generate(model, questions, prompts_of([138], len(lengths)), search)
        for question, text in zip(questions.split(), together, strict=True):
            assert generate(model, question, prompts_of([138], 1), search) == [text]
        exact = model.lm_logits(PackedTexts.from_lists([together[1].token_ids[:-1]]), torch.tensor([1]),
                                keys_and_values(model, questions))
        greedily = exact.argmax(-1).tolist() if search.beams == 1 else together[1].token_ids[1:]
        assert together[1].token_ids[1:] == greedily


def test_slots_are_filled_again(small, monkeypatch):
    """A finished image makes room at once, no more than `slots` requests are taken ahead, every step computes
    the same shapes until the stream ends, and then fewer."""
    _, model = small
    taken, shapes, decode = [], [], TextStack.decode
    kvs = see(model, noise(20, seed=3)).split()

    def requests():
        for i, kv in enumerate(kvs):
            taken.append(i)
            yield Request(kv, [model.config.tokens.bos])

    monkeypatch.setattr(TextStack, "decode", lambda self, ids, positions, cache, images, prompts: (
        shapes.append((len(ids), len(images.lengths), len(taken))),
        decode(self, ids, positions, cache, images, prompts))[1])
    places, finished = [], 0
    for place, _ in generate_stream(model, requests(), GenerationConfig(beams=4), 6):
        assert len(taken) - finished <= 6
        places, finished = [*places, place], finished + 1
    assert sorted(places) == list(range(20)) and places != sorted(places)
    assert all(rows == 4 * slots for rows, slots, _ in shapes)
    assert {slots for _, slots, so_far in shapes if so_far < 20} == {6}
    assert min(slots for _, slots, _ in shapes) < 6
    together = len(shapes)
    list(generate_stream(model, requests(), GenerationConfig(beams=4), 1))
    assert together < (len(shapes) - together) / 3


@pytest.mark.parametrize("config", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize("sizes", MODELS.values(), ids=MODELS)
def test_requests_come_and_go(sizes, config):
    """As in a server: slots go when few requests are left and come back when more enter, some requests are
    given up, and no bit of the other texts changes."""
    model = model_of(*sizes)
    bos, images = model.config.tokens.bos, 12
    pixels = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    requests = [Request(kv, [bos, *range(20, 20 + n % 6)], 100 + n)
                for n, kv in enumerate(see(model, pixels).split())]
    alone = {n: texts for n, request in enumerate(requests)
             for _, texts in generate_stream(model, [request], config, 1)}
    generation, found, entered, slots = Generation(model, config, 7), {}, set(), set()
    arrivals = {0: [0], 2: [1, 2], 3: [3], 4: [4, 5, 6, 7, 8, 9], 9: [10], 30: [11]}
    for step in range(60):
        for n in arrivals.get(step, ()):
            room = generation.free > 0
            assert generation.enter(n, requests[n]) == room
            entered |= {n} if room else set()
        if step == 4:
            generation.leave(5)
            generation.leave(11)  # is not there yet
        found.update(generation.step())
        slots.add(len(generation._places))
    assert found == {n: alone[n] for n in entered - {5}} and generation.idle and generation.free == 7
    assert {0, 11} < entered and 1 in slots and len(slots) > 2


@pytest.mark.parametrize("config", [SEARCHES["greedy"], SEARCHES["beams"]], ids=["greedy", "beams"])
def test_a_prompt_takes_no_step_of_its_own(config):
    """Whatever a prompt's length, the first step writes the first token after it: the one that scoring the
    whole text gives."""
    model = model_of(*MODELS["wide"])
    # of 64 rows at most
    prompts = [[998, *(token % 900 + 10 for token in range(n))] for n in (2, 150, 0, 129, 150)]
    states = see(model, torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(3))).split()
    generation = Generation(model, replace(config, max_length=180, min_length=180), 5)
    for place, (kv, prompt) in enumerate(zip(states, prompts, strict=True)):
        assert generation.enter(place, Request(kv, prompt))
    generation.step()
    assert generation._texts.lengths.tolist() == [len(prompt) + 1 for prompt in prompts]
    for slot, (kv, prompt) in enumerate(zip(states, prompts, strict=True)):
        text = PackedTexts(torch.tensor(prompt), torch.tensor([0, len(prompt)], dtype=torch.int32))
        stream, stack = TextStream(text, "decoder", torch.tensor([0])), model.stack("decoder")
        with torch.inference_mode():
            [hidden] = stack([stream], stack.states_kv(kv.rows, offsets=kv.offsets))
            logits = model.vocabulary_logits(hidden)[len(prompt) - 1]
            logits[model.config.tokens.sep] = -torch.inf  # no end before `min_length`
        assert generation._texts.token_ids[slot, 0, len(prompt)] == logits.argmax()


def test_prompts_of_each_image(small):
    """Each image goes on from its own prompt, as if all had it."""
    _, model = small
    prompts = [[model.config.tokens.bos, *range(10, 10 + n)] for n in (0, 1, 2, 3, 4, 7)]
    seen = see(model, noise(6, seed=5))
    for beams in (1, 3):
        config = GenerationConfig(beams=beams)
        texts = generate(model, seen, prompts, config)
        for i, prompt in enumerate(prompts):
            assert texts[i].token_ids[: len(prompt)] == prompt
            assert texts[i] == generate(model, seen, [prompt] * 6, config)[i]


def test_bfloat16(small):
    """Low precision runs every search and writes whole texts."""
    _, model = small
    low = BlipModel(model.config).eval()
    low.load_state_dict(model.state_dict())
    low.bfloat16()
    for config in SEARCHES.values():
        for text in generate(low, see(low, noise(3).bfloat16()), prompts_of([model.config.tokens.bos], 3),
                             config, [1, 2, 3]):
            assert 2 <= len(text.token_ids) <= config.max_length and text.score < 0
