"""Overlays heat maps on a picture, and arranges captioned pictures on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from blip_fast.tasks.explainer import WordMap

PANEL = 360  # longest side of a picture in a sheet
COLUMNS = 4  # most pictures in a row
MARGIN, FONT_SIZE = 10, 17
# From cold to hot: position from 0 to 1, then red, green, blue.
HEAT = np.array([[0.0, 0, 0, 160], [0.25, 0, 140, 255], [0.5, 80, 255, 140], [0.75, 255, 210, 0],
                 [1.0, 230, 20, 0]])


def overlay(picture: Image.Image, heat: NDArray[np.floating]) -> Image.Image:
    """Overlay a heat map on a picture. Blue is the lowest value and red the highest. The hotter a place, the
    less of the picture shows through: the map's opacity is the scaled value to the power 0.7, as published. A
    constant map leaves the picture unchanged.

    Args:
        picture: RGB.
        heat: [rows, columns] from top to bottom, enlarged bicubically to the picture's size.
    """
    low, high = float(heat.min()), float(heat.max())
    scaled = (heat - low) / (high - low) if high > low else np.zeros_like(heat)
    large = Image.fromarray(scaled.astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC)
    warmth = np.asarray(large).clip(0, 1)[..., None]
    colours = np.concatenate([np.interp(warmth, HEAT[:, 0], channel) for channel in HEAT.T[1:]], axis=-1)
    covered = warmth**0.7
    return Image.fromarray((np.asarray(picture) * (1 - covered) + colours * covered).round().astype(np.uint8))


def sheet(panels: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Pictures of one size with a caption above each, in rows of at most COLUMNS."""
    font = ImageFont.load_default(FONT_SIZE)
    width, height = panels[0][0].size
    captions = [_wrap(caption, font, width) for _, caption in panels]
    columns = min(COLUMNS, len(panels))
    rows = [range(start, min(start + columns, len(panels))) for start in range(0, len(panels), columns)]
    line = FONT_SIZE + 7
    heads = [line * max(captions[i].count("\n") + 1 for i in row) for row in rows]  # heights of captions
    page = Image.new("RGB", (columns * (width + MARGIN) + MARGIN,
                             sum(heads) + len(rows) * (height + 2 * MARGIN) + MARGIN), "white")
    draw, top = ImageDraw.Draw(page), MARGIN
    for row, head in zip(rows, heads, strict=True):
        for column, i in enumerate(row):
            left = MARGIN + column * (width + MARGIN)
            draw.multiline_text((left, top), captions[i], "black", font, spacing=line - FONT_SIZE)
            page.paste(panels[i][0], (left, top + head))
        top += head + height + 2 * MARGIN
    return page


def word_sheet(picture: Image.Image, words: Sequence[WordMap]) -> Image.Image:
    """A sheet with each word's heat map over the picture."""
    return sheet([(overlay(picture, word.map.numpy()), word.word) for word in words])


def panel_size(picture: Image.Image) -> Image.Image:
    """The picture resized so that its longest side has PANEL pixels."""
    scale = PANEL / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def _wrap(caption: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The caption in lines that fit the width, except for single words that are wider."""
    lines: list[str] = []
    for word in caption.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)
