"""`blip_kernels.linear`: F.linear's values and gradients, and what its backward keeps."""

import pytest
import torch
import torch.nn.functional as F
from blip_kernels import linear
from torch import Tensor, nn

from blip_fast.model.linear_layer import Linear, layer_after

SHAPES = [(1, 7, 5), (3, 64, 48), (130, 33, 1), (2000, 24, 40)]  # rows, in, out; the last packs its weight


def make(rows: int, width: int, out: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_()
            for shape in ((rows, width), (out, width), (out,))]


def gradients(function, operands: list[Tensor]) -> list[Tensor]:
    out = function(*operands)
    return [out, *torch.autograd.grad((out.float() * torch.arange(out.numel()).view(out.shape).cos()).sum(),
                                      operands)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2),
                                                  (torch.float64, 1e-12), (torch.float16, 5e-3)])
def test_values_and_gradients(shape, dtype, tolerance):
    """Against float64: each within its type's rounding of the largest value, or of a small sum's terms."""
    operands = make(*shape, dtype)
    exact = gradients(F.linear, [x.detach().double().requires_grad_() for x in operands])
    for ours, theirs in zip(gradients(linear, operands), exact, strict=True):
        assert ours.dtype == dtype
        assert (ours.double()
                - theirs).abs().max() <= tolerance * theirs.abs().max().clamp(min=len(operands[0]) ** 0.5)


@pytest.mark.parametrize("bias", [True, False])
def test_under_autocast_weights_stay_float32(bias):
    x, weight, b = make(1030, 24, 40)
    operands = [x, weight, b][: 2 + bias]
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (gradients(function, operands) for function in (linear, F.linear))
    assert ours[0].dtype == torch.bfloat16
    for mine, plain in zip(ours, theirs, strict=True):
        assert mine.dtype == plain.dtype
        assert (mine - plain).abs().max() <= 1e-2 * plain.abs().max()


def test_any_shape_and_no_rows():
    x, weight, bias = make(6, 7, 5)
    torch.testing.assert_close(linear(x.view(2, 3, 7), weight, bias), F.linear(x.view(2, 3, 7), weight, bias))
    empty = torch.zeros(0, 7, requires_grad=True)
    out = linear(empty, weight, bias)
    out.sum().backward()
    assert out.shape == (0, 5) and weight.grad is not None and not weight.grad.any()


def test_dtypes_that_do_not_fit():
    x, weight, bias = make(2, 3, 4)
    with pytest.raises(ValueError, match=r"weight is torch\.float32, x torch\.bfloat16: cast one"):
        linear(x.bfloat16(), weight, bias)


@pytest.mark.parametrize("autocast", [False, True])
def test_after_a_norm_only_its_input_is_saved(autocast):
    """layer(norm(x)): the same gradients, and of the saved tensors none is norm(x)."""
    norm, layer = nn.LayerNorm(16), Linear(16, 32)
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    operands = [x, layer.weight, layer.bias, norm.weight, norm.bias]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            ours = layer_after(norm, layer, x)
        theirs = layer(norm(x))
        normed = norm(x).to(ours.dtype)
    for mine, plain in zip(torch.autograd.grad(ours.float().square().sum(), operands),
                           torch.autograd.grad(theirs.float().square().sum(), operands), strict=True):
        torch.testing.assert_close(mine, plain)
    assert any(tensor is x for tensor in saved)
    assert not any(t.shape == normed.shape and t.dtype == normed.dtype and torch.equal(t, normed)
                   for t in saved)
