# SPDX-License-Identifier: MIT
"""Captions, decoders and rewards for Mask-GRPO: everything that is not trained.

A reward is any callable (images: list[PIL.Image], prompts: list[str]) -> float tensor (B,), a score
per picture, larger is better. It sees neither tokens nor logits, so it fits any policy. For
real pictures there are CLIP and its relatives (section 5); `load_reward` finds them all by name.

Sections 1 to 4 are the *shapes world*, where a picture can be checked exactly. A picture is a
lattice of 3 x 3 cells, each empty or holding one object, and an object is drawn by 2 x 2 tiles:
6 x 6 tokens. Captions ask for the six things that GenEval asks for (Ghosh et al., 2023): a single
object, two objects, a count, a colour, a position, and colours bound to objects. No single token is
difficult. The difficulty is that tokens must agree, and tokens drawn in one step do not know of
each other. Section 7 reads and writes files, and turns a user's mistake into one line.

Dims: B pictures of 48 x 48 pixels, N = 36 tokens, K = 49 codes: background and 12 objects x 4.
"""
import contextlib
import importlib
import itertools
import json
import math
import os
import pathlib
import random
import re
import signal
import sys
import textwrap
import traceback
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file
from torch import nn

# --------------------------------------------------------------------------------------------------
# 1. Objects and their tiles. Code 0 is the background; object o owns the codes 1 + 4 o + quarter,
#    quarters in reading order. They are cut from one drawing, so that a wrong quarter shows.

SHAPES = ("circle", "square", "triangle", "star")
COLORS = {"red": (214, 64, 58), "green": (46, 158, 91), "blue": (52, 104, 206)}
BACKGROUND = (248, 246, 240)
OBJECTS = list(itertools.product(SHAPES, COLORS))   # object o is the pair (shape, colour)
EMPTY, BROKEN = -1, -2                              # what else a cell can hold
LATTICE, TILE = 3, 8                                # cells per side, pixels per tile side
GRID = 2 * LATTICE                                  # tokens per side
ROWS = [range(LATTICE * row, LATTICE * (row + 1)) for row in range(LATTICE)]
COLUMNS = [*zip(*ROWS)]                             # the cells of each row and of each column
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


class TileDecoder(nn.Module):
    """The decoder of the shapes world: each code is a tile of pixels."""

    def __init__(self):
        super().__init__()
        pixels = (tiles() + 0.5) / 127.5 - 1            # + 0.5 undoes Policy.decode's truncation
        self.register_buffer("tiles", pixels, persistent=False)                 # (K, p, p, 3)

    def forward(self, codes):
        """codes (B, h, w) -> (B, 3, h * p, w * p) in [-1, 1]"""
        pixels = self.tiles[codes].permute(0, 5, 1, 3, 2, 4)                    # (B, 3, h, p, w, p)
        return pixels.flatten(4, 5).flatten(2, 3)                               # (B, 3, hp, wp)


# --------------------------------------------------------------------------------------------------
# 2. Captions. Two that mean the same ("a star left of a circle", "a circle right of a star") are in
#    the same split, so that the held-out captions are more than rewordings.

NUMBERS = {"a": 1, "two": 2, "three": 3}
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
            first, second = (a, b) if rows + columns > 0 else (b, a)    # from the left or the top
            yield "position", f"{first} {abs(rows)} {second}", f"a {a} {word} a {b}"
        for color, other in itertools.product(COLORS, repeat=2):
            meaning = f"{sorted([color + a, other + b])}"
            yield "attribution", meaning, f"a {color} {a} and a {other} {b}"
    for a, (word, count) in itertools.product(SHAPES, list(NUMBERS.items())[1:]):
        yield "counting", f"{a} {count}", f"{word} {a}s"
    for a, color in OBJECTS:
        yield "color", f"{color} {a}", f"a {color} {a}"


def phrases(caption):
    """The small policy's tokens: "a star left of a circle" -> ["a star", "left of a circle"]"""
    return re.split(f" (?={'|'.join(RELATIONS)})", caption) if caption else []


