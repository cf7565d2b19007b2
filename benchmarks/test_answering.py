"""Ranking 1,000 answers, 128 in full, compared with the published loop, in bfloat16."""

import pytest
from blip_bench.cases import vqa
from blip_bench.timing import Case


@pytest.fixture(scope="module")
def by_name(checkpoint) -> dict[str, Case]:
    cases = vqa.cases(checkpoint("answer"), 2, ["bfloat16"])
    return {case.name: case for case in (next(cases), next(cases))}


@pytest.mark.parametrize("start", ["from encoded questions", "from pictures"])
def test_answering(side_by_side, by_name, start):
    side_by_side(by_name[f"{start}, bfloat16"], 2)
