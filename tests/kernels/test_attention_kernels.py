"""Triton's attention, interpreted on the CPU where there is no GPU: against the formula per segment in
float64, and against its eager twin, whose dropout draws the same weights.

Tolerances: float32 kernels accumulate in another order than the formula: 2e-6 forward, as PyTorch's own
attention in test_attention.py; gradients, sums of up to 130 products of size 5 that may cancel, 1e-5. float16
rounds what the products read, the weights and the results to 11 bits: 2⁻¹¹ of values of size 1 to 4, three
roundings deep.
"""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from blip_kernels import attention
from blip_kernels.backends import ATTENTION_VARIABLE, attention_backend
from blip_kernels.cpu import block_attention
from blip_kernels.random import ROUNDS, philox
from hypothesis import given, settings
from hypothesis import strategies as st
from textbook_attention import offsets_of, textbook

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCES = {torch.float32: (2e-6, 1e-5), torch.float16: (3e-3, 6e-3)}
# Empty, one token, around the tile sizes 16 to 128, not their multiples, and images of 37 to 577 tokens.
LENGTH = st.sampled_from([0, 1, 2, 13, 16, 17, 31, 37, 64, 65, 127, 130])


def inputs(q_lengths, kv_lengths, heads, head_dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(q_lengths), heads, head_dim)] + [(sum(kv_lengths), heads, head_dim)] * 2
    return [torch.randn(s, generator=generator).to(DEVICE, dtype).requires_grad_() for s in shapes]


def check(q_lengths, kv_lengths, heads, head_dim, causal, dtype, seed=0):
    ours = inputs(q_lengths, kv_lengths, heads, head_dim, dtype, seed)
    exact = [x.detach().cpu().double().requires_grad_() for x in ours]
    offsets = [offsets_of(lengths).to(DEVICE) for lengths in (q_lengths, kv_lengths)]
    out = attention(*ours, *offsets, causal=causal, backend="triton")
    expected = textbook(*exact, q_lengths, kv_lengths, causal)
    forward, backward = TOLERANCES[dtype]
    torch.testing.assert_close(out.cpu().double(), expected, atol=forward, rtol=forward)
    # A gradient that is not contiguous, as a transposed layer hands it up.
    upstream = torch.randn(head_dim, heads, sum(q_lengths)).permute(2, 1, 0)
    out.backward(upstream.to(DEVICE, dtype))
    if not expected.requires_grad:
        assert all(x.grad.abs().sum() == 0 for x in ours)
        return
    expected.backward(upstream.to(dtype).double())
    for name, a, b in zip("qkv", ours, exact, strict=True):
        want = torch.zeros_like(b) if b.grad is None else b.grad
        torch.testing.assert_close(a.grad.cpu().double(), want, atol=backward, rtol=backward,
                                   msg=lambda m, n=name: f"d{n}: {m}")


@settings(max_examples=8, deadline=None)
@given(lengths=st.lists(st.tuples(LENGTH, LENGTH), min_size=1, max_size=4),
       head_dim=st.sampled_from([32, 64, 128]), causal=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.float16]), seed=st.integers(0, 99))
def test_equals_the_formula(lengths, head_dim, causal, dtype, seed):
    check([n for n, _ in lengths], [m for _, m in lengths], 2, head_dim, causal, dtype, seed)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.tuples(st.integers(0, 150), st.integers(0, 901)), min_size=1, max_size=4),
       head_dim=st.sampled_from([32, 64, 128]), causal=st.booleans(),
       dtype=st.sampled_from([torch.float32, torch.float16]), seed=st.integers(0, 99))
def test_equals_the_formula_up_to_901_keys(lengths, head_dim, causal, dtype, seed):
    check([n for n, _ in lengths], [m for _, m in lengths], 1, head_dim, causal, dtype, seed)


@pytest.mark.parametrize(("q_lengths", "kv_lengths"), [([577], [577]), ([40, 3], [577, 197]), ([300], [5])],
                         ids=["image", "texts-of-images", "many-queries"])
