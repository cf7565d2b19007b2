"""One step of generation, `decode_attention` and `cached_attention`, against the formula in float64: twins
and kernels (in the interpreter)."""

import pytest
import torch
from blip_kernels import attention
from blip_kernels.decode_attention import cached_attention, decode_attention
from hypothesis import given, settings
from hypothesis import strategies as st

BACKENDS = ("reference", "triton")
# float32: sums of up to 200 products, TF32 in three passes in the kernels. 16 bits: weights of at most 1 and
# values of size 3 are rounded to 2⁻¹¹ (float16) or 2⁻⁸ (bfloat16), and so is the result.
TOLERANCE = {torch.float32: {"atol": 3e-6, "rtol": 1e-5}, torch.float16: {"atol": 4e-3, "rtol": 2e-3},
             torch.bfloat16: {"atol": 3e-2, "rtol": 2e-2}}


def int32(lengths):
    return torch.tensor(lengths, dtype=torch.int32)


def one_row(q, k, v, scale):
    """q [heads, head_dim], k and v [keys, heads, head_dim], float64."""
    if len(k) == 0:
        return torch.zeros_like(q)
    weights = torch.softmax(torch.einsum("hd,nhd->hn", q, k) * scale, 1)
    return torch.einsum("hn,nhd->hd", weights, v)


