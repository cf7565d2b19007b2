"""The PTX that computes softmax weights on sm_100, run here instruction by instruction: accuracy, range, NaN.

The interpreter below knows the dozen instructions that the text uses, in float32 and with PTX's rounding (a
fused multiply-add rounds once: float64 holds the product of two float32 exactly, and its sum but for the last
bits).
"""

import re
from typing import Any

import numpy as np
import pytest
from blip_kernels.gpu import exponentials
from blip_kernels.gpu.exponentials import PACK, POLYNOMIAL_PAIRS, pair, weights_ptx

POLYNOMIAL = [2 * i + half for i in POLYNOMIAL_PAIRS for half in (0, 1)]


def run_ptx(text: str, outputs: int, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Registers are float32 arrays, 64-bit ones pairs of them; $0, $1, … outputs, then inputs."""
    registers: dict[str, Any] = {f"${outputs + i}": x.astype(np.float32) for i, x in enumerate(inputs)}

    def value(name):
        if name.startswith("0f"):
            return np.array(int(name[2:], 16), np.uint32).view(np.float32)
        return np.array(int(name), np.int32) if name.isdigit() else registers[name]

    def each(function, *operands):
        if isinstance(operands[0], tuple):
            return tuple(each(function, *halves) for halves in zip(*operands, strict=True))
        with np.errstate(all="ignore"):
            return function(*operands)

    def bits(x):
        return x if x.dtype == np.int32 else x.view(np.int32)

    functions = {
        "fma.rn": lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32),
        "add.rn": np.add, "sub.rn": np.subtract, "mul.rn": np.multiply,
        "ex2.approx": lambda x: np.exp2(x.astype(np.float64)).astype(np.float32),
        "max.NaN": np.maximum,
        "shl.b32": lambda x, n: bits(x) << n,
        "add.s32": lambda a, b: (bits(a) + bits(b)).view(np.float32),
    }
    for line in re.findall(r"[^;{}\s][^;]*;", text.strip()[1:-1]):
        opcode, rest = line.rstrip(";").split(maxsplit=1)
        if opcode == ".reg":
            continue
        target, source = re.fullmatch(r"(\{.*?\}|[^,{]+),\s*(.*)", rest).groups()
        if opcode == "mov.b64" and source.startswith("{"):
            registers[target] = tuple(value(name) for name in re.split(r",\s*", source.strip("{}")))
        elif opcode == "mov.b64":
            registers.update(zip(re.split(r",\s*", target.strip("{}")), value(source), strict=True))
        else:
            function = functions[".".join(opcode.split(".")[:2])]
            registers[target] = each(function, *(value(name) for name in re.split(r",\s*", source)))
    return [registers[f"${i}"] for i in range(outputs)]


def weights(logits, scale, reference):
    """What the PTX makes of logits [n], one column of PACK at a time: [PACK, n]."""
    full = np.full_like(logits, scale), np.full_like(logits, -reference)
    return np.stack(run_ptx(weights_ptx(), PACK, [logits] * PACK + [full[0]] * PACK + [full[1]] * PACK))


@pytest.mark.parametrize(("scale", "reference"), [(1.0, 0.0), (0.18033688, 3.7), (0.7, -41.25), (0.01, 5e6)])
def test_weights_are_powers_of_two(scale, reference):
    """Relative to the float32 exponent: 1.02e-4 for the cubic, 6e-8 × 2 for the MUFU's replacement here."""
    logits = np.concatenate([np.linspace(reference - 125.9, reference, 20_001),
                             [reference]]) / np.float32(scale)
    logits = logits.astype(np.float32)
    exponent = (logits.astype(np.float64) * np.float32(scale) - np.float32(reference)).astype(np.float32)
    exact = np.exp2(exponent.astype(np.float64))
    error = np.abs(weights(logits, np.float32(scale), np.float32(reference)) / exact - 1).max(axis=1)
    assert (error[POLYNOMIAL] < 1.02e-4).all() and (error[POLYNOMIAL] > 1e-5).all()
    assert (np.delete(error, POLYNOMIAL) < 1.3e-7).all()


def test_a_third_of_the_weights_is_polynomial():
    text = weights_ptx()
    assert text.count("ex2.approx") == PACK - len(POLYNOMIAL) == 22
    assert text.count("shl.b32") == len(POLYNOMIAL)


def test_the_largest_logit_weighs_one_and_the_vanishing_vanish():
    logits = np.array([0, -126, -127, -200, -1e4, -3e38, -np.inf], np.float32)
    found = weights(logits, np.float32(1), np.float32(0))
    np.testing.assert_allclose(found[:, 0], 1, rtol=2e-7)
    assert (np.abs(found[:, 1:]) <= 1.2e-38).all() and (found >= 0).all()


def test_what_is_not_finite_does_not_come_out_small():
    """A NaN logit, and a logit of +∞ (which is then the reference): NaN, or too large for a 16-bit weight."""
    found = np.concatenate([weights(np.array([np.nan], np.float32), np.float32(1), np.float32(2)),
                            weights(np.array([np.inf], np.float32), np.float32(1), np.float32(np.inf))])
    assert (np.isnan(found) | (found >= 3.4e38)).all()


@pytest.mark.parametrize(("operation", "exact"), [("add", np.add), ("mul", np.multiply)])
def test_pairs(operation, exact):
    a, b, c, d = (np.random.default_rng(i).standard_normal(100).astype(np.float32) for i in range(4))
    found = run_ptx(pair(operation), 2, [a, b, c, d])
    np.testing.assert_array_equal(found, [exact(a, c), exact(b, d)])


def test_a_cubic_adds_nothing_to_float16s_rounding_of_the_weights():
    """Attention of 577 keys with float16 weights: the error against float64 grows by less than a twentieth."""
    rng = np.random.default_rng(0)
    logits, v = rng.standard_normal((512, 577)).astype(np.float32) * 2, rng.standard_normal((577, 64))
    reference = logits.max(axis=1, keepdims=True)
    exact = np.exp2(logits.astype(np.float64) - reference)
    column = np.arange(577) % PACK
    stacked = weights((logits - reference).ravel(), np.float32(1), np.float32(0)).reshape(PACK, *logits.shape)
    ours = np.take_along_axis(stacked, np.broadcast_to(column, logits.shape)[None], axis=0)[0]

    def error(weight):
        out = weight.astype(np.float16).astype(np.float64) @ v / weight.sum(axis=1, keepdims=True)
        return np.sqrt(np.mean((out - exact @ v / exact.sum(axis=1, keepdims=True)) ** 2))

    assert error(ours) < 1.05 * error(exact.astype(np.float32))


def test_the_cubic_is_the_best_of_its_kind():
    """Three free coefficients, of f, f² and f³: error / f reaches its extreme, 1.013e-4, four times."""
    c = np.array(exponentials.CUBIC, np.uint32).view(np.float32).astype(np.float64)
    f = np.linspace(-0.5, 0.5, 100_000)  # without 0, where the error is 0
    error = (c[0] + f * (c[1] + f * (c[2] + f * c[3]))) / np.exp2(f) - 1
    sign = np.sign(error / f)
    parts = np.split(error, np.flatnonzero(np.diff(sign)) + 1)
    extremes = np.array([np.abs(part).max() for part in parts])
    assert len(parts) == 4
    np.testing.assert_allclose(extremes, 1.0129e-4, rtol=1e-3)