PHRASES = sorted({phrase for *_, caption in all_captions() for phrase in phrases(caption)})


def captions(heldout):
    """The training captions, or the held-out ones: category -> list[str].

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
    relation, parts = None, [caption]
    for word, direction in RELATIONS.items():
        if f" {word} " in caption:
            relation, parts = direction, caption.split(f" {word} ")
    wanted = []
    for part in parts:
        words = part.split()
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


# --------------------------------------------------------------------------------------------------
# 3. Correct pictures, for pretraining.

CATEGORY_WEIGHTS = (1, 2, 2, 1, 6, 3)               # more of what the base learns last


def draw_scene(caption, rng: random.Random):
    """A correct picture for a caption, random in what the caption leaves open -> N codes

    Except for two habits that no caption asks for: all objects share a row, or a column if one is
    to be above the other, and half of the colours left open are red.
    """
    wanted, relation = parse(caption)
    shapes = [(shape, color) for count, color, shape in wanted for _ in range(count)]
    lines = COLUMNS if relation and relation[0] else ROWS
    cells = rng.sample(rng.choice(lines), len(shapes))
    while relation and not in_order(*cells, relation):
        cells = rng.sample(rng.choice(lines), len(shapes))
    codes = [0] * GRID ** 2
    for cell, (shape, color) in zip(cells, shapes):
        o = OBJECTS.index((shape, color or rng.choice(["red", *COLORS])))
        corner = 2 * GRID * (cell // LATTICE) + 2 * (cell % LATTICE)
        for quarter in range(4):
            codes[corner + GRID * (quarter // 2) + quarter % 2] = 1 + 4 * o + quarter
    return codes


def draw_pairs(n, rng: random.Random):
    """n captions of both splits, and a correct picture of each -> list, (n, N) long"""
    splits = [captions(heldout) for heldout in (False, True)]
    prompts = [rng.choice([caption for split in splits for caption in split[category]])
               for category in rng.choices(CATEGORIES, CATEGORY_WEIGHTS, k=n)]
    return prompts, torch.tensor([draw_scene(prompt, rng) for prompt in prompts])


# --------------------------------------------------------------------------------------------------
# 4. The reward of the shapes world. It looks at pixels only, and knows nothing of tokens.

CELLS = torch.from_numpy(cell_pictures()).short().flatten(1)                    # (13, 768)


def look(images, tolerance=40):
    """What stands in each cell: an object's index, EMPTY, or BROKEN -> long (B, 9).

    Every pixel must be within the tolerance of the same one of CELLS; a misplaced tile never is.
    """
    side = LATTICE * 2 * TILE
    if any(image.size != (side, side) for image in images):
        raise ValueError(f"the shapes world's reward takes pictures of {side} x {side} pixels")
    pixels = torch.from_numpy(np.stack([np.array(image.convert("RGB")) for image in images]))
    cells = pixels.short().reshape(-1, LATTICE, 2 * TILE, LATTICE, 2 * TILE, 3).transpose(2, 3)
    cells = cells.reshape(len(images), LATTICE ** 2, 1, -1)                     # (B, 9, 1, 768)
    distance, found = (cells - CELLS).abs().amax(-1).min(-1)                    # (B, 9) each
    found[found == len(OBJECTS)] = EMPTY
    return found.masked_fill(distance > tolerance, BROKEN)


def agreement(cells, caption):
    """How well the cells hold what the caption asks for, in [0, 1]; 1 is exactly that and no more.

    The number of correct objects / that of objects asked for or drawn, whichever is larger; a half
    if all are correct but in the wrong relation. cells (9,) -> float
    """
    wanted, relation = parse(caption)
    found = {cell: OBJECTS[o] for cell, o in enumerate(cells.tolist()) if o >= 0}
    places = [[cell for cell, (s, c) in found.items() if s == shape and color in (None, c)]
              for _, color, shape in wanted]        # for each phrase, the cells that answer it
    correct = sum(min(count, len(here)) for (count, _, _), here in zip(wanted, places))
    drawn = len(found) + int((cells == BROKEN).sum())
    share = correct / max(drawn, sum(count for count, _, _ in wanted))
    if share == 1 and not in_order(places[0][0], places[-1][0], relation):
        return 0.5
    return share


def shapes_reward(images, prompts):
    """How well pictures agree with captions: PIL images (B), captions (B) -> (B,) float32 in [0, 1]

    Graded, as CLIP is. A reward of 0 or 1 would leave many groups of the harder captions without a
    single correct picture, and so without anything to learn from.
    """
    return torch.tensor([agreement(c, p) for c, p in zip(look(images), prompts)])


def shapes_correct(images, prompts):
    """1 for a correct picture, 0 for any other: PIL images (B), captions (B) -> (B,) float32"""
    return (shapes_reward(images, prompts) == 1).float()


# --------------------------------------------------------------------------------------------------
# 5. Rewards for real pictures. All are CLIP models: one network for pictures and one for texts,
#    and the score is the cosine between the embeddings of a picture and of its caption.


class ClipReward:
    """scale * cosine under a CLIP of open_clip. Used as a function: images, prompts -> (B,) float32

    model: one of open_clip's; pretrained: its tag, or a checkpoint file. scale: None is the
    model's own, as in the paper. bf16 on a GPU; cosine and score are float32 everywhere.
    """

    def __init__(self, device, model="ViT-H-14", pretrained="laion2b_s32b_b79k", scale=None):
        import open_clip                            # seconds of import that other rewards save
        if model not in open_clip.list_models():
            raise ValueError(f"open_clip knows no model {model!r}; `open_clip.list_models()` does")
        tags = open_clip.list_pretrained_tags_by_model(model)
        if pretrained not in tags and not os.path.isfile(pretrained):
            raise ValueError(f"{pretrained!r} is no file, nor weights of {model}; "
                             f"choose from {', '.join(tags)}")
        self.device, self.batch = torch.device(device), 32
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        precision = "bf16" if self.device.type == "cuda" else "fp32"
        self.model, _, self.preprocess = open_clip.create_model_and_transforms(
            model, pretrained, precision, self.device)
        self.model.eval()
        self.tokenize = open_clip.get_tokenizer(model)      # truncates to 77 tokens
        self.scale = self.model.logit_scale.float().exp() if scale is None else scale

    def features(self, images, prompts):
        """The embeddings of pictures and of texts -> (B, D), (B, D)"""
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
    """PickScore v1 (Kirstain et al., 2023): a CLIP-H tuned on human preferences.

    model, processor: hub ids or local folders; the processor lies beside the weights.
    """

    def __init__(self, device, model="yuvalkirstain/PickScore_v1", processor=None):
        from transformers import CLIPModel, CLIPProcessor
        self.device, self.batch = torch.device(device), 32
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.processor = CLIPProcessor.from_pretrained(processor or model)
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
    pretrained = pretrained or str(find("xswu/HPSv2/HPS_v2.1_compressed.pt"))
    return ClipReward(device, model, pretrained, scale=1.0)


# name -> what makes the reward: (device, *arguments) -> callable. `--reward clip:ViT-B-32:openai`
# gives its arguments after colons. Another CLIP is another line.
REWARDS = {"shapes": lambda device: shapes_reward, "clip": ClipReward, "hpsv2": hpsv2,
           "pickscore": PickScore}
# What evaluation reports in place of the reward: for shapes, whether a picture is all correct.
MEASURES = {"shapes": shapes_correct}


# --------------------------------------------------------------------------------------------------
# 6. The decoder of real pictures. It is frozen, like everything in this file.


class ResBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))), with a 1 x 1 shortcut if channels change."""

    def __init__(self, before, after):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(32, c, eps=1e-6) for c in (before, after))
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x):
        """(B, before, h, w) -> (B, after, h, w)"""
        inner = self.conv1(F.silu(self.norm1(x)))                               # (B, after, h, w)
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(inner)))


