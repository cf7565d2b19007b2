"""The official accuracy of visual question answering, with its normalisation of answers (visualqa.org/evaluation)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

VOTES = 10  # people who answered each question
AGREEING = 3  # of them that make an answer right
NUMBERS = {word: str(i) for i, word in enumerate(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))}
NUMBERS["none"] = "0"
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Words are known by these with one of their apostrophes missing. What is another word then (shed, wed, ill, its) is not
# among them.
CONTRACTIONS = (
    "ain't", "aren't", "can't", "could've", "couldn't", "couldn't've", "didn't", "doesn't", "don't", "hadn't",
    "hadn't've", "hasn't", "haven't", "he'd", "he'd've", "he's", "how'd", "how'll", "how's", "isn't", "it'd",
    "it'd've", "it'll", "ma'am", "mightn't", "mightn't've", "might've", "mustn't", "must've", "needn't", "not've",
    "o'clock", "oughtn't", "'ow's'at", "shan't", "she'd've", "should've", "shouldn't", "shouldn't've", "somebody'd've",
    "somebody'll", "somebody's", "someone'd", "someone'd've", "someone'll", "someone's", "something'd",
    "something'd've", "something'll", "that's", "there'd", "there'd've", "there're", "there's", "they'd", "they'd've",
    "they'll", "they're", "they've", "'twas", "wasn't", "we'd've", "we've", "weren't", "what'll", "what're", "what's",
    "what've", "when's", "where'd", "where's", "where've", "who'd", "who'd've", "who'll", "who's", "who've", "why'll",
    "why're", "why's", "won't", "would've", "wouldn't", "wouldn't've", "y'all", "y'all'll", "y'all'd've", "you'd",
    "you'd've", "you'll", "you're", "you've",
)
APOSTROPHES = {word[:i] + word[i + 1 :]: word
               for word in CONTRACTIONS for i, letter in enumerate(word) if letter == "'"}
APOSTROPHES["somebody'd"] = "somebodyd"  # the official table's own


def normalised_answer(answer: str) -> str:
    """Lower case, numbers to ten in digits, no articles, apostrophes where a contraction lacks one, no points but
    decimal ones. Punctuation becomes a space, or nothing where the answer has the same mark beside a space or holds a
    number like 1,000; apostrophes and colons stay."""
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    kept, thousands = answer, re.search(r"\d,\d", answer)
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        kept = kept.replace(mark, "" if beside_space or thousands else " ")
    kept = re.sub(r"\.(?!\d)", "", kept)
    numbered = (NUMBERS.get(word, word) for word in kept.lower().split())
    return " ".join(APOSTROPHES.get(word, word) for word in numbered if word not in ARTICLES)


def vqa_accuracy(answer: str, votes: Sequence[str]) -> float:
    """How right an answer is, 0 to 1: min(1, equal answers / 3), averaged over all subsets of ten human answers that
    leave one out.

    Raises ValueError where there are not ten: the measure is defined by them.
    """
    if len(votes) != VOTES:
        raise ValueError(f"VQA's accuracy is defined by {VOTES} human answers a question, got {len(votes)}")
    said = normalised_answer(answer)
    equal = [normalised_answer(vote) == said for vote in votes]
    return sum(min(1.0, (sum(equal) - left_out) / AGREEING) for left_out in equal) / VOTES


def commonest_answer(votes: Sequence[str]) -> str:
    """What most people say, normalised; of equally common ones the first. Raises ValueError where nobody answered."""
    if not votes:
        raise ValueError("nobody answered this question: there is no commonest answer")
    return Counter(map(normalised_answer, votes)).most_common(1)[0][0]
