"""The official accuracy of visual question answering, and its normalisation of answers
(visualqa.org/evaluation)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

VOTES = 10  # people who answered each question
AGREEING = 3  # people whose agreement makes an answer right
NUMBERS = {word: str(i) for i, word in enumerate(
    ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"))}
NUMBERS["none"] = "0"
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Recognised when one of their apostrophes is missing. Contractions that are other words then (shed, wed, ill,
# its) are not among them.
CONTRACTIONS = (
    "ain't", "aren't", "can't", "could've", "couldn't", "couldn't've", "didn't", "doesn't", "don't", "hadn't",
    "hadn't've", "hasn't", "haven't", "he'd", "he'd've", "he's", "how'd", "how'll", "how's", "isn't", "it'd",
    "it'd've", "it'll", "ma'am", "mightn't", "mightn't've", "might've", "mustn't", "must've", "needn't",
    "not've", "o'clock", "oughtn't", "'ow's'at", "shan't", "she'd've", "should've", "shouldn't",
    "shouldn't've", "somebody'd've", "somebody'll", "somebody's", "someone'd", "someone'd've", "someone'll",
    "someone's", "something'd", "something'd've", "something'll", "that's", "there'd", "there'd've",
    "there're", "there's", "they'd", "they'd've", "they'll", "they're", "they've", "'twas", "wasn't",
    "we'd've", "we've", "weren't", "what'll", "what're", "what's", "what've", "when's", "where'd", "where's",
    "where've", "who'd", "who'd've", "who'll", "who's", "who've", "why'll", "why're", "why's", "won't",
    "would've", "wouldn't", "wouldn't've", "y'all", "y'all'll", "y'all'd've", "you'd", "you'd've", "you'll",
    "you're", "you've",
)
APOSTROPHES = {word[:i] + word[i + 1 :]: word
               for word in CONTRACTIONS for i, letter in enumerate(word) if letter == "'"}
APOSTROPHES["somebody'd"] = "somebodyd"  # the official table's own


def normalised_answer(answer: str) -> str:
    """An answer as the official evaluation compares it.

    Lower case, numbers up to ten in digits, no articles, missing apostrophes of contractions restored, and no
    points except decimal ones. Other punctuation becomes a space, or is deleted if the answer also has the
    same mark next to a space, or has a number like 1,000. Apostrophes and colons stay.
    """
    answer = answer.replace("\n", " ").replace("\t", " ").strip()
    text, thousands = answer, re.search(r"\d,\d", answer)
    for mark in PUNCTUATION:
        next_to_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if next_to_space or thousands else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(APOSTROPHES.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, votes: Sequence[str]) -> float:
    """The accuracy of an answer, 0 to 1: min(1, equal human answers / 3), averaged over the ten subsets of
    nine human answers.

    Raises ValueError unless there are ten human answers, by which the measure is defined.
    """
    if len(votes) != VOTES:
        raise ValueError(f"VQA's accuracy is defined by {VOTES} human answers a question, got {len(votes)}")
    normalised = normalised_answer(answer)
    equal = [normalised_answer(vote) == normalised for vote in votes]
    return sum(min(1.0, (sum(equal) - left_out) / AGREEING) for left_out in equal) / VOTES


def commonest_answer(votes: Sequence[str]) -> str:
    """The most common answer, normalised; of equally common ones the first. Raises ValueError if nobody
    answered."""
    if not votes:
        raise ValueError("nobody answered this question: there is no commonest answer")
    return Counter(map(normalised_answer, votes)).most_common(1)[0][0]