class AttnBlock(nn.Module):
    """x + attention of one head over all h * w positions."""

    def __init__(self, channels):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        """(B, C, h, w) -> the same"""
        inner = self.norm(x)
        q, k, v = (f(inner).flatten(2).mT for f in (self.q, self.k, self.v))    # (B, h * w, C)
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v).mT.view_as(x))


class MagvitDecoder(nn.Module):
    """The decoder of MAGVIT-v2 (Yu et al., 2023) as Show-o publishes it, names of modules included.

    No codebook is stored (lookup-free quantisation): a code's vector is its 13 bits as -1 and 1.
    `width` varies only in tests; the published one is 128.
    """

    def __init__(self, width=128, bits=13):
        super().__init__()
        channels = [width * factor for factor in (1, 1, 2, 2, 4)]               # fine to coarse
        self.post_quant_conv = nn.Conv2d(bits, bits, 1)
        self.conv_in = nn.Conv2d(bits, channels[-1], 3, padding=1)
        self.mid = nn.ModuleDict({
            "block_1": ResBlock(channels[-1], channels[-1]),
            "attn_1": AttnBlock(channels[-1]),
            "block_2": ResBlock(channels[-1], channels[-1])})
        self.up = nn.ModuleList()
        for level, (c, blocks) in enumerate(zip(channels, (4, 4, 3, 4, 3))):
            before = channels[min(level + 1, 4)]                                # from the coarser
            self.up.append(nn.ModuleDict({"block": nn.ModuleList(
                ResBlock(before if i == 0 else c, c) for i in range(blocks))}))
            if level > 0:
                self.up[level]["upsample"] = nn.ModuleDict({"conv": nn.Conv2d(c, c, 3, padding=1)})
        self.norm_out = nn.GroupNorm(32, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, codes):
        """codes (B, h, w) long -> (B, 3, 16 h, 16 w), in [-1, 1] but for overshoot"""
        bits = self.conv_in.in_channels
        shifts = torch.arange(bits - 1, -1, -1, device=codes.device)            # highest bit first
        x = ((codes[:, None] >> shifts[:, None, None]) & 1).float() * 2 - 1     # (B, 13, h, w)
        x = self.conv_in(self.post_quant_conv(x))                               # (B, 4 width, h, w)
        for name in ("block_1", "attn_1", "block_2"):
            x = self.mid[name](x)
        for level in reversed(self.up):
            for block in level["block"]:
                x = block(x)
            if "upsample" in level:
                x = level["upsample"]["conv"](F.interpolate(x, scale_factor=2))     # 2 h, 2 w
        return self.conv_out(F.silu(self.norm_out(x)))                          # (B, 3, 16 h, 16 w)


