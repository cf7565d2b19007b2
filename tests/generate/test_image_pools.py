"""What generation reads of images: as keys and values or as states, the same attention."""

import pytest
import torch

from blip_fast.model.config import TextConfig
from blip_fast.model.kv_cache import KeyValuePool, StatesPool, image_pool
from blip_fast.model.linear_layer import Linear

CONFIG = TextConfig(vocab_size=100, width=32, layers=3, heads=2, mlp_width=64)
WIDTH, KEYS = 24, 9


@pytest.fixture
def projection():
    torch.manual_seed(0)
    return Linear(WIDTH, CONFIG.layers * 2 * CONFIG.width)


def states(seed: int, keys: int = KEYS) -> torch.Tensor:
    return torch.randn(keys, WIDTH, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def attended(pool, projection, moves, rows):
    """What 2 texts of each slot see in every layer, after some moves of slots."""
    made = pool(CONFIG, projection, 3, KEYS, states(0))
    for slot in range(3):
        made.enter(slot, states(slot, KEYS - slot))
    moves(made)
    q = torch.randn(CONFIG.layers, rows, CONFIG.heads, CONFIG.width // CONFIG.heads,
                    generator=torch.Generator().manual_seed(9))
    return torch.stack([made.attend(layer, q[layer]) for layer in range(CONFIG.layers)])


def leave(pool):
    pass


def keep_two(pool):
    pool.keep(torch.tensor([2, 0]))


def take_another_place(pool):
    """A slot that held more states than the image that enters it."""
    pool.enter(0, states(7, 2))


def grow(pool):
    pool.add(2)
    pool.enter(3, states(5))
    pool.enter(4, states(6, 1))


@pytest.mark.parametrize(("moves", "rows"), [(leave, 6), (keep_two, 4), (take_another_place, 6), (grow, 10)],
                         ids=["entered", "kept", "entered again", "grown"])
def test_both_pools_see_the_same(projection, moves, rows):
    by_keys, by_states = (attended(pool, projection, moves, rows) for pool in (KeyValuePool, StatesPool))
    torch.testing.assert_close(by_states, by_keys, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("tokens", "wanted"), [(24, StatesPool), (25, KeyValuePool)])
def test_states_are_read_for_few_tokens(projection, tokens, wanted):
    """1.5 times head_dim, 16 here."""
    assert isinstance(image_pool(CONFIG, projection, 2, KEYS, tokens, states(0)), wanted)


def test_weights_that_may_change_are_read_anew(projection):
    first = StatesPool(CONFIG, projection, 1, KEYS, states(0)).key_weight
    with torch.no_grad():
        projection.weight.mul_(2)
    assert torch.equal(StatesPool(CONFIG, projection, 1, KEYS, states(0)).key_weight, 2 * first)
    projection.requires_grad_(False)
    once = StatesPool(CONFIG, projection, 1, KEYS, states(0)).key_weight
    assert StatesPool(CONFIG, projection, 1, KEYS, states(0)).key_weight is once


@torch.no_grad()
@pytest.mark.parametrize("pool", [KeyValuePool, StatesPool])
def test_rows_of_some_slots_see_what_they_see_among_all(projection, pool):
    made = pool(CONFIG, projection, 4, KEYS, states(0))
    for slot in range(4):
        made.enter(slot, states(slot, KEYS - slot))
    q = torch.randn(4, 3, CONFIG.heads, CONFIG.width // CONFIG.heads,
                    generator=torch.Generator().manual_seed(9))
    slots = torch.tensor([1, 3])
    some = made.attend(1, q[slots].flatten(0, 1), slots)
    among_all = made.attend(1, q.flatten(0, 1)).view_as(q)
    torch.testing.assert_close(some.view(2, *q.shape[1:]), among_all[slots], rtol=0, atol=0)
