# SPDX-License-Identifier: MIT
"""Rewards for Mask-GRPO: what a good picture is.

A reward is any callable (images: list[PIL.Image], prompts: list[str]) -> float tensor (B,), a score
per picture, larger is better. It sees neither tokens nor logits, so it can judge any policy. For
real pictures there are CLIP and its relatives (section 4); `load_reward` finds them all by name.

The rest is the *shapes world*, where a picture can be judged exactly. A picture is a lattice of
3 x 3 cells, each empty or holding one object, and an object is drawn by 2 x 2 tiles: 6 x 6 tokens.
Captions ask for the six things that GenEval asks for (Ghosh et al., 2023): a single object, two
objects, a count, a colour, a position, and colours bound to objects. No single token is difficult.
The difficulty is that tokens must agree, which is what painting many at once breaks.

Dims: B pictures of 48 x 48 pixels, N = 36 tokens, K = 49 codes: background and 12 objects x 4.
"""
import importlib
import itertools
import math
import os
import random
import sys
import textwrap
import zlib

import numpy as np
import torch
import torch.nn.functional as F
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


# --------------------------------------------------------------------------------------------------
# 4. Judges of real pictures. All are CLIPs: one network for pictures, one for texts, and the score
#    is the cosine between what the two make of a picture and its caption.


class ClipReward:
    """scale * cosine under a CLIP of open_clip. Used as a function: images, prompts -> (B,) float32

    model: one of open_clip's; pretrained: its tag, or a checkpoint file. scale None is the model's
    own, the paper's reward. bf16 on a GPU; cosine and score are float32 everywhere.
    """

    def __init__(self, device, model="ViT-H-14", pretrained="laion2b_s32b_b79k", scale=None):
        import open_clip                            # seconds of import that other rewards save
        if model not in open_clip.list_models():
            raise ValueError(f"open_clip knows no model {model!r}; `open_clip.list_models()` does")
        tags = open_clip.list_pretrained_tags_by_model(model)
        if pretrained not in tags and not os.path.isfile(pretrained):
            raise ValueError(f"{pretrained!r} is no file, nor weights of {model}; "
                             f"choose of {', '.join(tags)}")
        self.device, self.batch = torch.device(device), 32
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        precision = "bf16" if self.device.type == "cuda" else "fp32"
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(
            model, pretrained, precision, self.device)
        self.model.eval()
        self.tokenize = open_clip.get_tokenizer(model)      # cuts at 77 tokens and keeps the last
        self.scale = self.model.logit_scale.float().exp() if scale is None else scale

    def features(self, images, prompts):
        """What the two networks make of pictures and texts -> (B, D), (B, D)"""
        pixels = torch.stack([self.preprocess(image) for image in images])      # (B, 3, H, W)
        text = self.tokenize(prompts).to(self.device)                           # (B, 77)
        return (self.model.encode_image(pixels.to(self.device, self.dtype)),
                self.model.encode_text(text))

    @torch.no_grad()
    def __call__(self, images, prompts):
        scores = []
        for i in range(0, len(images), self.batch):
            pair = self.features(images[i:i + self.batch], list(prompts[i:i + self.batch]))
            scores.append(self.scale * F.cosine_similarity(*(x.float() for x in pair)))
        return torch.cat(scores).cpu()


class PickScore(ClipReward):
    """PickScore v1 (Kirstain et al., 2023): a CLIP-H tuned on people's choices, of transformers.

    model, processor: hub ids or local folders; the published weights come without a processor.
    """

    def __init__(self, device, model="yuvalkirstain/PickScore_v1",
                 processor="laion/CLIP-ViT-H-14-laion2B-s32B-b79K"):
        from transformers import CLIPModel, CLIPProcessor
        self.device, self.batch = torch.device(device), 32
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.processor = CLIPProcessor.from_pretrained(processor)
        self.model = CLIPModel.from_pretrained(model, dtype=self.dtype).to(device)
        self.model.eval()
        self.scale = self.model.logit_scale.float().exp()

    def features(self, images, prompts):
        """As above, with the texts cut and padded to 77 tokens -> (B, D), (B, D)"""
        inputs = self.processor(text=prompts, images=images, return_tensors="pt", truncation=True,
                                padding="max_length", max_length=77).to(self.device)
        output = self.model(**inputs | {"pixel_values": inputs["pixel_values"].to(self.dtype)})
        return output.image_embeds, output.text_embeds


def hpsv2(device, model="ViT-H-14", pretrained=None):
    """HPS v2.1 (Wu et al., 2023): again a CLIP-H; its score is the bare cosine -> ClipReward"""
    if pretrained is None:
        from huggingface_hub import hf_hub_download
        pretrained = hf_hub_download("xswu/HPSv2", "HPS_v2.1_compressed.pt")
    return ClipReward(device, model, pretrained, scale=1.0)


# name -> what makes the reward: (device, *arguments) -> callable. `--reward clip:ViT-B-32:openai`
# gives its arguments after colons. Another CLIP is another line.
REWARDS = {"shapes": lambda device: shapes_reward, "clip": ClipReward, "hpsv2": hpsv2,
           "pickscore": PickScore}
# What evaluation reports in place of a reward, where there is something better to know.
MEASURES = {"shapes": shapes_right}


def load_reward(spec, device="cpu"):
    """NAME or NAME:ARGUMENT:... of REWARDS, or MODULE:FUNCTION of the reader's own -> reward

    ValueError, in one line, for what cannot be found or loaded.
    """
    name, *arguments = spec.split(":", 2)
    if name not in REWARDS and len(arguments) != 1:
        raise ValueError(f"{spec} is unknown; choose of {', '.join(REWARDS)} or MODULE:FUNCTION")
    try:
        if name in REWARDS:
            return REWARDS[name](device, *arguments)
        sys.path.append(os.getcwd())
        return getattr(importlib.import_module(name), arguments[0])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:          # no network, a damaged file, an error in the reader's code
        why = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
        raise ValueError(f"{spec} cannot be loaded, {why}") from None
