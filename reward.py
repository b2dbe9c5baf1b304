# SPDX-License-Identifier: MIT
"""Rewards for Mask-GRPO: what a good picture is.

A reward is any callable (images: list[PIL.Image], prompts: list[str]) -> float tensor (B,), a score
per picture, larger is better. It sees neither tokens nor logits, so it can judge any policy.

This file holds the *shapes world*, where a picture can be judged exactly. A picture is a lattice of
3 x 3 cells, each empty or holding one object, and an object is drawn by 2 x 2 tiles: 6 x 6 tokens.
Captions ask for the six things that GenEval asks for (Ghosh et al., 2023): a single object, two
objects, a count, a colour, a position, and colours bound to objects. No single token is difficult.
The difficulty is that tokens must agree, which is what painting many at once breaks.

Dims: B pictures of 48 x 48 pixels, N = 36 tokens, K = 49 codes: background and 12 objects x 4.
"""
import itertools
import math
import random
import zlib

import numpy as np
import torch
from PIL import Image, ImageDraw

# --------------------------------------------------------------------------------------------------
# 1. Objects and their tiles. Code 0 is the background; object o owns the codes 1 + 4 o + quarter,
#    quarters in reading order. They are cut from one drawing, so that a wrong quarter shows.

SHAPES = ("circle", "square", "triangle", "star")
COLORS = {"red": (214, 64, 58), "green": (46, 158, 91), "blue": (52, 104, 206)}
BACKGROUND = (248, 246, 240)
OBJECTS = list(itertools.product(SHAPES, COLORS))   # object o is the pair (shape, colour)
EMPTY, BROKEN = -1, -2                              # what else a cell can hold
HABIT = (3, 1, 1)                                   # shares of the colours where none is asked for
LATTICE, TILE = 3, 8                                # cells per side, pixels per tile side
GRID = 2 * LATTICE                                  # tokens per side
CODEBOOK_SIZE = 1 + 4 * len(OBJECTS)


def draw_object(shape, color):
    """A cell that holds an object -> uint8 array (2p, 2p, 3), p = TILE"""
    size = 2 * TILE * 8             # drawn 8 times larger, then averaged, for smooth edges
    image = Image.new("RGB", (size, size), BACKGROUND)
    draw, fill, low, high = ImageDraw.Draw(image), COLORS[color], size * 0.1, size * 0.9
    if shape == "circle":
        draw.ellipse((low, low, high, high), fill=fill)
    elif shape == "square":
        draw.rectangle((size * 0.15, size * 0.15, size * 0.85, size * 0.85), fill=fill)
    elif shape == "triangle":
        draw.polygon([(size / 2, low), (high, high), (low, high)], fill=fill)
    else:                           # a star: ten corners, far from the centre and near it in turn
        polar = [(size * (0.19 if i % 2 else 0.46), i * math.pi / 5) for i in range(10)]
        draw.polygon([(size * 0.5 + r * math.sin(angle), size * 0.53 - r * math.cos(angle))
                      for r, angle in polar], fill=fill)
    return np.asarray(image.resize((2 * TILE, 2 * TILE), Image.Resampling.BOX))


def cell_pictures():
    """What a cell can look like, the empty one last -> uint8 array (13, 2p, 2p, 3), p = TILE"""
    empty = np.full((2 * TILE, 2 * TILE, 3), BACKGROUND, np.uint8)
    return np.stack([draw_object(*o) for o in OBJECTS] + [empty])


def tiles():
    """The codebook as pixels -> uint8 tensor (K, p, p, 3), p = TILE"""
    cells = torch.from_numpy(cell_pictures())                                   # (13, 2p, 2p, 3)
    quarters = cells.reshape(13, 2, TILE, 2, TILE, 3).transpose(2, 3)          # (13, 2, 2, p, p, 3)
    quarters = quarters.reshape(13 * 4, TILE, TILE, 3)                          # last 4: empty
    return torch.cat([quarters[-1:], quarters[:-4]])                            # (K, p, p, 3)


# --------------------------------------------------------------------------------------------------
# 2. Captions. Two that mean the same ("a star left of a circle", "a circle right of a star") are on
#    the same side of the split: the held-out fraction is not to measure rewording.

NUMBERS = {"a": 1, "two": 2, "three": 3, "four": 4}
# where the second object is, seen from the first: (rows down, columns to the right)
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 0), "below": (-1, 0), "and": None}
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
            meaning = f"{sorted([color + a, other + b])}"
            yield "attribution", meaning, f"a {color} {a} and a {other} {b}"
    for a, (word, count) in itertools.product(SHAPES, list(NUMBERS.items())[1:]):
        yield "counting", f"{count} {a}", f"{word} {a}s"
    for a, color in OBJECTS:
        yield "color", f"{color} {a}", f"a {color} {a}"


