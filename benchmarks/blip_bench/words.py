"""A vocabulary, captions, questions and answers without a download, with lengths and similarities like those
of COCO and VQA v2.

All random choices derive from the given seed.
"""

from __future__ import annotations

import random
import string
from itertools import chain, count, product

from blip_fast.model.tokenizer import Tokenizer

BERT_SIZE, FIRST_WORD = 30_522, 999  # tokens of bert-base-uncased, and the id of its first word
WORDS = {kind: words.split() for kind, words in (line.split(": ") for line in """\
colours: black white red blue green yellow brown gray orange pink purple silver gold beige tan
nouns: man woman boy girl child baby people person player batter pitcher skier surfer rider driver cook chef waiter \
police dog cat horse cow sheep goat pig bird duck goose chicken elephant giraffe zebra bear lion tiger monkey rabbit \
mouse fish car truck bus train plane boat ship bike motorcycle scooter tram taxi van tractor helicopter kite balloon \
parachute table chair couch bed desk bench shelf cabinet drawer door window wall floor ceiling roof stairs carpet \
curtain lamp kitchen bathroom bedroom office hotel restaurant church school station airport park zoo beach farm \
forest city street road sidewalk bridge river lake ocean field garden yard hill mountain sky cloud sun moon rain snow \
sand grass tree bush flower leaf branch rock fence pole sign light clock tower building house barn tent flag \
umbrella hat cap helmet shirt jacket coat dress skirt pants jeans shorts sock shoe boot glove scarf tie belt watch \
ring necklace glasses mask backpack bag purse suitcase basket box bottle cup glass mug plate bowl fork knife spoon \
pan pot oven stove fridge sink toilet tub shower mirror towel soap brush razor pillow blanket sheet book paper pen \
pencil letter card magazine newspaper picture painting poster photo camera phone laptop computer keyboard screen \
monitor remote radio speaker cable plug fan heater pizza sandwich burger salad soup rice pasta bread toast cheese \
butter egg bacon ham steak carrot broccoli tomato onion pepper potato corn bean apple banana pear peach grape lemon \
lime melon berry cherry mango cake pie cookie donut candy chocolate sugar salt honey jam juice milk water tea coffee \
wine beer soda ice ball bat racket net goal board skate ski surf wave wheel tire engine seat handle rope chain hook \
nail screw hammer saw drill ladder bucket hose shovel rake
qualities: big small tall short long wide old young new clean dirty wet dry hot cold warm bright dark open closed \
full empty round square flat soft hard smooth rough striped plain wooden plastic metal stone leather cotton happy sad \
angry tired hungry
actions: walking running sitting standing lying sleeping eating drinking reading writing talking looking smiling \
waiting playing jumping flying swimming surfing skating riding driving cooking cutting holding carrying throwing \
catching hitting kicking
places: on in under behind near by above beside
rest: a the of and with at to is are what where who how many color kind this that there left right top bottom yes no
""".splitlines())}
COLOURS, NOUNS, QUALITIES, ACTIONS, PLACES, REST = WORDS.values()
QUESTIONS = ("what color is the {noun}", "how many {noun}s are there", "is the {noun} {quality}",
             "what is the {noun} {action}", "where is the {noun}", "what is {place} the {noun}",
             "is there a {quality} {noun} in the picture", "what kind of {noun} is {place} the "
             "{colour} {other}")
PARTS = ("a {quality} {noun}", "a {noun} and a {other}", "the {colour} {noun}", "a {noun} {action}",
         "{place} a {quality} {noun}", "with a {colour} {other}", "{place} the {noun}")


def tokenizer() -> Tokenizer:
    """A tokenizer with as many tokens as bert-base-uncased, and the special ones at the same ids. Words of
    this file are one token each; other words are spelt in letters."""
    special = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    signs = string.ascii_lowercase + string.digits + string.punctuation
    words = [*signs, *(f"##{sign}" for sign in signs), *map(str, range(10, 101)), *chain(*WORDS.values())]
    unused = (f"[unused{i}]" for i in count())
    tokens = [special[i] if i in special else next(unused) for i in range(FIRST_WORD)]
    tokens += dict.fromkeys(words)
    return Tokenizer([*tokens, *(next(unused) for _ in range(BERT_SIZE - len(tokens)))])


def captions(number: int, seed: int) -> list[str]:
    """Random captions of 4 to 18 words, 11 on average."""
    draw = random.Random(seed)
    found = []
    for _ in range(number):
        text: list[str] = []
        for _ in range(draw.choice((2, 3, 3, 4))):
            text += _fill(draw.choice(PARTS), draw).split()
        found.append(" ".join(text[:18]))
    return found


def questions(number: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [_fill(draw.choice(QUESTIONS), draw) for _ in range(number)]


def answers(number: int, seed: int) -> list[str]:
    """Distinct answers. Of seven, four have one word, two have two and one has three, and many share a
    beginning, similar to the list of 3,128 answers used for VQA v2."""
    draw = random.Random(seed)
    kinds = [
        ["yes", "no", *map(str, range(101)), *COLOURS, *NOUNS, *(f"{noun}s" for noun in NOUNS),
         *QUALITIES, *ACTIONS],
        [*map(" ".join, product(COLOURS + QUALITIES, NOUNS)), *map(" ".join, product(PLACES, NOUNS))],
        [*(f"{place} the {noun}" for place, noun in product(PLACES, NOUNS)),
         *(f"{one} and {other}" for one, other in product(COLOURS, COLOURS))],
    ]
    wanted = [number - 2 * number // 7 - number // 7, 2 * number // 7, number // 7]
    found = []
    for texts, many in zip(kinds, wanted, strict=True):
        texts = list(dict.fromkeys(texts))
        if many > len(texts):
            raise ValueError(f"{number} answers: there are words for no more than {7 * len(kinds[0]) // 4}")
        found += draw.sample(texts, many)
    draw.shuffle(found)
    return found


def _fill(pattern: str, draw: random.Random) -> str:
    return pattern.format(noun=draw.choice(NOUNS), other=draw.choice(NOUNS), quality=draw.choice(QUALITIES),
                          colour=draw.choice(COLOURS), action=draw.choice(ACTIONS), place=draw.choice(PLACES))
