"""Scenes: pictures drawn by the program itself, with compositional captions and known ground truth.

A scene holds one or two things, each with a size, a colour and a shape, a spatial relation between them, and
a named background:

    a small red circle left of a large blue square on grey

There are more than 10⁵ distinct scenes with two things (`distinct_scenes`). Every drawing jitters positions,
sizes, colours and the background's shading. A fifth of all combinations of two things, such as (small red
circle, large blue square), is held out: such a combination never occurs in the split "train", in a picture or
in a caption, right or wrong, though each of its things does. The split "test" has only these combinations.

`corrupt` imitates the web's noise: half of the wrong captions are another scene's, half differ in one slot
only.
"""

import itertools
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw

from blip_fast.data.shards.annotated import write_annotations

SIZES = {"small": 0.1, "large": 0.155}  # radius as a share of the image's side
COLOURS = {
    "red": (215, 40, 40),
    "green": (40, 165, 60),
    "blue": (45, 80, 220),
    "yellow": (245, 215, 45),
    "purple": (145, 55, 185),
    "orange": (245, 135, 25),
    "cyan": (45, 205, 215),
    "pink": (250, 130, 190),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
BACKGROUNDS = {
    "white": (242, 242, 242),
    "black": (18, 18, 18),
    "grey": (135, 135, 135),
    "brown": (110, 70, 40),
    "navy": (20, 25, 90),
    "beige": (220, 200, 165),
    "olive": (85, 95, 30),
    "maroon": (95, 15, 40),
}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RELATIONS = tuple(OPPOSITE)

HARD = 3  # in twins, a shape or the relation is this many times as likely to differ as another slot

GRID = 3  # things stand near the centres of cells, GRID per side

SPLITS = ("train", "test")
PROMPT = "a picture of"  # for fine-tuning and running captioning

VOCABULARY = tuple(
    sorted({*SIZES, *COLOURS, *SHAPES, *BACKGROUNDS, *" ".join(RELATIONS).split(), *PROMPT.split(),
            "a", "on"})
)

SUPERSAMPLING = 3  # shapes are drawn this much larger, then reduced: smooth edges at any image size


@dataclass(frozen=True)
class Thing:
    """One thing of a scene."""

    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """One or two things. With two, things[0] is `relation` things[1]."""

    things: tuple[Thing, ...]
    relation: str | None
    background: str

    @property
    def split(self) -> str:
        """The split: "test" for the held-out fifth, by a fixed hash, of the combinations of two things, or of
        one thing and its background; otherwise "train"."""
        parts = sorted(f"{t.size} {t.colour} {t.shape}" for t in self.things)
        parts += [self.background] * (len(parts) == 1)
        return "test" if crc32(", ".join(parts).encode()) % 5 == 0 else "train"

    def turned(self) -> "Scene":
        """The same scene described from the other thing's side (A left of B = B right of A)."""
        if self.relation is None:
            return self
        return replace(self, things=self.things[::-1], relation=OPPOSITE[self.relation])

    def same_as(self, other: "Scene") -> bool:
        return self == other or self.turned() == other


@cache
def distinct_scenes(split: str | None = None) -> int:
    """The number of distinct scenes with two things, of one split or of both together."""
    things = [Thing(size, colour, shape) for size in SIZES for colour in COLOURS for shape in SHAPES]
    combinations = (Scene(two, "above", "white") for two in itertools.combinations(things, 2))
    return sum(split in (None, scene.split) for scene in combinations) * len(RELATIONS) * len(BACKGROUNDS)


# ---------------------------------------------------------------- captions


def caption(scene: Scene) -> str:
    """The scene in words, things in the scene's order."""
    names = [f"a {t.size} {t.colour} {t.shape}" for t in scene.things]
    things = names[0] if scene.relation is None else f"{names[0]} {scene.relation} {names[1]}"
    return f"{things} on {scene.background}"


def parse_caption(text: str) -> Scene | None:
    """The scene that a caption describes, or None if it does not follow the grammar. A leading prompt is
    allowed."""
    words = text.lower().split()
    if words[:3] == PROMPT.split():
        words = words[3:]
    first, words = _parse_thing(words)
    relation, second = None, None
    if words[:2] in (["left", "of"], ["right", "of"]):
        relation, words = " ".join(words[:2]), words[2:]
    elif words[:1] in (["above"], ["below"]):
        relation, words = words[0], words[1:]
    if relation is not None:
        second, words = _parse_thing(words)
    things = tuple(t for t in (first, second) if t is not None)
    complete = len(things) == (1 if relation is None else 2)
    if not complete or len(words) != 2 or words[0] != "on" or words[1] not in BACKGROUNDS:
        return None
    return Scene(things, relation, words[1])


def _parse_thing(words: list[str]) -> tuple[Thing | None, list[str]]:
    """The thing at the start of `words`, or None, and the words after it."""
    if len(words) < 4 or words[0] != "a":
        return None, words
    _, size, colour, shape = words[:4]
    if size not in SIZES or colour not in COLOURS or shape not in SHAPES:
        return None, words
    return Thing(size, colour, shape), words[4:]


def score_caption(text: str, scene: Scene) -> tuple[int, int, bool]:
    """The number of slots that a caption gets right, the number of slots, and whether the caption is right as
    a whole.

    Slots are each thing's size, colour and shape, the relation, and the background: 8 with two things, 4 with
    one. Both descriptions of a relation count (A left of B = B right of A); the one that agrees more is
    scored. A text that does not parse has no slot right.
    """
    total = 3 * len(scene.things) + (scene.relation is not None) + 1
    described = parse_caption(text)
    if described is None:
        return 0, total, False
    right = max(_right_slots(described, scene), _right_slots(described.turned(), scene))
    return right, total, described.same_as(scene)


def _right_slots(described: Scene, scene: Scene) -> int:
    right = int(described.background == scene.background)
    right += int(scene.relation is not None and described.relation == scene.relation)
    for a, b in zip(described.things, scene.things, strict=False):
        right += (a.size == b.size) + (a.colour == b.colour) + (a.shape == b.shape)
    return right


def chance_levels(scenes: list[Scene], seed: int) -> tuple[float, float]:
    """Shares of right slots and of fully right captions when every scene gets another scene's caption at
    random."""
    order = np.random.default_rng(seed).permutation(len(scenes))
    scores = [score_caption(caption(scenes[j]), scenes[i])
              for i, j in zip(order, np.roll(order, 1), strict=True)]
    return sum(s[0] for s in scores) / sum(s[1] for s in scores), sum(s[2] for s in scores) / len(scores)


# ---------------------------------------------------------------- sampling


def sample_scenes(count: int, split: str, seed: int, one_object_share: float = 0.1) -> list[Scene]:
    """`count` scenes of a split. Scenes with two things are all distinct; scenes with one repeat, because
    there are few."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; scenes have the splits {', '.join(SPLITS)}")
    two_objects = round(count * (1 - one_object_share))
    if two_objects > distinct_scenes(split):
        raise ValueError(f"{two_objects} scenes with two objects asked for; "
                         f"{split} has {distinct_scenes(split)}")
    rng = np.random.default_rng(seed)
    seen: set[Scene] = set()
    scenes: list[Scene] = []
    while len(scenes) < two_objects:
        scene = _random_scene(split, 2, rng)
        if scene not in seen:
            seen.update((scene, scene.turned()))
            scenes.append(scene)
    scenes += [_random_scene(split, 1, rng) for _ in range(count - two_objects)]
    return [scenes[i] for i in rng.permutation(count)]


def sample_twins(count: int, seed: int, one_object_share: float = 0.1) -> list[Scene]:
    """Training scenes in twins: neighbours (0 and 1, 2 and 3, …) differ in one slot, the hardest case for a
    filter.

    A shape or the relation, which a filter learns last, is `HARD` times as likely to differ as any other
    slot.

    Raises ValueError if `count` is odd, and what `sample_scenes` raises.
    """
    if count % 2:
        raise ValueError(f"{count} scenes asked for: twins need an even number")
    rng = np.random.default_rng([seed, SPLITS.index("train")])
    firsts = sample_scenes(count // 2, "train", seed, one_object_share)
    return [scene for first in firsts for scene in (first, _edit(first, rng, HARD))]


def _random_scene(split: str, objects: int, rng: np.random.Generator) -> Scene:
    while True:
        u = rng.random(8)
        things = tuple(
            Thing(_pick(tuple(SIZES), u[3 * i]), _pick(tuple(COLOURS), u[3 * i + 1]),
                  _pick(SHAPES, u[3 * i + 2]))
            for i in range(objects)
        )
        relation = _pick(RELATIONS, u[6]) if objects == 2 else None
        scene = Scene(things, relation, _pick(tuple(BACKGROUNDS), u[7]))
        if scene.split == split and len(set(things)) == objects:
            return scene


def _pick(words: tuple[str, ...], u: float) -> str:
    return words[int(u * len(words))]


def corrupt(scene: Scene, rng: np.random.Generator) -> str:
    """A wrong caption of the same split: another scene's, or this scene's with one slot changed, with equal
    chance."""
    if rng.random() >= 0.5:
        return caption(_edit(scene, rng, 1))
    while True:
        wrong = _random_scene(scene.split, len(scene.things), rng)
        if not wrong.same_as(scene):
            return caption(wrong)


def _edit(scene: Scene, rng: np.random.Generator, hard: int) -> Scene:
    """The scene with one slot changed, still in the same split. A shape or the relation is `hard` times as
    likely to change as any other slot."""
    while True:
        other = _with_one_slot_changed(scene, rng, hard)
        if (other.split == scene.split and not other.same_as(scene)
                and len(set(other.things)) == len(other.things)):
            return other


def _with_one_slot_changed(scene: Scene, rng: np.random.Generator, hard: int) -> Scene:
    things = range(len(scene.things))
    slots: list[tuple[int | None, str]] = [(i, name) for i in things for name in ("size", "colour")]
    slots += [(None, "background")] + hard * [(i, "shape") for i in things]
    slots += hard * [(None, "relation")] * (scene.relation is not None)
    i, name = slots[rng.integers(len(slots))]
    values = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "background": BACKGROUNDS,
              "relation": RELATIONS}[name]
    old = getattr(scene if i is None else scene.things[i], name)
    new = _pick(tuple(v for v in values if v != old), rng.random())
    if i is None:
        return replace(scene, **{name: new})
    things = tuple(replace(t, **{name: new}) if j == i else t for j, t in enumerate(scene.things))
    return replace(scene, things=things)


# ---------------------------------------------------------------- drawing


def draw(
    scene: Scene, image_size: int, rng: np.random.Generator, moved: tuple[float, float] = (0.0, 0.0)
) -> Image.Image:
    """The scene as an RGB image of image_size × image_size pixels. `rng` jitters place, size, colour and
    shading. The first thing is drawn `moved` (right, down) from its place, in shares of the image's side."""
    image = _draw_background(scene.background, image_size, rng)
    places = _centres(scene, rng)
    places[0] = (places[0][0] + moved[0], places[0][1] + moved[1])
    for thing, (x, y) in zip(scene.things, places, strict=True):
        jitter = rng.uniform(-1, 1, size=4)
        radius = SIZES[thing.size] * (1 + 0.06 * jitter[0])
        colour = tuple(int(np.clip(c + 12 * j, 0, 255))
                       for c, j in zip(COLOURS[thing.colour], jitter[1:], strict=True))
        mask = _shape_mask(thing.shape, radius * image_size)
        corner = (round((x - radius) * image_size), round((y - radius) * image_size))
        image.paste(colour, (*corner, corner[0] + mask.width, corner[1] + mask.height), mask)
    return image


def _centres(scene: Scene, rng: np.random.Generator) -> list[tuple[float, float]]:
    """The things' centres in [0, 1]². Two things stand near opposite sides; a single thing near the centre of
    any cell."""
    if scene.relation is None:
        x, y = (rng.integers(GRID, size=2) + 0.5) / GRID + rng.uniform(-0.02, 0.02, size=2)
        return [(float(x), float(y))]
    ends = (0, GRID - 1) if scene.relation in ("left of", "above") else (GRID - 1, 0)
    along = (np.array(ends) + 0.5) / GRID + rng.uniform(-0.02, 0.02, size=2)
    across = 0.5 + rng.uniform(-0.04, 0.04, size=2)
    x, y = (along, across) if scene.relation in ("left of", "right of") else (across, along)
    return [(float(x[0]), float(y[0])), (float(x[1]), float(y[1]))]


def _draw_background(name: str, image_size: int, rng: np.random.Generator) -> Image.Image:
    """A plain colour, with a random gradient and a little grain."""
    ramp = np.linspace(-1, 1, image_size, dtype=np.float32)
    slope_x, slope_y, *shift = rng.uniform(-12, 12, size=5)
    shading = (slope_x * ramp[None, :] + slope_y * ramp[:, None]
               + 4 * rng.standard_normal((image_size,) * 2, np.float32))
    colour = np.asarray(BACKGROUNDS[name], np.float32) + np.asarray(shift, np.float32)
    return Image.fromarray((shading[:, :, None] + colour).clip(0, 255).astype(np.uint8))


def _shape_mask(shape: str, radius: float) -> Image.Image:
    """A mode L image, 255 inside the shape. `radius` is half its width in pixels."""
    pixels = max(1, round(2 * radius))
    side = pixels * SUPERSAMPLING
    mask = Image.new("L", (side, side))
    pen, end, mid = ImageDraw.Draw(mask), side - 1, (side - 1) / 2
    match shape:
        case "circle":
            pen.ellipse((0, 0, end, end), fill=255)
        case "square":
            pen.rectangle((0.06 * end, 0.06 * end, 0.94 * end, 0.94 * end), fill=255)
        case "triangle":
            pen.polygon([(mid, 0), (end, end), (0, end)], fill=255)
        case "cross":
            pen.rectangle((0.34 * end, 0, 0.66 * end, end), fill=255)
            pen.rectangle((0, 0.34 * end, end, 0.66 * end), fill=255)
        case "ring":
            pen.ellipse((0, 0, end, end), fill=255)
            pen.ellipse((0.27 * end, 0.27 * end, 0.73 * end, 0.73 * end), fill=0)
    return mask.reduce(SUPERSAMPLING)


# ---------------------------------------------------------------- folders


def slots_of(scene: Scene) -> dict[str, Any]:
    """The scene as stored in an annotation row, with lists, as JSON returns it."""
    return asdict(scene) | {"things": [asdict(thing) for thing in scene.things]}


def scene_from_slots(slots: dict) -> Scene:
    """The scene from the value of an annotation row's "scene"."""
    return Scene(tuple(Thing(**thing) for thing in slots["things"]), slots["relation"], slots["background"])


def write_scenes(
    folder: Path, count: int, split: str, seed: int, noise: float, image_size: int,
    one_object_share: float = 0.1, twins: bool = False,
) -> list[dict]:
    """Draw scenes into `folder` as PNG with annotations.jsonl, ready to be packed. Exactly round(count ×
    noise) captions are wrong. With `twins`, which needs the split "train", neighbours differ in one slot
    (`sample_twins`).

    The rows, which are also returned, have image, captions (one), split, scene (the true slots) and
    caption_is_right.
    """
    if not 0 <= noise <= 1:
        raise ValueError(f"noise is {noise}; it is the share of wrong captions, 0 to 1")
    if twins and split != "train":
        raise ValueError(f"twins are for training, not for the split {split}")
    scenes = (sample_twins(count, seed, one_object_share) if twins
              else sample_scenes(count, split, seed, one_object_share))
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    folder.mkdir(parents=True, exist_ok=True)
    wrong = set(rng.permutation(count)[: round(count * noise)].tolist())
    rows = []
    for i, scene in enumerate(scenes):
        name = f"{i:06d}.png"
        draw(scene, image_size, rng).save(folder / name, compress_level=1)
        text = corrupt(scene, rng) if i in wrong else caption(scene)
        rows.append({"image": name, "captions": [text], "split": split, "scene": slots_of(scene),
                     "caption_is_right": i not in wrong})
    write_annotations(folder, rows)
    return rows
