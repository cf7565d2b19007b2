"""VQA's accuracy and its normalisation of answers, in cases worked out by hand."""

from itertools import combinations

import pytest

from blip_fast.metrics.vqa import commonest_answer, normalised_answer, vqa_accuracy


@pytest.mark.parametrize(("answer", "expected"), [
    # articles, case, spaces
    ("A dog", "dog"), ("the man and an umbrella", "man and umbrella"), ("THE END", "end"), ("a", ""),
    ("", ""), ("\tred\nball  ", "red ball"), ("theatre", "theatre"),
    # numbers
    ("two dogs", "2 dogs"), ("None", "0"), ("zero", "0"), ("ten", "10"), ("eleven", "eleven"),
    ("twenty one", "twenty 1"), ("someone", "someone"), ("3", "3"),
    # contractions
    ("dont", "don't"), ("it isnt", "it isn't"), ("couldntve", "couldntve"), ("couldn'tve", "couldn't've"),
    ("couldnt've", "couldn't've"), ("oclock", "o'clock"), ("Yall'll", "y'all'll"), ("twas", "'twas"),
    ("shed", "shed"), ("wed", "wed"), ("its", "its"), ("ill", "ill"), ("Im", "im"),
    ("somebody'd", "somebodyd"), ("dog's", "dog's"),
    # punctuation: a space between letters, nothing if the mark is next to a space; apostrophes and colons
    # stay
    ("black/white", "black white"), ("black / white", "black white"), ("t-shirt", "t shirt"),
    ("t-shirt -", "tshirt"), ("yes!", "yes"), ("yes, it is", "yes it is"), ("(left)", "left"),
    ("5:30", "5:30"), ("'hi'", "'hi'"), ("$5", "$5"),
    # points and thousands
    ("3.5", "3.5"), ("st. louis", "st louis"), ("p.m.", "pm"), (".5", ".5"), ("5.", "5"), ("1,000", "1000"),
    ("1,000-2,000", "10002000"), ("u.s.a.", "usa"),
    # one after the other
    ("The two T-shirts, dont", "2 t shirts don't"), ("a-one", "1"),
])
def test_normalisation(answer, expected):
    assert normalised_answer(answer) == expected


@pytest.mark.parametrize(("equal", "expected"),
                         [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0), (10, 1.0)])
def test_accuracy_by_the_number_of_equal_answers(equal, expected):
    """With three equal answers, seven of the ten subsets of nine hold all three (1) and three hold two (2/3):
    (7 + 2) / 10."""
    votes = ["Red"] * equal + [f"other {i}" for i in range(10 - equal)]
    assert vqa_accuracy("the red", votes) == pytest.approx(expected)
    subsets = list(combinations(["red"] * equal + ["no"] * (10 - equal), 9))
    assert vqa_accuracy("red", votes) == pytest.approx(sum(min(1, s.count("red") / 3) for s in subsets)
                                                       / len(subsets))


def test_answers_are_equal_when_normalised_whoever_gave_them():
    votes = ["2", "two", "The two", "2.", "a 2", "three", "three", "dont know", "none", "2-3"]
    assert vqa_accuracy("Two!", votes) == 1
    assert vqa_accuracy("3", votes) == pytest.approx(0.6)
    assert vqa_accuracy("don't know", votes) == pytest.approx(0.3)
    assert vqa_accuracy("zero", votes) == pytest.approx(0.3)
    assert vqa_accuracy("", votes) == 0
    assert vqa_accuracy("none", ["none"] * 10) == vqa_accuracy("0", ["none"] * 10) == 1


def test_the_commonest_answer():
    assert commonest_answer(["Three", "two", "the two", "3", "2"]) == "2"
    assert commonest_answer(["red", "blue"]) == "red"


@pytest.mark.parametrize("votes", [[], ["red"], ["red"] * 9, ["red"] * 11])
def test_other_than_ten_answers_are_refused(votes):
    with pytest.raises(ValueError, match=f"10 human answers a question, got {len(votes)}"):
        vqa_accuracy("red", votes)
    if not votes:
        with pytest.raises(ValueError, match="nobody answered"):
            commonest_answer(votes)
