# SPDX-License-Identifier: MIT
"""Rewards for Mask-GRPO: what a good picture is.

A reward is any callable `(images: list[PIL.Image], prompts: list[str]) -> float tensor (B,)`, one score per picture,
larger is better. It never sees tokens or logits, so a policy can be paired with any judge of pictures.

This file holds the *shapes world*, where a picture can be judged exactly. A picture is a 3 x 3 lattice of cells; a cell
is empty or holds one object, drawn by 2 x 2 tiles, so a picture is a 6 x 6 grid of tokens. Captions ask for the six
things that GenEval asks for (Ghosh et al., 2023): a single object, two objects, a count, a colour, a position, and
colours bound to objects. Each token alone is trivial; what a model must get right is how tokens agree, and that is
just what drawing many of them in parallel breaks.

Dims: B pictures, H = W = 48 pixels, K = 49 codes (background + 12 objects x 4 quarters), 9 cells, N = 36 tokens.
"""
import itertools
import random
import zlib

import numpy as np
import torch
from PIL import Image, ImageDraw

# ---------------------------------------------------------------------------------------------------------------------
# 1. Objects and their tiles. Code 0 is the background; object o owns the codes 1 + 4 o + quarter, quarters in reading
#    order. Tiles are cut from one antialiased drawing, so the four quarters of an object differ and their order shows.

SHAPES = ("circle", "square", "triangle", "star")
COLORS = {"red": (214, 64, 58), "green": (46, 158, 91), "blue": (52, 104, 206)}
BACKGROUND = (248, 246, 240)
OBJECTS = list(itertools.product(SHAPES, COLORS))   # object o is the pair (shape, colour)
EMPTY, BROKEN = -1, -2                              # what else a cell can hold
LATTICE, TILE = 3, 8                                # cells per side, pixels per tile side
GRID = 2 * LATTICE                                  # tokens per side
CODEBOOK_SIZE = 1 + 4 * len(OBJECTS)


def draw_object(shape, color):
    """One cell holding one object -> uint8 array (2 * TILE, 2 * TILE, 3)."""
    size = 2 * TILE * 8                             # drawn 8 times larger, then averaged: smooth edges
    image = Image.new("RGB", (size, size), BACKGROUND)
    draw, fill, low, high = ImageDraw.Draw(image), COLORS[color], size * 0.1, size * 0.9
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=fill)
    elif shape == "square":
        draw.rectangle((size * 0.15, size * 0.15, size * 0.85, size * 0.85), fill=fill)
    elif shape == "triangle":
        draw.polygon([(size / 2, low), (high, high), (low, high)], fill=fill)
    else:
        radii = np.where(np.arange(10) % 2, 0.19, 0.46) * size
        angles = np.arange(10) * np.pi / 5
        draw.polygon([(size * 0.5 + r * np.sin(a), size * 0.53 - r * np.cos(a)) for r, a in zip(radii, angles)], fill=fill)
    return np.asarray(image.resize((2 * TILE, 2 * TILE), Image.Resampling.BOX))


def cell_pictures():
    """All cells a right picture can hold, the empty one last -> uint8 array (13, 2 * TILE, 2 * TILE, 3)."""
    empty = np.full((2 * TILE, 2 * TILE, 3), BACKGROUND, np.uint8)
    return np.stack([draw_object(*o) for o in OBJECTS] + [empty])


def tiles():
    """The codebook as pixels -> uint8 tensor (K, TILE, TILE, 3)."""
    cells = torch.from_numpy(cell_pictures())                                         # (13, 2 TILE, 2 TILE, 3)
    quarters = cells.reshape(13, 2, TILE, 2, TILE, 3).transpose(2, 3)                 # (13, 2, 2, TILE, TILE, 3)
    quarters = quarters.reshape(13 * 4, TILE, TILE, 3)                                # empty cells: the last four
    return torch.cat([quarters[-1:], quarters[:-4]])                                  # (K, TILE, TILE, 3)


# ---------------------------------------------------------------------------------------------------------------------
# 2. Captions. Two captions that mean the same ("a star left of a circle", "a circle right of a star") are always on the
#    same side of the split, or the held-out fraction would measure rewording.

NUMBERS = {"a": 1, "two": 2, "three": 3, "four": 4}
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 0), "below": (-1, 0), "and": None}  # (row, column) sign
CATEGORIES = ("single", "two", "counting", "color", "position", "attribution")


def all_captions():
    """Every caption of the world, as (category, meaning, caption)."""
    for a in SHAPES:
        yield "single", a, f"a {a}"
    for a, b in itertools.permutations(SHAPES, 2):
        yield "two", f"{sorted([a, b])}", f"a {a} and a {b}"
        for word, (rows, columns) in list(RELATIONS.items())[:4]:
            first, second = (a, b) if rows + columns > 0 else (b, a)
            yield "position", f"{first} {abs(rows)} {second}", f"a {a} {word} a {b}"
        for color, other in itertools.product(COLORS, repeat=2):
            yield "attribution", f"{sorted([color + a, other + b])}", f"a {color} {a} and a {other} {b}"
    for a, (word, count) in itertools.product(SHAPES, list(NUMBERS.items())[1:]):
        yield "counting", f"{count} {a}", f"{word} {a}s"
    for a, color in OBJECTS:
        yield "color", f"{color} {a}", f"a {color} {a}"