def captions(heldout):
    """The captions of one side of the split, category -> list[str].

    A quarter of the meanings of each category is held out, chosen by a checksum, not by hand.
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
    """What a caption asks for: [(count, colour or None, shape), ...] and a relation or None.

    "two stars" -> [(2, None, "star")], None. ValueError if the shapes world has no such caption.
    """
    relation, phrases = None, [caption]
    for word, direction in RELATIONS.items():
        if f" {word} " in caption:
            relation, phrases = direction, caption.split(f" {word} ")
    wanted = []
    for phrase in phrases:
        words = phrase.split()
        if len(words) == 2:
            words.insert(1, None)               # no colour asked for
        number, color, shape = words if len(words) == 3 else (None, None, "")
        shape = shape.removesuffix("s")
        if number not in NUMBERS or shape not in SHAPES or color not in (None, *COLORS):
            raise ValueError(f"the shapes world has no caption {caption!r}; "
                             "one that it has is 'a red star and a blue circle'")
        wanted.append((NUMBERS[number], color, shape))
    return wanted, relation


def in_order(first, second, relation):
    """Whether cell `first` stands to cell `second` as the relation says; True if there is none."""
    if relation is None:
        return True
    rows, columns = second // LATTICE - first // LATTICE, second % LATTICE - first % LATTICE
    return rows * relation[0] + columns * relation[1] > 0


def draw_scene(caption, rng: random.Random):
    """A right picture for a caption, at random in all that the caption leaves open -> N codes

    Colours left open are mostly red: real data have their habits too, and a base its favourites.
    """
    wanted, relation = parse(caption)
    shapes = [(shape, color) for count, color, shape in wanted for _ in range(count)]
    cells = rng.sample(range(LATTICE ** 2), len(shapes))
    while relation and not in_order(*cells, relation):
        cells = rng.sample(range(LATTICE ** 2), len(shapes))
    codes = [0] * GRID ** 2
    for cell, (shape, color) in zip(cells, shapes):
        o = OBJECTS.index((shape, color or rng.choices(list(COLORS), HABIT)[0]))
        corner = 2 * GRID * (cell // LATTICE) + 2 * (cell % LATTICE)
        for quarter in range(4):
            codes[corner + GRID * (quarter // 2) + quarter % 2] = 1 + 4 * o + quarter
    return codes


# --------------------------------------------------------------------------------------------------
# 3. The judge. It looks at pixels only, as a detector would, and knows nothing of tokens.

CELLS = torch.from_numpy(cell_pictures()).short().flatten(1)                    # (13, pixels)


def look(images, tolerance=40):
    """What stands in each cell: an object's index, EMPTY, or BROKEN -> long (B, 9).

    Every pixel of a cell must be within the tolerance, which forgives noise but no misplaced tile.
    """
    side = LATTICE * 2 * TILE
    if any(image.size != (side, side) for image in images):
        raise ValueError(f"the shapes world's judge looks at pictures of {side} x {side} pixels")
    pixels = torch.from_numpy(np.stack([np.array(image.convert("RGB")) for image in images]))
    cells = pixels.short().reshape(-1, LATTICE, 2 * TILE, LATTICE, 2 * TILE, 3).transpose(2, 3)
    cells = cells.reshape(len(images), LATTICE ** 2, 1, -1)                     # (B, 9, 1, pixels)
    distance, kind = (cells - CELLS).abs().amax(-1).min(-1)                     # (B, 9) each
    kind[kind == len(OBJECTS)] = EMPTY
    return kind.masked_fill(distance > tolerance, BROKEN)


def agreement(cells, caption):
    """How well the cells hold what the caption asks for, in [0, 1]; 1 is exactly that and no more.

    The share of objects that are right, among those asked for or those drawn, whichever are more;
    one half if all are right but stand in the wrong relation. cells (9,) -> float
    """
    wanted, relation = parse(caption)
    found = {cell: OBJECTS[o] for cell, o in enumerate(cells.tolist()) if o >= 0}
    places = [[cell for cell, (s, c) in found.items() if s == shape and color in (None, c)]
              for _, color, shape in wanted]        # for each phrase, the cells that answer it
    right = sum(min(count, len(cells)) for (count, _, _), cells in zip(wanted, places))
    drawn = len(found) + int((cells == BROKEN).sum())
    share = right / max(drawn, sum(count for count, _, _ in wanted))
    if share == 1 and not in_order(places[0][0], places[-1][0], relation):
        return 0.5
    return share


def shapes_reward(images, prompts):
    """How well pictures agree with captions: PIL images (B), captions (B) -> (B,) float32 in [0, 1]

    Graded, as CLIP is. A reward of right or wrong alone would leave many groups of the harder
    captions without a single right picture, and so without anything to learn from.
    """
    return torch.tensor([agreement(c, p) for c, p in zip(look(images), prompts)])


def shapes_right(images, prompts):
    """1 for a right picture, 0 for any other: PIL images (B), captions (B) -> (B,) float32"""
    return (shapes_reward(images, prompts) == 1).float()


REWARDS = {"shapes": shapes_reward}
# What evaluation reports in place of a reward, where there is something better to know.
MEASURES = {"shapes": shapes_right}
