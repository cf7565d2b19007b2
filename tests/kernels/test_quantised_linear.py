"""Linear layers in 8 bits: close to float64, and a row's bits do not depend on its neighbours."""

import pytest
import torch
import torch.nn.functional as F
from blip_kernels import quantise_weight, quantised_linear, row_blocks
from blip_kernels.cpu import processor


def layer(rows, width, out, dtype):
    generator = torch.Generator().manual_seed(rows + out)
    x, weight, bias = (torch.randn(shape, generator=generator)
                       for shape in ((rows, width), (out, width), (out,)))
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def test_a_processor_without_products_is_refused(monkeypatch):
    monkeypatch.setattr(processor, "has_int8", lambda: False)
    with pytest.raises(ValueError, match="VNNI or AMX"):
        quantise_weight(torch.randn(4, 4))


class TestWithProducts:
    pytestmark = pytest.mark.skipif(not processor.has_int8(),
                                    reason="this processor multiplies no 8-bit integers")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("gelu", [False, True])
    @pytest.mark.parametrize("one_input", [False, True])
    def test_is_near_float64(self, dtype, gelu, one_input):
        """Rounding of both operands to 127 steps of their largest: 1 % of the result's size."""
        x, weight, bias = layer(40, 64, 96, dtype)
        exact = F.linear(x.double(), weight.double(), bias.double())
        exact = F.gelu(exact) if gelu else exact
        with row_blocks(40, one_input):
            found = quantised_linear(x, quantise_weight(weight), bias, gelu=gelu)
        assert found.dtype == dtype
        assert float((found.double() - exact).norm() / exact.norm()) < 0.015

    def test_the_weight_comes_back(self):
        """Each within half a step, and exactly what is multiplied."""
        _, weight, _ = layer(1, 64, 96, torch.float32)
        packed = quantise_weight(weight)
        step = weight.abs().amax(1, keepdim=True) / 127
        assert bool(((packed.to_dense() - weight).abs() <= 0.51 * step).all())
        assert torch.equal(quantise_weight(packed.to_dense()).to_dense(), packed.to_dense())

    def test_rows_do_not_depend_on_their_number(self):
        """Not even on one that is a thousand times larger."""
        x, weight, bias = layer(130, 768, 96, torch.bfloat16)
        x[100] *= 1000
        packed = quantise_weight(weight)
        together = quantised_linear(x, packed, bias)
        for rows in (1, 2, 3, 24, 33, 128):
            assert torch.equal(quantised_linear(x[:rows], packed, bias), together[:rows]), rows

    def test_zeros(self):
        _, weight, bias = layer(3, 16, 32, torch.float32)
        torch.testing.assert_close(quantised_linear(torch.zeros(3, 16), quantise_weight(weight), bias),
                                   bias.expand(3, -1))

    @pytest.mark.parametrize(("x", "bias", "message"), [
        (torch.zeros(3, 15), None, r"x must be torch.float32 \[..., 16\]"),
        (torch.zeros(3, 16, dtype=torch.bfloat16), None, "x must be torch.float32"),
        (torch.zeros(3, 16), torch.zeros(31), r"bias must be torch.float32 \[32\]"),
        (torch.zeros(3, 16, requires_grad=True), None, "no gradient"),
    ])
    def test_what_does_not_fit_is_refused(self, x, bias, message):
        with pytest.raises(ValueError, match=message):
            quantised_linear(x, quantise_weight(torch.ones(32, 16)), bias)