def captions(heldout):
    """The captions of one side of the split, as a dict category -> list[str].

    A quarter of the meanings of each category is held out, chosen by a checksum rather than by hand.
    """
    meanings, split = {}, {}
    for category, meaning, _ in all_captions():
        meanings.setdefault(category, set()).add(meaning)
    for category, found in meanings.items():
        ordered = sorted(found, key=lambda meaning: zlib.crc32(meaning.encode()))
        split[category] = set(ordered[:-(-len(ordered) // 4)])
    chosen = {category: [] for category in CATEGORIES}
    for category, meaning, caption in all_captions():
        if (meaning in split[category]) == heldout:
            chosen[category].append(caption)
    return chosen


def parse(caption):
    """What a caption asks for: ([(count, colour or None, shape), ...], relation or None).

    "a red star above a circle" -> ([(1, "red", "star"), (1, None, "circle")], (1, 0)). ValueError if it is no caption.
    """
    relation, phrases = None, [caption]
    for word, direction in RELATIONS.items():
        if f" {word} " in caption:
            relation, phrases = direction, caption.split(f" {word} ")
    wanted = []
    for phrase in phrases:
        number, *color, shape = phrase.split() if len(phrase.split()) in (2, 3) else ("", "", "")
        shape = shape.removesuffix("s")
        if number not in NUMBERS or shape not in SHAPES or (color and color[0] not in COLORS):
            raise ValueError(f"the shapes world has no caption {caption!r}; one it has is 'a red star and a blue circle'")
        wanted.append((NUMBERS[number], color[0] if color else None, shape))
    return wanted, relation


def in_order(first, second, relation):
    """Whether cell `first` stands to cell `second` as the relation says; True if there is none."""
    if relation is None:
        return True
    rows, columns = second // LATTICE - first // LATTICE, second % LATTICE - first % LATTICE
    return rows * relation[0] + columns * relation[1] > 0


def draw_scene(caption, rng: random.Random):
    """A random right picture for a caption, uniform over what the caption leaves open -> list of N codes."""
    wanted, relation = parse(caption)
    shapes = [(shape, color) for count, color, shape in wanted for _ in range(count)]
    cells = rng.sample(range(LATTICE ** 2), len(shapes))
    while relation and not in_order(*cells, relation):
        cells = rng.sample(range(LATTICE ** 2), len(shapes))
    codes = [0] * GRID ** 2
    for cell, (shape, color) in zip(cells, shapes):
        o = OBJECTS.index((shape, color or rng.choice(list(COLORS))))
        corner = 2 * GRID * (cell // LATTICE) + 2 * (cell % LATTICE)
        for quarter, position in enumerate((corner, corner + 1, corner + GRID, corner + GRID + 1)):
            codes[position] = 1 + 4 * o + quarter
    return codes


# ---------------------------------------------------------------------------------------------------------------------
# 3. The judge. It looks at pixels only, as a detector would, and knows nothing of tokens.

CELLS = torch.from_numpy(cell_pictures()).short().flatten(1)                          # (13, cell pixels)


def look(images, tolerance=40):
    """What stands in each cell: an object's index, EMPTY, or BROKEN -> long (B, 9).

    A cell is recognised when every pixel is within the tolerance (of 255), which forgives rounding and no misplaced tile.
    """
    side = LATTICE * 2 * TILE
    if any(image.size != (side, side) for image in images):
        raise ValueError(f"the judge of the shapes world looks at pictures of {side} x {side} pixels")
    pixels = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images]).short()
    cells = pixels.reshape(-1, LATTICE, 2 * TILE, LATTICE, 2 * TILE, 3).transpose(2, 3)
    cells = cells.reshape(len(images), LATTICE ** 2, 1, -1)                           # (B, 9, 1, cell pixels)
    distance, kind = (cells - CELLS).abs().amax(-1).min(-1)                           # (B, 9) each
    kind[kind == len(OBJECTS)] = EMPTY
    return kind.masked_fill(distance > tolerance, BROKEN)


def is_right(cells, caption):
    """Whether the objects in the cells are exactly those asked for: number, shape, colour and relation. cells (9,) -> bool"""
    wanted, relation = parse(caption)
    found = [(cell, *OBJECTS[o]) for cell, o in enumerate(cells.tolist()) if o >= 0]
    matches = [[cell for cell, s, c in found if s == shape and color in (None, c)] for _, color, shape in wanted]
    exact = all(len(match) == count for match, (count, _, _) in zip(matches, wanted))
    if not exact or len(found) != sum(count for count, _, _ in wanted) or (cells == BROKEN).any():
        return False
    return relation is None or in_order(matches[0][0], matches[1][0], relation)


def shapes_reward(images, prompts):
    """1.0 for a right picture and 0.0 for any other: list of PIL images, list of captions -> (B,) float32."""
    return torch.tensor([float(is_right(c, p)) for c, p in zip(look(images), prompts)])


REWARDS = {"shapes": shapes_reward}
