"""The vision encoder compared with transformers', the other peers' and this machine's matrix products."""

from blip_bench.cases import encode


def test_encoding(side_by_side, checkpoint, dtypes, peers):
    (case,) = encode.cases(checkpoint("caption"), 2, dtypes, peers)
    side_by_side(case, 3)
