"""Packed linear layers: F.linear's results, a row's bits for any number of rows, and a whole model of them."""

import pytest
import torch
import torch.nn.functional as F
from blip_kernels import pack_weight, packed_linear, packing_cannot, row_blocks

DTYPES = [torch.float32, torch.bfloat16]


def layer(rows, width, out, dtype):
    generator = torch.Generator().manual_seed(rows + width)
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in
                       ((rows, width), (out, width), (out,)))
    return x, weight / width**0.5, bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width", "out"),
                         [(577, 768, 96), (33, 50, 70), (1, 96, 2), (7, 3, 1), (0, 16, 8)])
def test_equals_float64(rows, width, out, dtype):
    """Against float64: as close as the type's rounding allows, with and without bias, with GELU."""
    x, weight, bias = layer(rows, width, out, dtype)
    packed = pack_weight(weight)
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3  # bfloat16 rounds the result to 8 bits
    exact = F.linear(x.double(), weight.double())
    for found, wanted in (
        (packed_linear(x, packed), exact),
        (packed_linear(x, packed, bias), exact + bias.double()),
        (packed_linear(x, packed, bias, gelu=True), F.gelu(exact + bias.double())),
    ):
        assert found.dtype == dtype and found.shape == (rows, out)
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.processor
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("width", "out"),
                         [(768, 3072), (3072, 768), (48, 144), (128, 512), (100, 48), (64, 30)])
def test_rows_do_not_depend_on_their_number(width, out, dtype, threads):
    """F.linear in float32 gives one row other bits alone than in a batch; so does AMX in bfloat16."""
    x, weight, bias = layer(300, width, out, dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        packed = pack_weight(weight)
        together = packed_linear(x, packed, bias)
        for rows in (1, 2, 3, 5, 7, 16, 24, 33, 64, 127, 130, 257):
            assert torch.equal(packed_linear(x[:rows], packed, bias), together[:rows]), rows
        assert torch.equal(packed_linear(x[77], packed, bias), together[77])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_of_rows(dtype):
    """Rows in blocks of another size: the same values, and a whole block gives the same bits alone."""
    x, weight, bias = layer(84, 96, 64, dtype)
    packed = pack_weight(weight)
    with row_blocks(21):
        together = packed_linear(x, packed, bias)
        assert torch.equal(packed_linear(x[:21], packed, bias), together[:21])
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    torch.testing.assert_close(together.double(), F.linear(x.double(), weight.double(), bias.double()),
                               rtol=tolerance, atol=tolerance)


def test_shapes_and_strides():
    x, weight, bias = layer(30, 64, 24, torch.float32)
    packed = pack_weight(weight)
    found = packed_linear(x.view(2, 15, 64).transpose(0, 1), packed, bias)
    torch.testing.assert_close(found, F.linear(x, weight, bias).view(2, 15, 24).transpose(0, 1), rtol=1e-5,
                               atol=1e-5)
    torch.testing.assert_close(packed_linear(x[:, ::2], pack_weight(weight[:, ::2])),
                               x[:, ::2] @ weight[:, ::2].T, rtol=1e-5, atol=1e-5)


def test_the_weight_comes_back():
    weight = torch.randn(50, 70)
    assert torch.equal(pack_weight(weight).to_dense(), weight)


def test_errors():
    x, weight, bias = layer(4, 16, 8, torch.float32)
    packed = pack_weight(weight)
    assert "float16" in packing_cannot(weight.half())
    assert "CPU" in packing_cannot(weight.to("meta"))
    for wrong, message in (
        (lambda: pack_weight(weight.half()), "cannot be packed"),
        (lambda: pack_weight(bias), r"\[out, in\]"),
        (lambda: packed_linear(x, weight), "pack_weight"),
        (lambda: packed_linear(x[:, :15], packed), "x must be"),
        (lambda: packed_linear(x.bfloat16(), packed), "x must be"),
        (lambda: packed_linear(x, packed, bias[:7]), "bias must be"),
        (lambda: packed_linear(x.requires_grad_(), packed), "no gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