def decode_textbook(q, k, v, lengths, scale):
    each, rows = len(q) // len(lengths), []
    for r in range(len(q)):
        n, segment = lengths[r // each], r // each
        rows.append(one_row(q[r].double(), k[segment, :n].double(), v[segment, :n].double(), scale))
    return torch.stack(rows) if rows else q.double()


def cached_textbook(q, k, v, slots, lengths, scale):
    return torch.stack([one_row(q[r].double(), k[s[:n]].double(), v[s[:n]].double(), scale)
                        for r, (s, n) in enumerate(zip(slots, lengths, strict=True))])


def random(*shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def segments(each, lengths, heads, head_dim, dtype=torch.float32, seed=0, room=None):
    """q, and k and v [segments, room, heads, head_dim] as they lie in the model: a head's keys together,
    layer 1 of the keys and values of all layers. After each length come numbers that must not be seen."""
    q = random(each * len(lengths), heads, head_dim, dtype=dtype, seed=seed)
    kv = random(3, 2, len(lengths), heads, room or max(lengths), head_dim, dtype=dtype, seed=seed + 1)
    for segment, n in enumerate(lengths):
        kv[:, :, segment, :, n:] = 1e4
    return q, *kv[1].transpose(2, 3)


def tensors(rows, keys, heads, head_dim, dtype=torch.float32, seed=0):
    """q, and k and v [keys, heads, head_dim] as they lie in the cache."""
    q = random(rows, heads, head_dim, dtype=dtype, seed=seed)
    return q, *random(2, heads, keys, head_dim, dtype=dtype, seed=seed + 1).transpose(1, 2)


LENGTHS = [[1], [65], [64, 64], [3, 0, 130], [0, 0], [31, 33, 200, 1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_equals_the_formula(backend, lengths, head_dim, dtype):
    for each in (1, 3):
        q, k, v = segments(each, lengths, 2, head_dim, dtype, seed=each, room=max(lengths) + each)
        out = decode_attention(q, k, v, int32(lengths), backend=backend)
        assert out.dtype == dtype and out.shape == q.shape and out.is_contiguous()
        torch.testing.assert_close(out.double(), decode_textbook(q, k, v, lengths, head_dim**-0.5),
                                   **TOLERANCE[dtype])


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 150), min_size=1, max_size=4),
       each=st.sampled_from([1, 2, 5, 16, 17, 64]), heads=st.integers(1, 3), seed=st.integers(0, 99),
       scale=st.sampled_from([0.05, 0.3]))
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_segments(backend, lengths, each, heads, seed, scale):
    q, k, v = segments(each, lengths, heads, 32, seed=seed)
    out = decode_attention(q, k, v, int32(lengths), scale=scale, backend=backend)
    torch.testing.assert_close(out.double(), decode_textbook(q, k, v, lengths, scale),
                               **TOLERANCE[torch.float32])


@pytest.mark.parametrize("programs", [1, 8, 10**6])
def test_the_number_of_splits_changes_nothing(monkeypatch, programs):
    """Keys in one split, in two, in as many as there are tiles; a segment with fewer tiles than splits, and
    an empty one."""
    gpu = pytest.importorskip("blip_kernels.gpu.decode_kernels")
    real, splits = gpu.config, []
    monkeypatch.setattr(gpu, "config",
                        lambda *a: real(*a) | ({"PROGRAMS": programs} if "decode" in a[1] else {}))
    counting = gpu._splits
    monkeypatch.setattr(gpu, "_splits", lambda *a: splits.append(counting(*a)) or splits[-1])
    lengths = [700, 5, 0]
    q, k, v = segments(3, lengths, 1, 32)
    out = decode_attention(q, k, v, int32(lengths), backend="triton")
    torch.testing.assert_close(out.double(), decode_textbook(q, k, v, lengths, 32**-0.5),
                               **TOLERANCE[torch.float32])
    assert splits == [{1: 1, 8: 2, 10**6: 8}[programs]]
    q, k, v = segments(9, [640], 1, 32)
    out = decode_attention(q, k, v, int32([640]), backend="triton")
    torch.testing.assert_close(out.double(), decode_textbook(q, k, v, [640], 32**-0.5),
                               **TOLERANCE[torch.float32])
    assert splits[1:] == [{1: 1, 8: 8, 10**6: 8}[programs]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 97])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cached_equals_the_formula(backend, length, head_dim, dtype):
    q, k, v = tensors(5, 120, 2, head_dim, dtype)
    slots = torch.randint(120, (5, length + 3), generator=torch.Generator().manual_seed(1))[:, :length]
    lengths = int32([length, 1, max(length - 1, 1), length, (length + 1) // 2])
    out = cached_attention(q, k, v, slots, lengths, backend=backend)
    assert out.dtype == dtype and out.shape == q.shape and out.is_contiguous()
    expected = cached_textbook(q, k, v, slots, lengths, head_dim**-0.5)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_reordered_beams_move_indices_alone(backend):
    """A beam that continues another row reads that row's history: the same result from the same cache."""
    q, k, v = tensors(4, 40, 2, 32)
    slots = torch.randperm(40).view(4, 10)
    before = k.clone(), v.clone()
    parents = torch.tensor([2, 2, 0, 3])
    lengths = int32([10, 3, 1, 10])
    moved = cached_attention(q, k, v, slots[parents], lengths, backend=backend)
    apart = cached_attention(q, k[slots[parents].flatten()], v[slots[parents].flatten()],
                             torch.arange(40).view(4, 10), lengths, backend=backend)
    torch.testing.assert_close(moved, apart)
    assert torch.equal(k, before[0]) and torch.equal(v, before[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend):
    """q of a fused projection, different strides of k and v, head_dim not contiguous, transposed tables."""
    q = torch.randn(6, 3, 2, 32)[:, 1]
    k, v = torch.randn(2, 80, 32).transpose(0, 1), torch.randn(80, 32, 2).transpose(1, 2)
    slots = torch.randint(80, (9, 6)).T
    lengths, used = int32([[40, 0], [30, 0]])[:, 0], int32([9, 1, 5, 9, 8, 2])
    k_2, v_2 = k.unflatten(0, (2, 40)), v.unflatten(0, (2, 40))
    torch.testing.assert_close(decode_attention(q, k_2, v_2, lengths, backend=backend).double(),
                               decode_textbook(q, k_2, v_2, [40, 30], 32**-0.5), **TOLERANCE[torch.float32])
    torch.testing.assert_close(cached_attention(q, k, v, slots, used, backend=backend).double(),
                               cached_textbook(q, k, v, slots, used, 32**-0.5), **TOLERANCE[torch.float32])


@pytest.mark.parametrize("lengths", [[50, 50], [20, 71]], ids=str)
def test_twins_in_bfloat16(lengths):
    q, k, v = segments(3, lengths, 2, 64, torch.bfloat16)
    out = decode_attention(q, k, v, int32(lengths))
    torch.testing.assert_close(out.double(), decode_textbook(q, k, v, lengths, 0.125),
                               **TOLERANCE[torch.bfloat16])
    q, k, v = tensors(6, 100, 2, 64, torch.bfloat16)
    slots, lengths = torch.randint(len(k), (6, 13)), int32([13, 1, 2, 7, 12, 13])
    out = cached_attention(q, k, v, slots, lengths)
    expected = cached_textbook(q, k, v, slots, lengths, 0.125)
    torch.testing.assert_close(out.double(), expected, **TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits(backend):
    """Logits of ±1,000: weights go to the largest, nothing overflows."""
    q, k, v = segments(3, [130], 1, 32)
    out = decode_attention(q * 100, k * 100, v, int32([130]), backend=backend)
    # A logit near 1e4 is exact to 1e-3, and so are weights.
    torch.testing.assert_close(out.double(), decode_textbook(q * 100, k * 100, v, [130], 32**-0.5), atol=2e-2,
                               rtol=0)


def test_both_equal_attention_as_the_model_uses_it():
    q, k, v = segments(3, [37, 43], 2, 64)
    rows = torch.arange(3, dtype=torch.int32) * 3
    packed = [torch.cat([x[0, :37], x[1]]) for x in (k, v)]
    torch.testing.assert_close(decode_attention(q, k, v, int32([37, 43])),
                               attention(q, *packed, rows, int32([0, 37, 80])))
    q, k, v = tensors(6, 80, 2, 64)
    slots = torch.randint(80, (6, 11))
    gathered = [x[slots.flatten()] for x in (k, v)]
    each = torch.arange(7, dtype=torch.int32)
    torch.testing.assert_close(cached_attention(q, k, v, slots, int32([11] * 6)),
                               attention(q, *gathered, each, each * 11))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    q, k, v = tensors(0, 10, 2, 32)
    assert decode_attention(q, k[None], v[None], int32([10]), backend=backend).shape == q.shape
    slots = torch.zeros(0, 3, dtype=torch.int64)
    assert cached_attention(q, k, v, slots, int32([]), backend=backend).shape == q.shape


# ------------------------------------------------------------------------------------ registration, compiling


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    q, k, v = segments(3, [20, 30], 2, 32)
    torch.library.opcheck(torch.ops.blip_kernels.decode_attention.default,
                          (q, k, v, int32([20, 30]), 0.2, backend))
    q, k, v = tensors(6, 50, 2, 32)
    torch.library.opcheck(torch.ops.blip_kernels.cached_attention.default,
                          (q, k, v, torch.randint(50, (6, 7)), int32([7, 1, 2, 3, 4, 5]), 0.2, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend):
    @torch.no_grad()
    def step(q, k, v, lengths, slots, used):
        crossed = decode_attention(q * 2, k, v, lengths, backend=backend)
        return cached_attention(crossed, k[0], v[0], slots, used, backend=backend) + 1

    q, k, v = segments(3, [20, 30], 2, 32)
    arguments = q, k, v, int32([20, 30]), torch.randint(30, (6, 7)), int32([7, 1, 2, 3, 4, 5])
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), step(*arguments))


# ----------------------------------------------------------------------------------------------------- errors


def faulty_decodes():
    x, k, ok = torch.randn(4, 2, 32), torch.randn(2, 3, 2, 32), int32([1, 3])
    yield "q must be", (torch.randn(4, 32), k, k, ok), {}
    yield "k and v must be", (x, torch.randn(2, 3, 1, 32), k, ok), {}
    yield r"k and v must be \[segments, keys, heads, head_dim\]", (x, x, x, ok), {}
    yield "share one floating dtype", (x, k.double(), k.double(), ok), {}
    yield r"lengths must be int32 \[2\]", (x, k, k, ok.long()), {}
    yield r"lengths must be int32 \[2\]", (x, k, k, ok[:1]), {}
    yield "lengths must lie in 0 to 3, got 1 to 4", (x, k, k, int32([1, 4])), {}
    yield "lengths must lie in 0 to 3, got -1 to 0", (x, k, k, int32([0, -1])), {}
    yield "q must have the same number of rows", (x[:3], k, k, ok), {}
    yield "at most 64", (torch.randn(130, 2, 32), k, k, ok), {}
    yield "k is on meta", (x, k.to("meta"), k, ok), {}
    yield "lengths is on meta", (x, k, k, ok.to("meta")), {}
    yield "requires grad", (x.clone().requires_grad_(), k, k, ok), {}
    yield "backend 'fast' is not known", (x, k, k, ok), {"backend": "fast"}
    yield "head_dim 48", (torch.randn(4, 2, 48), *[torch.randn(2, 3, 2, 48)] * 2, ok), {"backend": "triton"}
    yield "float64", (x.double(), k.double(), k.double(), ok), {"backend": "triton"}


@pytest.mark.parametrize(("message", "arguments", "options"), list(faulty_decodes()),
                         ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input_of_decode_is_named(message, arguments, options):
    with pytest.raises(ValueError, match=message):
        decode_attention(*arguments, **options)


def faulty_reads():
    x, ok, used = torch.randn(4, 2, 32), torch.zeros(4, 3, dtype=torch.int64), int32([3, 1, 2, 3])
    yield "q must be", (torch.randn(4, 32), x, x, ok, used)
    yield "slots must be int64", (x, x, x, ok.int(), used)
    yield "slots must be int64", (x, x, x, ok[:3], used)
    yield "slots must be int64", (x, x, x, ok[:, :0], used)
    yield "slots must lie in 0 to 3, the rows of k, got 0 to 4", (x, x, x, torch.tensor([[0, 1, 4]] * 4),
                                                                  used)
    yield "slots must lie in 0 to 3, the rows of k, got -1 to 0", (x, x, x, torch.tensor([[0, -1, 0]] * 4),
                                                                   used)
    yield "slots is on meta", (x, x, x, ok.to("meta"), used)
    yield r"lengths must be int32 \[4\]", (x, x, x, ok, used[:3])
    yield "lengths must lie in 1 to 3, got 0 to 3", (x, x, x, ok, int32([0, 3, 3, 3]))
    yield "lengths must lie in 1 to 3, got 1 to 4", (x, x, x, ok, int32([4, 1, 3, 3]))
    yield "requires grad", (x, x.clone().requires_grad_(), x, ok, used)


@pytest.mark.parametrize(("message", "arguments"), list(faulty_reads()),
                         ids=lambda x: x if isinstance(x, str) else "")
def test_bad_input_of_cached_is_named(message, arguments):
    with pytest.raises(ValueError, match=message):
        cached_attention(*arguments)


def test_weights_that_require_grad_pass_without_recording():
    q, k, v = segments(4, [20], 2, 32)
    q.requires_grad_()
    with torch.no_grad():
        assert not decode_attention(q, k, v, int32([20])).requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("each", [1, 2, 3, 5, 8, 16])
def test_wide_sweep(each, head_dim, dtype):
    for lengths in ([577], [901, 577, 1], [197] * 4, [0, 63, 128, 257]):
        q, k, v = segments(each, lengths, 3, head_dim, dtype)
        expected = decode_textbook(q, k, v, lengths, head_dim**-0.5)
        for backend in BACKENDS:
            out = decode_attention(q, k, v, int32(lengths), backend=backend)
            torch.testing.assert_close(out.double(), expected, **TOLERANCE[dtype])
