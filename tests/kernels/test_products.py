"""Which library multiplies, and 16-bit products on a CPU that has none."""

import pytest
import torch
import torch.nn.functional as F
from blip_kernels import attention, linear, pack_weight, packed_linear
from blip_kernels.cpu import processor, products


@pytest.fixture
def without_bfloat16(monkeypatch):
    """As on a processor without products of bfloat16."""
    for name in ("has_bfloat16", "has_amx"):
        monkeypatch.setattr(processor, name, lambda: False)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


@pytest.mark.parametrize(("mkl", "intel", "vectors", "wanted"),
                         [(True, True, "avx512", True), (True, True, "avx2", True),
                          (True, True, "sse", False), (True, False, "avx2", True),
                          (True, False, "avx512", False), (False, True, "avx2", False)])
def test_who_multiplies_float32(monkeypatch, mkl, intel, vectors, wanted):
    """MKL, except on AMD with AVX-512, below AVX2, and if PyTorch has no MKL."""
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(processor, "is_intel", lambda: intel)
    monkeypatch.setattr(processor, "has_avx512", lambda: vectors == "avx512")
    monkeypatch.setattr(processor, "has_avx2", lambda: vectors != "sse")
    assert products.prefers_mkl() is wanted


@pytest.mark.parametrize("library", ["mkl", "onednn"])
def test_float32_by_either_library(monkeypatch, library):
    """Training's products and packed ones, held to float64."""
    if library == "mkl" and not torch.backends.mkl.is_available():
        pytest.skip("this PyTorch was built without MKL")
    monkeypatch.setattr(products, "prefers_mkl", lambda: library == "mkl")
    x, weight, bias = draw(37, 64).float(), draw(48, 64).float(), draw(48).float()
    packed = pack_weight(weight)
    assert packed.library == library and torch.equal(packed.to_dense(), weight)
    exact = F.linear(x.double(), weight.double(), bias.double())
    for found in (products.linear_product(x, weight, bias), packed_linear(x, packed, bias)):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-4)


def test_slow_products_are_float32s_rounded_once(without_bfloat16):
    """The nearest bfloat16 of the float32 result: what hardware with products of bfloat16 gives."""
    x, weight, bias = draw(9, 64), draw(48, 64), draw(48)
    wanted = F.linear(x.float(), weight.float(), bias.float()).bfloat16()
    assert products.is_slow(x) and not products.is_slow(x.float())
    assert torch.equal(products.matmul(x, weight.t()), (x.float() @ weight.float().t()).bfloat16())
    for found in (products.linear_product(x, weight, bias), packed_linear(x, pack_weight(weight), bias)):
        torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-9)
    assert torch.equal(pack_weight(weight).to_dense(), weight)


def test_slow_types_have_gradients(without_bfloat16):
    """Linear layers and attention in bfloat16, as training takes them, held to float64."""
    operands = [draw(9, 64).requires_grad_(), draw(48, 64).requires_grad_(), draw(48).requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in operands]
    found = torch.autograd.grad(linear(*operands).float().square().sum(), operands)
    for mine, theirs in zip(found, torch.autograd.grad(F.linear(*exact).square().sum(), exact), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-2, atol=2e-2 * float(theirs.abs().max()))
    q, k, v = (draw(n, 2, 16).requires_grad_() for n in (6, 10, 10))
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32), torch.tensor([0, 3, 10], dtype=torch.int32)
    mine = attention(q, k, v, *offsets)
    theirs = attention(q.double(), k.double(), v.double(), *offsets, backend="reference")
    assert mine.dtype == torch.bfloat16
    torch.testing.assert_close(mine.double(), theirs, rtol=2e-2, atol=2e-2)
    for a, b in zip(torch.autograd.grad(mine.float().sum(), (q, v)),
                    torch.autograd.grad(theirs.sum(), (q, v)), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
