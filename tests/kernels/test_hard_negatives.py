"""blip_kernels.hard_negatives, twin and kernels: distribution of draws, excluded keys, equal draws of both."""

import re
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from blip_kernels import hard_negatives
from blip_kernels.backends import triton_cannot
from blip_kernels.random import ROUNDS, philox
from hypothesis import given, settings
from hypothesis import strategies as st

BACKENDS = ("reference", "triton")
op = import_module("blip_kernels.hard_negatives")  # its name in the package is the function


def features(rows, width):
    return F.normalize(torch.randn(rows, width), dim=1)


def distribution(queries, keys, temperature, floor, excluded):
    """The definition in float64: softmax over all keys + floor, 0 for excluded keys, rows sum to one."""
    weights = torch.softmax(queries.double() @ keys.double().T / temperature, dim=1) + floor
    weights = weights.masked_fill(excluded, 0.0)
    return weights / weights.sum(1, keepdim=True)


def chi_squared_p(drawn, probabilities):
    """Probability of a χ² at least as large; keys are pooled, rarest first, until a pool expects five draws."""
    counts = torch.bincount(drawn, minlength=len(probabilities)).double()
    assert not counts[probabilities == 0].any()
    expected, order = (probabilities * len(drawn)).sort()
    counts, pools, seen = counts[order], [], torch.zeros(2, dtype=torch.float64)
    for pair in torch.stack([expected, counts], dim=1):
        seen = seen + pair
        if seen[0] >= 5:
            pools.append(seen)
            seen = torch.zeros(2, dtype=torch.float64)
    pools[-1] = pools[-1] + seen
    want, got = torch.stack(pools).unbind(1)
    statistic = ((got - want) ** 2 / want).sum()
    return float(torch.special.gammaincc(torch.tensor((len(pools) - 1) / 2, dtype=torch.float64),
                                         statistic / 2))


def test_chi_squared_of_known_values():
    """9 degrees of freedom: the 5 % quantile is 16.919."""
    probabilities = torch.full((10,), 0.1, dtype=torch.float64)
    drawn = torch.arange(10).repeat_interleave(100)
    assert chi_squared_p(drawn, probabilities) == pytest.approx(1.0)
    # One key gets `shift` more, another less: χ² = 2 · 29² / 100 = 16.8.
    shift = int((16.919 * 100 / 2) ** 0.5)
    drawn = torch.cat([drawn[: 1000 - shift], torch.zeros(shift, dtype=torch.int64)])
    assert chi_squared_p(drawn, probabilities) == pytest.approx(0.052, abs=0.002)


@pytest.mark.parametrize(("keys", "width", "temperature", "floor"), [
    (3, 4, 0.07, 1e-4), (5, 8, 0.5, 0.0), (37, 16, 0.07, 1e-4), (37, 16, 0.07, 0.0), (64, 32, 0.2, 0.05),
    (301, 64, 0.1, 1e-4), (8, 8, 0.01, 1e-4),
])  # fmt: skip
def test_draws_follow_the_distribution(keys, width, temperature, floor):
    """χ² of 50,000 rows with one query, by id: draws are independent, each row has its own random numbers."""
    torch.manual_seed(keys)
    query, candidates, rows = features(1, width), features(keys, width), 50_000
    key_ids = torch.arange(keys) % 7
    ids = torch.zeros(rows, dtype=torch.int64)
    drawn = hard_negatives(query.expand(rows, -1), candidates, torch.tensor(temperature), floor=floor,
                           seed=11, ids=ids, key_ids=key_ids)
    (probabilities,) = distribution(query, candidates, temperature, floor, (key_ids == 0)[None])
    assert chi_squared_p(drawn, probabilities) > 0.01


@pytest.mark.parametrize(("seed", "stream"), [(0, 0), (1, 0), (0, 1), (2**62 + 12345, 7)])
def test_seeds_and_streams_draw_alike_but_differently(seed, stream):
    torch.manual_seed(0)
    query, candidates, rows = features(1, 8), features(20, 8), 50_000
    ids, key_ids = torch.full((rows,), 3), torch.arange(20)
    drawn = hard_negatives(query.expand(rows, -1), candidates, torch.tensor(0.2), floor=1e-3, seed=seed,
                           stream=stream, ids=ids, key_ids=key_ids)
    (probabilities,) = distribution(query, candidates, 0.2, 1e-3, (key_ids == 3)[None])
    assert chi_squared_p(drawn, probabilities) > 0.01
    other = hard_negatives(query.expand(rows, -1), candidates, torch.tensor(0.2), floor=1e-3, seed=seed,
                           stream=stream + 1, ids=ids, key_ids=key_ids)
    agreement = (drawn == other).double().mean()
    assert abs(agreement - (probabilities**2).sum()) < 5 * (0.25 / rows) ** 0.5  # what independent draws have