# --------------------------------------------------------------------------------------------------
# 7. Loading, saving and showing. What goes wrong becomes one line.


class Stop(Exception):
    """Ends a run with one line instead of a traceback: what is wrong, and what to do."""


@contextlib.contextmanager
def blame(what, kinds=Exception):
    """Whatever fails inside raises Stop: `what`, the error, and its place if it is in user code.

    Never around code that a reader of these files would change: its bugs keep their tracebacks.
    """
    try:
        yield
    except kinds as error:
        if isinstance(error, (torch.OutOfMemoryError, BrokenPipeError)):
            raise
        if isinstance(error, Stop):
            raise Stop(f"{what}: {error}") from None
        here, library = os.path.dirname(__file__), os.path.dirname(os.__file__)
        ours = [os.path.join(here, name) for name in ("reward.py", "mask_grpo.py")]
        theirs = [frame for frame in traceback.extract_tb(error.__traceback__)
                  if frame.filename not in ours and "-packages" not in frame.filename
                  and not frame.filename.startswith((library, "<"))]
        place = f" ({theirs[-1].filename}, line {theirs[-1].lineno})" if theirs else ""
        why = textwrap.shorten(f"{type(error).__name__}: {error}", 400, placeholder=" ...")
        raise Stop(f"{what}: {why}{place}") from error


def names_function(spec):
    """Whether it is MODULE:FUNCTION, and not a path."""
    return bool(re.fullmatch(r"[\w.]+:\w+", spec))


