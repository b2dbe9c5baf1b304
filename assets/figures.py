# SPDX-License-Identifier: MIT
"""Draws the README's figure of one step: `python assets/figures.py` writes assets/step.png.

The numbers are those of the drawing at the top of mask_grpo.py.
"""
import pathlib

from PIL import Image, ImageDraw, ImageFont

HERE = pathlib.Path(__file__).parent
DRAWN = ("sky", "cat", "sky", "dog")
NOISY_CONFIDENCE = (-0.3, -2.1, -0.9, -1.6)     # the two highest are kept
THRESHOLD = -0.9                                # the lowest of those that are kept
COLORS = {"sky": "#cfe3f7", "cat": "#f6dcc4", "dog": "#e3d5f0", "MASK": "#d9d9d9"}
FACTORS = (                                     # what each definition multiplies, by position
    ("ar", ("p(sky)", "p(cat)", "p(sky)", "p(dog)")),
    ("p2", ("p(sky)", "", "p(sky)", "")),
    ("p1", ("p(sky)", "P(below)", "p(sky)", "P(below)")))
LEFT, COLUMN, WIDTH, HEIGHT = 230, 190, 1010, 760
KEPT, DISCARDED, INK = "#1b6e3c", "#a33b2e", "black"


def font(size):
    """Pillow's own font, so that every machine draws the same."""
    return ImageFont.load_default(size=size)


def write(draw, x, y, text, size=30, color=INK, anchor="mm"):
    """A line of text at (x, y)."""
    draw.text((x, y), text, color, font(size), anchor)


def tokens(draw, y, title, names):
    """A row of four tokens, 64 pixels high, with its title at the left."""
    write(draw, 20, y, title, anchor="lm")
    for i, name in enumerate(names):
        x = LEFT + i * COLUMN
        draw.rounded_rectangle((x + 15, y - 32, x + COLUMN - 15, y + 32), 12, COLORS[name], "gray")
        write(draw, x + COLUMN // 2, y, name)


def one_step():
    """Four positions: draws, noisy confidences with their threshold, outcome, factors -> Image"""
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    tokens(draw, 60, "state", ("MASK",) * 4)
    tokens(draw, 150, "draws", DRAWN)

    top, scale = 215, 70                                    # pixels per unit of log-probability
    write(draw, 20, top + 80, "noisy", anchor="lm")
    write(draw, 20, top + 116, "confidence", anchor="lm")
    for i, value in enumerate(NOISY_CONFIDENCE):
        x, kept = LEFT + i * COLUMN + COLUMN // 2, value >= THRESHOLD
        y = top - int(value * scale)
        draw.rectangle((x - 45, y, x + 45, top + 175), KEPT if kept else DISCARDED)
        write(draw, x, y - 18, f"{value:.1f}", 26)
    y = top - int(THRESHOLD * scale)
    for x in range(LEFT + 10, WIDTH - 20, 20):              # dashed
        draw.line((x, y, x + 10, y), INK, 3)
    write(draw, WIDTH - 20, y - 20, "threshold", 26, anchor="rm")

    tokens(draw, 450, "next state", [name if value >= THRESHOLD else "MASK"
                                     for name, value in zip(DRAWN, NOISY_CONFIDENCE)])
    draw.line((20, 505, WIDTH - 20, 505), "gray", 2)
    for row, (name, factors) in enumerate(FACTORS):
        y = 550 + 62 * row
        write(draw, 20, y, f"{name} =", 34, anchor="lm")
        seen = False
        for i, factor in enumerate(factors):
            x = LEFT + i * COLUMN
            write(draw, x + COLUMN // 2, y, factor,
                  color=KEPT if factor == "p(sky)" else DISCARDED)
            if factor and seen:
                write(draw, x, y, "x")
            seen = seen or bool(factor)
    write(draw, 20, HEIGHT - 30, "P(below): the chance that a draw at this position ranks below "
          "the threshold", 25, anchor="lm")
    return image


if __name__ == "__main__":
    one_step().save(HERE / "step.png", optimize=True)