@pytest.mark.parametrize("floor", [0.0, 1e-4])
def test_own_pairs_across_seeds(floor):
    """Pairs: over many seeds, each row of a gathered batch follows its own distribution without its own key."""
    torch.manual_seed(0)
    queries, candidates, first = features(3, 8), features(11, 8), 4
    draws = torch.stack([hard_negatives(queries, candidates, torch.tensor(0.2), floor=floor, seed=seed,
                                        first_own_key=first) for seed in range(1000)])
    excluded = torch.arange(first, first + 3)[:, None] == torch.arange(11)
    for row, probabilities in enumerate(distribution(queries, candidates, 0.2, floor, excluded)):
        assert chi_squared_p(draws[:, row], probabilities) > 0.01


@pytest.mark.parametrize("floor", [0.0, 1e-4, 1.0])
def test_excluded_ids_are_never_drawn_in_a_million_draws(floor):
    """The excluded key has nearly all of the softmax's weight."""
    rows, keys = 1_000_000, 5
    query = torch.tensor([[1.0, 0.0]])
    candidates = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [1.0, 0.0], [-1.0, 0.0]])
    ids, key_ids = torch.arange(rows) % 2, torch.tensor([0, 1, 2, 0, 1])
    drawn = hard_negatives(query.expand(rows, -1), candidates, torch.tensor(0.05), floor=floor, seed=3,
                           ids=ids, key_ids=key_ids)
    assert ((drawn >= 0) & (drawn < keys)).all()
    assert (key_ids[drawn] != ids).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_without_admissible_key_gets_minus_one(backend):
    torch.manual_seed(0)
    queries, keys, t = features(4, 8), features(6, 8), torch.tensor(0.1)
    ids, key_ids = torch.tensor([5, 1, 5, 2]), torch.full((6,), 5)
    for floor in (0.0, 1e-4):
        drawn = hard_negatives(queries, keys, t, floor=floor, seed=0, ids=ids, key_ids=key_ids,
                               backend=backend)
        assert (drawn[[0, 2]] == -1).all() and (drawn[[1, 3]] >= 0).all()
        assert hard_negatives(queries[:1], keys[:1], t, floor=floor, seed=0, backend=backend).tolist() == [-1]
        assert hard_negatives(queries, keys[:0], t, floor=floor, seed=0, ids=ids, key_ids=key_ids[:0],
                              backend=backend).tolist() == [-1] * 4
    assert hard_negatives(queries[:0], keys, t, seed=0, backend=backend).shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_slots_are_equal_to_nothing(backend):
    """Id −100 on both sides does not exclude."""
    torch.manual_seed(0)
    ids = torch.full((3,), -100)
    drawn = hard_negatives(features(3, 8), features(2, 8), torch.tensor(0.1), seed=0, ids=ids,
                           key_ids=ids[:2], backend=backend)
    assert (drawn >= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_that_underflow_are_still_drawn_by_their_odds(backend):
    """τ = 0.001: the own key leaves exp(−1000) to the others; the second is e times as likely as the first."""
    rows = 4000 if backend == "reference" else 400
    query = torch.tensor([[1.0, 0.0, 0.0]])
    keys = torch.tensor([[0.0, 1.0, 0.0], [0.001, 1.0, 0.0], [1.0, 0.0, 0.0]])
    drawn = hard_negatives(query.expand(rows, -1), keys, torch.tensor(0.001), floor=0.0, seed=5,
                           ids=torch.zeros(rows, dtype=torch.int64), key_ids=torch.tensor([1, 2, 0]),
                           backend=backend)
    assert (drawn < 2).all()
    share = torch.e / (1 + torch.e)
    assert abs(drawn.double().mean() - share) < 4 * (0.2 / rows) ** 0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("floor", [0.0, 1e-4])
def test_nan_rows_draw_uniformly(backend, floor):
    """A row that is lost must not draw outside the keys."""
    torch.manual_seed(0)
    queries, keys = features(300, 8), features(6, 8)
    queries[::2, 1] = float("nan")
    ids, key_ids = torch.zeros(300, dtype=torch.int64), torch.arange(6)
    drawn = hard_negatives(queries, keys, torch.tensor(0.1), floor=floor, seed=0, ids=ids, key_ids=key_ids,
                           backend=backend)
    assert ((drawn > 0) & (drawn < 6)).all()
    uniform = torch.tensor([0, 0.2, 0.2, 0.2, 0.2, 0.2], dtype=torch.float64)
    assert chi_squared_p(drawn[::2], uniform) > 0.01


def scores(queries, keys, temperature, seed, stream):
    """s/τ − log(−log(1 − v)) in float64, from the random numbers as the op's documentation places them."""
    rows, count = len(queries), len(keys)
    words = [philox(seed, torch.tensor(j // 4), torch.arange(rows), torch.tensor(stream))[j % 4]
             for j in range(count)]
    v = ((torch.stack(words, 1) >> 1) + 0.5) / 2**31
    return queries.double() @ keys.double().T / temperature - torch.log(-torch.log1p(-v)), v


def check_against_scores(backend, rows, keys, width, kind, seed, stream=1):
    """Without a floor the draw is the argmax; it must be the best, but for scores that rounding may swap."""
    torch.manual_seed(seed % 1000)
    queries, candidates = features(rows, width), features(keys, width)
    if kind == "pair":
        options = {"first_own_key": keys - rows}
        excluded = torch.arange(keys - rows, keys)[:, None] == torch.arange(keys)
    else:
        options = {"ids": torch.randint(0, 5, (rows,)), "key_ids": torch.randint(0, 5, (keys,))}
        excluded = options["ids"][:, None] == options["key_ids"]
    drawn = hard_negatives(queries, candidates, torch.tensor([0.07]), seed=seed, stream=stream,
                           backend=backend, **options)
    assert drawn.dtype == torch.int64
    exact = scores(queries, candidates, 0.07, seed, stream)[0].masked_fill(excluded, float("-inf"))
    possible = ~excluded.all(1)
    assert (drawn[~possible] == -1).all() and (drawn[possible] >= 0).all()
    best, reached = exact.max(1).values, exact.gather(1, drawn.clamp(min=0)[:, None]).squeeze(1)
    assert (reached[possible] >= best[possible] - 2e-5).all()  # float32 logits of 14 and their logarithms


SHAPES = [(1, 2, 8), (3, 3, 16), (17, 65, 24), (64, 64, 64), (65, 257, 17), (129, 131, 32), (5, 700, 256)]


@pytest.mark.parametrize("kind", ["pair", "id"])
@pytest.mark.parametrize(("rows", "keys", "width"), SHAPES, ids=lambda x: str(x))
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_draw_is_the_best_score(backend, rows, keys, width, kind):
    check_against_scores(backend, rows, keys, width, kind, seed=2**40 + 7)


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 30), more=st.integers(0, 90), width=st.integers(1, 40),
       kind=st.sampled_from(["pair", "id"]), seed=st.integers(0, 2**63 - 1))
def test_any_sizes(rows, more, width, kind, seed):
    for backend in BACKENDS:
        check_against_scores(backend, rows, rows + more, width, kind, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("floor", [1e-4, 0.05, 3.0])
def test_kernel_and_twin_draw_the_same(floor, dtype):
    """With a floor the choice between softmax and uniform must agree too, with a number that rounding may
    push over the edge: one row may differ.
    """
    if triton_cannot(torch.zeros(1)):
        pytest.skip("Triton neither runs nor is interpreted here")
    torch.manual_seed(0)
    queries, keys = features(70, 32).to(dtype), features(300, 32).to(dtype)
    twin, kernel = (hard_negatives(queries, keys, torch.tensor(0.07), floor=floor, seed=9, first_own_key=100,
                                   backend=b) for b in BACKENDS)
    assert (twin != kernel).sum() <= 1


@pytest.mark.parametrize("slice_elements", [1, 500, 10_000])
def test_the_size_of_slices_changes_no_draw(monkeypatch, slice_elements):
    torch.manual_seed(0)
    queries, keys, t = features(9, 16), features(203, 16), torch.tensor(0.1)
    whole = hard_negatives(queries, keys, t, floor=1e-3, seed=4)
    monkeypatch.setattr(op, "SLICE_ELEMENTS", slice_elements)
    assert torch.equal(hard_negatives(queries, keys, t, floor=1e-3, seed=4), whole)


@pytest.mark.parametrize("units", [1, 7, 400])
def test_the_number_of_shares_changes_no_draw(monkeypatch, units):
    streaming = pytest.importorskip("blip_kernels.gpu.streaming")
    torch.manual_seed(0)
    queries, keys, t = features(9, 16), features(403, 16), torch.tensor(0.1)
    want = hard_negatives(queries, keys, t, floor=1e-3, seed=4, backend="triton")
    monkeypatch.setattr(streaming, "MULTIPROCESSOR_COUNTS", {80: units})
    assert torch.equal(hard_negatives(queries, keys, t, floor=1e-3, seed=4, backend="triton"), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_inputs(backend):
    torch.manual_seed(0)
    queries, keys, t = features(7, 16), features(30, 16), torch.tensor(0.1)
    strided = [x.T.contiguous().T for x in (queries, keys)]
    assert not strided[0].is_contiguous()
    assert torch.equal(hard_negatives(*strided, t, seed=4, backend=backend),
                       hard_negatives(queries, keys, t, seed=4, backend=backend))


def test_the_default_seed_follows_pytorchs():
    queries, keys, t = features(50, 8), features(60, 8), torch.tensor(0.5)
    torch.manual_seed(7)
    first, second = hard_negatives(queries, keys, t), hard_negatives(queries, keys, t)
    torch.manual_seed(7)
    assert torch.equal(hard_negatives(queries, keys, t), first)
    assert not torch.equal(first, second)


def test_no_gradient():
    queries = features(5, 8).requires_grad_()
    assert not hard_negatives(queries, features(6, 8), torch.tensor(0.1, requires_grad=True),
                              seed=0).requires_grad


def test_philox_known_words():
    """A fixed point of the stream: recorded runs stay repeatable from version to version."""
    assert ROUNDS == 7
    words = philox(2**40 + 7, torch.tensor(3), torch.tensor(5), torch.tensor(1))
    assert [int(w) for w in words] == [1496962169, 3014299036, 2830601816, 573463789]


@pytest.mark.parametrize("kind", ["pair", "id"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_registration(backend, kind):
    torch.manual_seed(0)
    ids = torch.arange(4) if kind == "id" else None
    torch.library.opcheck(op._hard_negatives, (features(4, 16), features(4, 16), torch.tensor([0.1]), 1e-4, 5,
                                               1, ids, ids, 0, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend):
    def draw(queries, keys, t):
        return hard_negatives(queries * 1.0, keys, t, floor=1e-4, seed=3, backend=backend) + 0

    inputs = features(6, 16), features(9, 16), torch.tensor(0.1)
    assert torch.equal(torch.compile(draw, fullgraph=True, backend="aot_eager")(*inputs), draw(*inputs))


def faulty_calls():
    q, t = torch.randn(4, 8), torch.tensor(0.1)
    ids = torch.arange(4)
    yield "queries must be floating", (q[0], q, t), {}
    yield "keys must be \\[any, 8\\]", (q, q[:, :7], t), {}
    yield "keys must be torch.float32", (q, q.half(), t), {}
    yield "temperature must be one", (q, q, torch.ones(2)), {}
    yield "temperature must be one floating element on cpu", (q, q, t.to("meta")), {}
    yield "first_own_key 1 with 4 rows", (q, q, t), {"first_own_key": 1}
    yield "ids exclude each other", (q, q, t), {"first_own_key": 1, "ids": ids}
    yield "key_ids need ids", (q, q, t), {"key_ids": ids}
    yield "key_ids must be int64 \\[3\\]", (q, q[:3], t), {"ids": ids}
    yield "floor must be at least 0", (q, q, t), {"floor": -1e-4}
    yield "seed lie in", (q, q, t), {"seed": -1}
    yield "seed lie in", (q, q, t), {"seed": 2**63}
    yield "stream in", (q, q, t), {"stream": 2**31}
    yield "backend 'fast' is not known", (q, q, t), {"backend": "fast"}
    wide = torch.randn(4, 257)
    yield "features up to 256 wide", (wide, wide, t), {"backend": "triton"}


@pytest.mark.parametrize(("message", "arguments", "options"), list(faulty_calls()),
                         ids=lambda x: re.sub(r"\W+", " ", x) if isinstance(x, str) else "")
def test_bad_input_is_named(message, arguments, options):
    if options.get("backend") == "triton" and triton_cannot(arguments[0]):
        pytest.skip("Triton neither runs nor is interpreted here")
    with pytest.raises(ValueError, match=message):
        hard_negatives(*arguments, **options)