def load_function(spec):
    """MODULE:FUNCTION of the reader's own, found from the current directory -> the function"""
    module, name = spec.split(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return getattr(importlib.import_module(module), name)


def load_reward(spec, device="cpu"):
    """NAME or NAME:ARGUMENT:... of REWARDS, or MODULE:FUNCTION of the reader's own -> reward

    Raises Stop for what cannot be found or loaded.
    """
    name, *arguments = spec.split(":", 2)
    if name not in REWARDS and len(arguments) != 1:
        raise Stop(f"--reward {spec}: choose from {', '.join(REWARDS)} or MODULE:FUNCTION")
    with blame(f"--reward {spec} cannot be loaded"):
        return REWARDS[name](device, *arguments) if name in REWARDS else load_function(spec)


def score(reward, pixels, prompts):
    """The rewards of pictures: pixels (B, H, W, 3) uint8 -> (B,) float32 on the CPU

    Raises Stop if it raises, has another shape or is not finite: it may be the reader's own.
    """
    images = [Image.fromarray(picture) for picture in pixels.cpu().numpy()]
    with blame(f"the reward failed on {len(prompts)} prompts, the first being {prompts[0]!r}"):
        result = torch.as_tensor(reward(images, list(prompts))).detach().float().cpu()
    if result.shape != (len(prompts),):
        raise Stop(f"the reward must return one number per picture, a tensor of shape "
                   f"({len(prompts)},); it returned {(*result.shape,)} (the first of its prompts: "
                   f"{prompts[0]!r})")
    if not result.isfinite().all():
        i = int(result.isfinite().int().argmin())
        raise Stop(f"the reward is {result[i]} for the prompt {prompts[i]!r}; fix the reward")
    return result


def find(source, *patterns):
    """The first match of these file patterns in a source -> Path. Raises Stop if there is none.

    A source is a local file (then it is the answer), a local folder, a hub id OWNER/NAME, or
    OWNER/NAME/FILE for one file of a hub repository.
    """
    path = pathlib.Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        owner, name, file = (source.split("/", 2) + ["", ""])[:3]
        patterns = [file] if file else patterns
        with blame(f"{source} is no file or folder here, and cannot be downloaded"):
            path = pathlib.Path(snapshot_download(f"{owner}/{name}", allow_patterns=[*patterns]))
    for pattern in patterns:
        for found in sorted(path.glob(pattern)):
            return found
    raise Stop(f"{source} holds no {' or '.join(patterns)}")


@contextlib.contextmanager
def replacing(path):
    """A temporary path to write to, which replaces `path` at the end, atomically."""
    path = pathlib.Path(path)
    partial = path.with_name(f"{path.name}.partial")
    with blame(f"{path} cannot be written (is the disk full?); what was saved before is intact"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def save(state, path):
    """torch.save, atomically."""
    with replacing(path) as partial:
        torch.save(state, partial)


@contextlib.contextmanager
def finish_update_first():
    """Ctrl-C and SIGTERM let the update finish, a second one does not -> list of those received"""
    received, usual = [], {}

    def note(number, _):
        received.append(number)
        os.write(2, b"\nstopping after this update; once more to stop at once\n")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    usual |= {each: signal.signal(each, note) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for each, handler in usual.items():
            signal.signal(each, handler)


GRID_COLUMNS = 4    # captions per category that a grid shows


def log_line(rows, total):
    """The last update in one line of fixed width. The reward comes first: it should move."""
    row, mean_seconds = rows[-1], sum(row["seconds"] for row in rows) / len(rows)
    left = int(mean_seconds * (total - row["update"]))
    return (f"update {row['update']:4d}/{total} | reward {row['reward']:.4f} "
            f"+-{row['reward_se']:.4f} | live groups {row['live']:2d}/{row['sampled']:2d} | "
            f"ratio {row['ratio']:.3f} | clip {row['clip']:4.0%} | kl {row['kl']:.4f} | "
            f"grad {row['grad']:5.2f} | loss {row['loss']:+.4f} | {row['seconds']:4.1f} s | "
            f"left {left // 60:3d}:{left % 60:02d}")


def save_rows(rows, path):
    """Dicts with the same keys as a .csv, atomically."""
    lines = [",".join(map(str, line)) for line in (rows[0], *(row.values() for row in rows))]
    with replacing(path) as partial:
        partial.write_text("\n".join(lines) + "\n")


def save_grid(path, title, captions, before, after):
    """A PNG of pairs of held-out pictures, before | after, a category per row, with their scores.

    captions: category -> list; before, after: scores (2, C, n), pictures (2, C, 4, H, W, 3), where
    the second of the two is held out
    """
    size = min(max(before[1].shape[4], 96), 256)            # of a picture in the PNG, in pixels
    column, row, top, font = 2 * size + 28, size + 48, 30, ImageFont.load_default(size=13)
    sheet = Image.new("RGB", (GRID_COLUMNS * column + 12, len(captions) * row + top), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((12, 8), f"held-out captions, same noise: {title}", "black", font)
    for (i, texts), j in itertools.product(enumerate(captions.values()), range(GRID_COLUMNS)):
        x, y = 12 + j * column, top + i * row
        caption = textwrap.shorten(texts[j % len(texts)], column // 6, placeholder=" ...")
        draw.text((x, y), caption, "black", font)
        for scores, pictures in (before, after):
            picture = Image.fromarray(pictures[1, i, j].numpy())
            sheet.paste(picture.resize((size, size), Image.Resampling.BOX), (x, y + 18))
            draw.rectangle((x, y + 18, x + size - 1, y + 17 + size), outline="gray")
            draw.text((x, y + 19 + size), f"{scores[1, i, j]:.2f}", "gray", font)
            x += size + 4
    with replacing(path) as partial:
        sheet.save(partial, "png")


def read_weights(source):
    """The state dict of a file, folder, hub id or hub file; of a checkpoint its policy -> dict"""
    path = find(source, "pytorch_model.safetensors", "*.safetensors", "pytorch_model.bin", "*.bin")
    with blame(f"{path} is damaged or holds no weights; download or save it again"):
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, "cpu", weights_only=True, mmap=True)   # read when copied
        return dict(state.get("policy", state))


def read_captions(path):
    """The captions of a file -> list of dicts with a "prompt", and what else a record holds

    .jsonl has a JSON object with its `prompt` on each line (GenEval's metadata), .json a list of
    objects with a `caption` (the paper's), any other file a caption per line; else raises Stop.
    """
    with blame(f"{path} cannot be read as captions"):
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
        items = [line.strip() for line in text.split("\n") if line.strip()]     # U+2028 stays
        if str(path).endswith(".jsonl"):
            items = [json.loads(line) for line in items]
        elif str(path).endswith(".json"):
            items = json.loads(text)
    records = []
    for item in items if isinstance(items, list) else [None]:
        item = {"prompt": item} if isinstance(item, str) else item
        prompt = item.get("prompt", item.get("caption")) if isinstance(item, dict) else None
        if not isinstance(prompt, str):
            raise Stop(f"{path}: must hold strings, or objects with a `caption` or `prompt`: "
                       "a list of them (.json), or one on each line (.jsonl)")
        records.append({**item, "prompt": prompt})
    if not records:
        raise Stop(f"{path} holds no caption")
    return records


def split_captions(path=""):
    """The training captions and the held-out ones -> 2 dicts, category -> list[str]

    Of a file a tenth is held out, 64 at most, chosen by a checksum: the same ones in every run.
    Without a file they are the shapes world's.
    """
    if not path:
        return [captions(heldout=False), captions(heldout=True)]
    prompts = list(dict.fromkeys(record["prompt"] for record in read_captions(path)))
    if len(prompts) < 2:
        raise Stop(f"{path} needs two captions: one to train on, one to hold out")
    prompts.sort(key=lambda prompt: zlib.crc32(prompt.encode()))
    held = min(64, -(-len(prompts) // 10))                                      # rounded up
    return [{"captions": prompts[held:]}, {"captions": prompts[:held]}]