def test_lengths_of_the_model(q_lengths, kv_lengths):
    check(q_lengths, kv_lengths, 1, 64, False, torch.float32)


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU takes its own generation's launches")
@pytest.mark.parametrize(("q_lengths", "kv_lengths", "head_dim", "causal"),
                         [([577], [577], 64, False), ([130, 150], [300, 513], 64, True),
                          ([140], [256], 32, False), ([129], [260], 128, True), ([200], [0], 64, False)],
                         ids=["image", "causal", "whole-tiles", "wide", "no-keys"])
def test_launches_of_the_newest_gpus(monkeypatch, q_lengths, kv_lengths, head_dim, causal):
    """Tiles of 256 keys by descriptors, then masked ones of 64 (their PTX: test_exponentials.py)."""
    from blip_kernels.gpu import attention_kernels as launches

    descriptors = []
    monkeypatch.setattr(launches, "generation", lambda device: 100)
    monkeypatch.setattr(launches, "_descriptor",
                        lambda *args, make=launches._descriptor: descriptors.append(args) or make(*args))
    check(q_lengths, kv_lengths, 2, head_dim, causal, torch.float16)
    assert len(descriptors) == (2 if sum(kv_lengths) else 0)


@pytest.mark.parametrize(("capability", "expected"), [
    ((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100), ((12, 0), 80)])
def test_each_gpu_is_launched_as_its_generation(monkeypatch, capability, expected):
    from blip_kernels.gpu import kernel_launch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert kernel_launch.generation(torch.device("cuda", 0)) == expected


def test_keys_that_a_descriptor_cannot_address_are_copied():
    """Heads with gaps between them, or rows not at multiples of 16 bytes, are copied. The slices of a fused
    projection, as in the model, stay in place."""
    from blip_kernels.gpu.attention_kernels import _heads_in_place

    fused = torch.randn(40, 3, 2, 64, dtype=torch.float16)
    assert _heads_in_place(fused[:, 1]).data_ptr() == fused[:, 1].data_ptr()
    apart = torch.randn(40, 2, 128, dtype=torch.float16)[..., :64]
    odd = torch.randn(40 * 128 + 1, dtype=torch.float16)[1:].view(40, 2, 64)
    wide = torch.randn(40, 2 * 64 + 4, dtype=torch.float16)[:, :128].view(40, 2, 64)
    for x in (apart, odd, wide):
        copy = _heads_in_place(x)
        assert torch.equal(copy, x) and copy.is_contiguous() and copy.data_ptr() % 16 == 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dropout_is_the_twins(dtype, causal):
    """Same seed, same weights dropped: output and gradients agree as closely as without dropout."""
    lengths, offsets = [5, 70, 33], offsets_of([5, 70, 33]).to(DEVICE)
    results = []
    upstream = torch.randn(108, 2, 64, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    for backend in ("triton", "reference"):
        torch.manual_seed(7)
        x = inputs(lengths, lengths, 2, 64, dtype)
        out = attention(*x, offsets, offsets, causal=causal, dropout=0.3, backend=backend)
        results.append([out, *torch.autograd.grad(out, x, upstream)])
    forward, backward = TOLERANCES[dtype]
    for i, (ours, twin) in enumerate(zip(*results, strict=True)):
        torch.testing.assert_close(ours, twin, atol=(backward if i else forward) * 2, rtol=backward)


def test_dropout_keeps_its_share_and_the_mean_and_follows_the_seed():
    q = torch.zeros(64, 8, 32, device=DEVICE)
    v = torch.ones(400, 8, 32, device=DEVICE)
    k, q_offsets, kv_offsets = torch.zeros_like(v), offsets_of([64]).to(DEVICE), offsets_of([400]).to(DEVICE)

    def sums(seed):  # equal weights of ones: the output is the kept share / (1 − dropout)
        torch.manual_seed(seed)
        return attention(q, k, v, q_offsets, kv_offsets, dropout=0.25, backend="triton")[..., 0]

    first = sums(0)
    # 204,800 weights: the share's standard error is 0.001, the mean's after scaling 0.0013.
    assert abs(first.mean().item() - 1.0) < 0.006
    assert abs(first.std().item() - (0.25 / 0.75 / 400) ** 0.5) < 0.004  # rows and heads are independent
    assert torch.equal(first, sums(0)) and not torch.equal(first, sums(1))


def test_philox_is_the_published_generator():
    """Random123's known-answer vectors are for ten rounds. With ten rounds ours gives them, so our seven are the
    first seven of the same generator."""
    from blip_kernels import random

    zero = torch.zeros((), dtype=torch.int64)
    ones = torch.full((), 0xFFFFFFFF)
    assert ROUNDS == 7
    try:
        random.ROUNDS = 10
        words = [int(w) for w in philox(0, zero, zero, zero)]
        # Fourth counter 0 as in this module; the vector of all ones has it set, so it is checked by the
        # words' range.
        assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
        assert all(0 <= int(w) < 2**32 for w in philox(2**63 - 1, ones, ones, ones))
    finally:
        random.ROUNDS = ROUNDS


def test_slices_of_a_fused_projection_are_read_in_place():
    qkv = torch.randn(40, 3, 2, 64, device=DEVICE)
    q, k, v = qkv.unbind(1)
    offsets = offsets_of([17, 23]).to(DEVICE)
    got = attention(q, k, v, offsets, offsets, backend="triton")
    want = attention(q.contiguous(), k.contiguous(), v.contiguous(), offsets, offsets, backend="reference")
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)
    transposed = torch.randn(64, 2, 40, device=DEVICE).permute(2, 1, 0)  # head_dim is not contiguous: copied
    got = attention(transposed, k, v, offsets, offsets, backend="triton")
    torch.testing.assert_close(got, attention(transposed, k, v, offsets, offsets, backend="reference"),
                               atol=2e-6, rtol=2e-6)


def test_a_nan_stays_in_its_segment():
    x = inputs([20, 20], [20, 20], 1, 32, torch.float32)
    with torch.no_grad():
        x[1][3] = float("nan")
    offsets = offsets_of([20, 20]).to(DEVICE)
    out = attention(*x, offsets, offsets, backend="triton")
    assert out[:20].isnan().all() and not out[20:].isnan().any()


def test_gradients_by_finite_differences():
    """The twin in float64, dropout included; the kernels are held to the twin above."""
    x = [t.detach().double().requires_grad_() for t in inputs([3, 4], [5, 2], 2, 4, torch.float32)]
    offsets = [offsets_of([3, 4]).to(DEVICE), offsets_of([5, 2]).to(DEVICE)]

    def run(*qkv):
        torch.manual_seed(3)
        return attention(*qkv, *offsets, causal=True, dropout=0.2, backend="reference")

    assert torch.autograd.gradcheck(run, x)


@pytest.mark.parametrize("triton", [True, False], ids=["triton", "twin"])
def test_the_op_is_well_registered(triton):
    x = inputs([3, 6], [5, 4], 2, 32, torch.float32)
    offsets = [offsets_of([3, 6]).to(DEVICE), offsets_of([5, 4]).to(DEVICE)]
    torch.library.opcheck(torch.ops.blip_kernels.attention, (*x, *offsets, False, 0.0, 0.2, 1, triton))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("backend", ["triton", "reference", None])
def test_a_layer_compiles_whole(backend, dropout):
    """Forward and backward of compiled code equal those of eager code; fullgraph: no graph break."""
    offsets = offsets_of([3, 6]).to(DEVICE)
    x = torch.randn(9, 96, device=DEVICE, requires_grad=True)
    linear = torch.nn.Linear(96, 192).to(DEVICE)

    def layer(x, backend):
        q, k, v = linear(x).view(9, 3, 2, 32).unbind(1)
        return attention(q, k, v, offsets, offsets, causal=True, dropout=dropout, backend=backend).flatten(1)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run, chosen in ((layer, backend or "reference"), (compiled, backend)):
        torch.manual_seed(5)
        out = run(x, chosen)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (x, linear.weight))))
    for eager, whole in zip(*results, strict=True):
        torch.testing.assert_close(whole, eager, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- backends


def test_backends_that_cannot_run_say_why(monkeypatch):
    q = torch.zeros(4, 2, 64)
    for name, why in (("flash_attn", "not installed"), ("xformers", "not installed"),
                      ("nonsense", "not known")):
        with pytest.raises(ValueError, match=why):
            attention_backend(q, name)
    with pytest.raises(ValueError, match=r"heads are 48 wide.*here can run: .*reference"):
        attention_backend(torch.zeros(4, 2, 48, device=DEVICE), "triton")
    with pytest.raises(ValueError, match="float64"):
        attention_backend(torch.zeros(4, 2, 64, dtype=torch.float64, device=DEVICE), "triton")
    monkeypatch.setattr("blip_kernels.gpu.kernel_launch.INTERPRETED", False)
    with pytest.raises(ValueError, match=r"tensors are on a CPU.*here can run: sdpa, sliced, reference"):
        attention_backend(q, "triton")
    assert attention_backend(q) == "sdpa"
    monkeypatch.setenv(ATTENTION_VARIABLE, "reference")
    assert attention_backend(q) == "reference" and attention_backend(q, "sdpa") == "sdpa"


def test_more_rows_than_offsets_can_count_are_refused():
    q = torch.empty(1, 1, 1).expand(2**31, 1, 64)
    k = torch.zeros(3, 1, 64)
    offsets = torch.tensor([0, 2**31 - 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="q_offsets would have to reach 2147483648 rows"):
        attention(q, k, k, offsets, torch.tensor([0, 3], dtype=torch.int32), backend="triton")


@pytest.fixture
def installed_stubs(monkeypatch):
    """Modules with the signatures of flash-attn 2.7 and xFormers 0.0.30 that compute the formula."""
    seen = SimpleNamespace()

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
               softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
               deterministic=False, return_attn_probs=False, block_table=None):
        seen.flash = (max_seqlen_q, max_seqlen_k, dropout_p)
        return attention(q, k, v, cu_seqlens_q, cu_seqlens_k, causal=causal, scale=softmax_scale,
                         backend="reference")

    class BlockDiagonalMask:
        def __init__(self, q_seqlen, kv_seqlen, causal=False):
            self.q_seqlen, self.kv_seqlen, self.causal = q_seqlen, kv_seqlen, causal

        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            return cls(q_seqlen, kv_seqlen)

        def make_causal_from_bottomright(self):
            return BlockDiagonalMask(self.q_seqlen, self.kv_seqlen, True)

    def efficient(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        assert query.shape[0] == 1
        offsets = [offsets_of(lengths) for lengths in (attn_bias.q_seqlen, attn_bias.kv_seqlen)]
        return attention(query[0], key[0], value[0], *offsets, causal=attn_bias.causal, scale=scale,
                         backend="reference")[None]

    flash, xformers, ops = ModuleType("flash_attn"), ModuleType("xformers"), ModuleType("xformers.ops")
    flash.flash_attn_varlen_func = varlen
    ops.memory_efficient_attention = efficient
    ops.fmha = SimpleNamespace(attn_bias=SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask))
    for name, module in (("flash_attn", flash), ("xformers", xformers), ("xformers.ops", ops)):
        monkeypatch.setitem(sys.modules, name, module)
    return seen


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
def test_adapters_hand_segments_over_rightly(installed_stubs, name, causal):
    q, k, v = (x.detach().cpu() for x in inputs([3, 7], [4, 9], 2, 32, torch.float32))
    offsets = offsets_of([3, 7]), offsets_of([4, 9])
    got = block_attention.ADAPTERS[name](q, k, v, *offsets, causal, 0.0, 0.3)
    want = textbook(q.double() * 0.3 * 32**0.5, k.double(), v.double(), [3, 7], [4, 9], causal)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    if name == "flash_attn":
        assert installed_stubs.flash == (7, 9, 0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
def test_installed_backends_agree(name):
    pytest.importorskip(name)
    x = [t.detach() for t in inputs([3, 70], [4, 90], 2, 64, torch.float16)]
    offsets = offsets_of([3, 70]).cuda(), offsets_of([4, 90]).cuda()
    torch.testing.assert_close(attention(*x, *offsets, backend=name),
                               attention(*x, *offsets, backend="reference"), atol=3e-3, rtol=3e-3)
