"""The vision encoder beside transformers' and this machine's matrix products."""

from blip_bench import encode


def test_encoding(side_by_side, checkpoint):
    (case,) = encode.cases(checkpoint("caption"), 2)
    side_by_side(case, 3)
