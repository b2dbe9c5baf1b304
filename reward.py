# SPDX-License-Identifier: MIT
"""What a good picture is: captions and rewards for Mask-GRPO.

A reward is any callable (images: list[PIL.Image], prompts: list[str]) -> float tensor (B,): one
number per picture, and larger is better. It sees neither tokens nor logits, so it works with any
policy.

Sections 1 to 3 are the *shapes world*, in which a picture can be judged exactly. A picture is a
lattice of 3 x 3 cells. Each cell has 2 x 2 tiles, and is empty or holds one object of one, two or
four tiles. So a picture has 6 x 6 tokens. Captions ask for the six things that GenEval asks for
(Ghosh et al., 2023): a single object, two objects, a count, a colour, a position, and colours bound
to objects. No single token is difficult. The difficulty is that tokens must agree with each other,
although tokens drawn in the same step are drawn independently.

Dims: B pictures of 48 x 48 pixels, b of them in a batch, N = 36 tokens, K = 34 codes (the
background and the tiles of 12 objects), p = TILE pixels per side of a tile, D size of a CLIP
embedding.
"""
import contextlib
import importlib.util
import itertools
import math
import pathlib
import random
import typing

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image, ImageDraw

# --------------------------------------------------------------------------------------------------
# 1. Objects and their tiles. A circle and a star fill a cell, a rectangle half of one, and a dot a
#    quarter. The tiles of an object are cut from one drawing, so a tile in the wrong place can be
#    seen. Sizes differ because a schedule can be made to fit objects of a single size
#    (assets/study.md tells how that went).

SHAPES = {"circle": 64, "dot": 64, "rectangle": 4, "star": 10}      # corners of each polygon
SIZES = {"circle": (2, 2), "dot": (1, 1), "rectangle": (1, 2), "star": (2, 2)}  # tiles down, across
COLORS = {"red": (214, 64, 58), "green": (46, 158, 91), "blue": (52, 104, 206)}
BACKGROUND = (248, 246, 240)
OBJECTS = list(itertools.product(SHAPES, COLORS))   # object o is the pair (shape, colour)
LATTICE = 3                                         # cells per side
TILE = 8                                            # pixels per side of a tile
CELL = 2 * TILE                                     # pixels per side of a cell
GRID = 2 * LATTICE                                  # tokens per side
EMPTY = -1                                          # a cell that holds nothing,
BROKEN = -2                                         # or something that is not an object


def draw_object(shape, color):
    """A cell that holds an object, at its lower left -> uint8 array (2p, 2p, 3), p = TILE"""
    size = 8 * CELL                             # drawn too large, then averaged
    corners = SHAPES[shape]
    points = []
    for i in range(corners):
        radius = 0.46 * size
        angle = 2 * math.pi * i / corners       # clockwise from the top
        if shape == "star" and i % 2 == 1:      # its inner corners
            radius = 0.2 * size
        if shape == "rectangle":                # an upright square, which is then flattened
            radius = 0.62 * size
            angle += math.pi / 4
        points.append((radius * math.sin(angle), -radius * math.cos(angle)))
    heights = [y for _, y in points]
    middle = (min(heights) + max(heights)) / 2
    moved = [(size / 2 + x, size / 2 + y - middle) for x, y in points]

    drawing = Image.new("RGB", (size, size), BACKGROUND)
    ImageDraw.Draw(drawing).polygon(moved, fill=COLORS[color])
    rows, columns = SIZES[shape]
    drawing = drawing.resize((columns * TILE, rows * TILE), Image.Resampling.BOX)
    cell = Image.new("RGB", (CELL, CELL), BACKGROUND)
    cell.paste(drawing, (0, CELL - rows * TILE))
    return np.asarray(cell)


def draw_cells():
    """What a cell can look like, the 12 objects and then the empty one -> uint8 (13, 2p, 2p, 3)"""
    cells = [draw_object(shape, color) for shape, color in OBJECTS]
    cells.append(np.full((CELL, CELL, 3), BACKGROUND, np.uint8))
    return torch.from_numpy(np.stack(cells))


def cut_tiles(cells):
    """The codebook as pixels, and the codes of each cell -> uint8 (K, p, p, 3), long (13, 2, 2)

    Code 0 is a tile of background. Every other tile has a code of its own, in reading order.
    """
    background = cells[-1, :TILE, :TILE]
    tiles = [background]
    codes = torch.zeros(len(cells), 2, 2, dtype=torch.long)
    for i, cell in enumerate(cells):
        for row in range(2):
            for column in range(2):
                tile = cell[row * TILE:(row + 1) * TILE, column * TILE:(column + 1) * TILE]
                if not tile.equal(background):
                    codes[i, row, column] = len(tiles)
                    tiles.append(tile)
    return torch.stack(tiles), codes


CELLS = draw_cells()
TILES, CODES = cut_tiles(CELLS)
CODEBOOK_SIZE = len(TILES)

# --------------------------------------------------------------------------------------------------
# 2. Captions, and a correct picture for each. Some captions are held out from RL, though not from
#    pretraining. Captions with the same meaning ("a star left of a circle", "a circle right of a
#    star") are in the same split, so the held-out ones are not mere rewordings of the others.

NUMBERS = {"two": 2, "three": 3}
# how to get from the first object to the second: (rows down, columns to the right)
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 0), "below": (-1, 0)}
# the categories and their weights in pretraining: more of what the base learns most slowly
CATEGORIES = {"single": 1, "two": 2, "counting": 2, "color": 1, "position": 6, "attribution": 3}


class Caption(typing.NamedTuple):
    """A caption, and what it asks for"""
    text: str
    category: str                   # one of CATEGORIES
    meaning: str                    # the same for captions that ask for the same pictures
    wanted: list                    # the objects: (count, colour or None, shape), ...
    relation: tuple | None = None   # a value of RELATIONS


def all_captions():
    """Every caption of the shapes world: yields Caption"""
    for a in SHAPES:
        yield Caption(f"a {a}", "single", a, [(1, None, a)])
    for a, b in itertools.permutations(SHAPES, 2):
        pair = [(1, None, a), (1, None, b)]
        yield Caption(f"a {a} and a {b}", "two", str(sorted([a, b])), pair)
        for word, (rows, columns) in RELATIONS.items():
            axis = "over" if columns == 0 else "beside"
            meaning = f"{a} {axis} {b}"             # seen from the top, or from the left
            if rows + columns < 0:
                meaning = f"{b} {axis} {a}"
            yield Caption(f"a {a} {word} a {b}", "position", meaning, pair, (rows, columns))
        for c, d in itertools.product(COLORS, repeat=2):
            yield Caption(f"a {c} {a} and a {d} {b}", "attribution", str(sorted([c + a, d + b])),
                          [(1, c, a), (1, d, b)])
    for a in SHAPES:
        for word, count in NUMBERS.items():
            yield Caption(f"{word} {a}s", "counting", f"{a} {count}", [(count, None, a)])
    for a, color in OBJECTS:
        yield Caption(f"a {color} {a}", "color", f"{color} {a}", [(1, color, a)])


# what each caption asks for: the generator that writes a caption also says what it means
WANTED = {caption.text: (caption.wanted, caption.relation) for caption in all_captions()}


def phrases(caption):
    """The text tokens of a small policy: "a star and a circle" -> ["a star", "and a circle"]"""
    number, _, plural = caption.partition(" ")
    if number in NUMBERS:
        return [number, plural]
    for word in ("and", *RELATIONS):
        first, found, second = caption.partition(f" {word} ")
        if found:
            return [first, f"{word} {second}"]
    if caption:
        return [caption]
    return []


def all_phrases():
    """The phrases of all captions, in alphabetical order -> list of str"""
    found = set()
    for caption in WANTED:
        found.update(phrases(caption))
    return sorted(found)


PHRASES = all_phrases()


def captions(heldout):
    """The training captions, or the held-out ones: category -> list[str]

    Every fifth meaning of a category is held out. Training captions contain all text tokens.
    """
    chosen = {}
    for category in CATEGORIES:
        mine = [caption for caption in all_captions() if caption.category == category]
        meanings = sorted({caption.meaning for caption in mine})
        held = meanings[::5]
        chosen[category] = [x.text for x in mine if (x.meaning in held) == heldout]
    return chosen


def in_order(first, second, relation):
    """Whether cells `first` and `second` stand in the relation; True if there is none"""
    if relation is None:
        return True
    rows = second // LATTICE - first // LATTICE
    columns = second % LATTICE - first % LATTICE
    return rows * relation[0] + columns * relation[1] > 0


def draw_scene(caption, rng: random.Random):
    """A correct picture for a caption, random in what the caption leaves open -> N codes

    Two conventions that the captions do not mention keep the drawings simple. All objects share a
    row (or a column, if one is to be above the other). Half of the colours left open are red.
    """
    wanted, relation = WANTED[caption]
    objects = []
    for count, color, shape in wanted:
        objects += [(shape, color)] * count
    cells = np.arange(LATTICE ** 2).reshape(LATTICE, LATTICE)
    lines = cells.tolist()
    if relation and relation[0] != 0:           # above or below
        lines = cells.T.tolist()

    places = rng.sample(rng.choice(lines), len(objects))
    while relation and not in_order(places[0], places[1], relation):
        places = rng.sample(rng.choice(lines), len(objects))
    codes = np.zeros((LATTICE, 2, LATTICE, 2), int)                     # (row, half, column, half)
    for cell, (shape, color) in zip(places, objects):
        if color is None:
            color = rng.choice(["red", *COLORS])        # red twice in four
        codes[cell // LATTICE, :, cell % LATTICE] = CODES[OBJECTS.index((shape, color))]
    return codes.flatten().tolist()


def draw_pairs(n, rng: random.Random, caption_noise=0.0):
    """n captions from both splits, and a picture for each -> list of str, (n, N) long

    The picture is a correct one, except that a share `caption_noise` is drawn for a random caption
    of the same category: as in data from the web, captions may be wrong. Some of these pictures fit
    by chance. With a share of 0.5, 46% of all captions are wrong.
    """
    training = captions(heldout=False)
    heldout = captions(heldout=True)
    prompts = []
    pictures = []
    for category in rng.choices(list(CATEGORIES), CATEGORIES.values(), k=n):
        choices = training[category] + heldout[category]
        prompt = rng.choice(choices)
        shown = prompt
        if rng.random() < caption_noise:
            shown = rng.choice(choices)
        prompts.append(prompt)
        pictures.append(draw_scene(shown, rng))
    return prompts, torch.tensor(pictures)


# --------------------------------------------------------------------------------------------------
# 3. The reward of the shapes world. It looks at pixels only and knows nothing of tokens.


def look(images, tolerance=40):
    """What stands in each cell: an object's index, EMPTY, or BROKEN -> long (B, 9)

    All pixels of the cell must be within the tolerance of one and the same entry of CELLS. A tile
    in the wrong place never passes.
    """
    arrays = [np.array(image.convert("RGB")) for image in images]
    pixels = torch.from_numpy(np.stack(arrays)).short()                     # (B, 48, 48, 3)
    pixels = pixels.reshape(-1, LATTICE, CELL, LATTICE, CELL, 3).transpose(2, 3)    # cells first
    cells = pixels.reshape(len(images), LATTICE ** 2, 1, -1)                # (B, 9, 1, 768)
    known = CELLS.short().flatten(1)                                        # (13, 768)
    furthest = (cells - known).abs().amax(-1)                               # (B, 9, 13)
    distance, found = furthest.min(-1)                                      # (B, 9) each
    found[found == len(OBJECTS)] = EMPTY
    return found.masked_fill(distance > tolerance, BROKEN)


def agreement(cells, caption):
    """How well the cells show what the caption asks for, in [0, 1]; 1 is exactly that and no more

    It is the number of correct objects, divided by the larger of two numbers: the objects asked for
    and those drawn, broken ones included. It is 0.5 if only the relation is wrong.
    cells (9,) -> float
    """
    wanted, relation = WANTED[caption]
    asked = 0
    correct = 0
    places = []                                 # for each phrase, the cells that match it
    for count, color, shape in wanted:
        here = []
        for cell, o in enumerate(cells.tolist()):
            if o >= 0 and OBJECTS[o][0] == shape and color in (None, OBJECTS[o][1]):
                here.append(cell)
        asked += count
        correct += min(count, len(here))
        places.append(here)
    drawn = int((cells != EMPTY).sum())
    share = correct / max(drawn, asked)
    if share == 1 and not in_order(places[0][0], places[-1][0], relation):
        return 0.5
    return share


def shapes_reward(images, prompts):
    """How well pictures agree with their captions: PIL images (B), captions (B) -> (B,) in [0, 1]

    It is graded. With a reward of only 0 or 1, many groups of the harder captions would have no
    correct picture, and therefore nothing to learn from.
    """
    found = look(images)                                                    # (B, 9)
    return torch.tensor([agreement(cells, prompt) for cells, prompt in zip(found, prompts)])


def shapes_correct(images, prompts):
    """1 for a picture that is entirely correct, 0 for any other -> (B,) float32"""
    return (shapes_reward(images, prompts) == 1).float()


# --------------------------------------------------------------------------------------------------
# 4. Rewards for real pictures. All three are CLIP models: one network embeds pictures, another
#    embeds texts, and the reward is the (scaled) cosine of the two embeddings.


def cosine(embed, scale, batch=32):
    """The reward scale * cosine. embed: images, prompts -> their embeddings, (B, D) each"""
    @torch.no_grad()
    def reward(images, prompts):
        rewards = []
        for i in range(0, len(images), batch):
            of_images, of_texts = embed(images[i:i + batch], prompts[i:i + batch])      # (b, D)
            rewards.append(scale * F.cosine_similarity(of_images, of_texts))
        return torch.cat(rewards).cpu()                                     # (B,)
    return reward


def clip(device, model="ViT-H-14", pretrained="laion2b_s32b_b79k", scale=None):
    """Any CLIP of open_clip. pretrained: a tag or a file. scale: None means the model's own"""
    import open_clip  # slow, so only here
    net, preprocess = open_clip.create_model_from_pretrained(model, pretrained, device=device)
    net.eval()
    tokenize = open_clip.get_tokenizer(model)       # truncates texts to 77 tokens
    if scale is None:
        scale = net.logit_scale.detach().exp()

    def embed(images, prompts):
        pixels = torch.stack([preprocess(image) for image in images])       # (b, 3, H, W)
        tokens = tokenize(prompts)                                          # (b, 77)
        return net.encode_image(pixels.to(device)), net.encode_text(tokens.to(device))
    return cosine(embed, scale)


def hpsv2(device, model="ViT-H-14", pretrained=None):
    """HPS v2.1: a CLIP fine-tuned on human preferences; the score is a cosine

    The successor (February 2024) of the HPS v2 of Wu et al. (2023).
    """
    if pretrained is None:
        pretrained = hf_hub_download("xswu/HPSv2", "HPS_v2.1_compressed.pt")
    return clip(device, model, pretrained, scale=1)


def pickscore(device, model="yuvalkirstain/PickScore_v1"):
    """PickScore v1 (Kirstain et al., 2023): a CLIP fine-tuned on human preferences, in transformers

    ValueError if the file lacks weights, which transformers would fill with random numbers.
    """
    from transformers import CLIPModel, CLIPProcessor
    processor = CLIPProcessor.from_pretrained(model)
    net, info = CLIPModel.from_pretrained(model, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"its weights lack {', '.join(missing[:3])}; use a complete checkpoint")
    net.to(device).eval()

    def embed(images, prompts):
        inputs = processor(text=prompts, images=images, return_tensors="pt", truncation=True,
                           padding="max_length", max_length=77).to(device)
        output = net(**inputs)
        return output.image_embeds, output.text_embeds
    return cosine(embed, net.logit_scale.detach().exp())


# --------------------------------------------------------------------------------------------------
# 5. A reward by name, and its use.

REWARDS = {"shapes": shapes_reward, "correct": shapes_correct}
# Each makes a reward from (device, *arguments). `clip:ViT-B-32:openai` has two arguments.
MODELS = {"clip": clip, "hpsv2": hpsv2, "pickscore": pickscore}


class InputError(ValueError):
    """A mistake in the input. Its text is one line that names the cause and how to mend it."""


@contextlib.contextmanager
def blame(what):
    """Turns any error inside into an InputError of one line: `what`, and the reason

    It is for errors in files, names and downloads. It never wraps a user's own reward or model,
    because bugs there should keep their tracebacks.
    """
    try:
        yield
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{what}: {why[:400]}") from error


def find_function(spec):
    """A user's MODULE:FUNCTION -> the function"""
    module, _, name = spec.partition(":")
    if "/" in module or "\\" in module or module.endswith(".py"):
        stem = pathlib.PureWindowsPath(module).stem         # it knows both kinds of slashes
        raise InputError(f"{spec}: write {stem}:{name}, and start in the folder that has {stem}.py")
    with blame(spec):
        found = importlib.util.find_spec(module)
    if not found or not hasattr(importlib.import_module(module), name):
        raise InputError(f"{spec}: found no module {module} with a function {name}; check both "
                         "names and the current folder")
    return getattr(importlib.import_module(module), name)


def load_reward(spec, device="cpu"):
    """A reward by its name in REWARDS or MODELS, or MODULE:FUNCTION of your own

    Arguments follow after colons. clip:MODEL:TAG, clip:MODEL:FILE, clip:hf-hub:OWNER/NAME and
    clip:local-dir:FOLDER are spelled as in open_clip.
    """
    if spec in REWARDS:
        return REWARDS[spec]
    name, _, rest = spec.partition(":")
    if name not in MODELS and rest:
        return find_function(spec)
    arguments = []
    if rest.startswith(("hf-hub:", "local-dir:")):
        arguments = [rest, None]                    # the model's name says where its weights are
    elif rest:
        arguments = rest.split(":", 1)
    names = ", ".join([*REWARDS, *MODELS])          # for a name that is none of them
    with blame(f"reward {spec} (choices: {names}, or your own MODULE:FUNCTION)"):
        return MODELS[name](device, *arguments)


@torch.no_grad()
def rate(reward, pixels, prompts):
    """The rewards of pictures: pixels (B, H, W, 3) uint8, prompts (B) -> (B,) float32 on the CPU

    ValueError if the reward is not one finite number per picture.
    """
    images = [Image.fromarray(picture) for picture in pixels.cpu().numpy()]
    rewards = torch.as_tensor(reward(images, list(prompts)))
    rewards = rewards.detach().float().cpu()                                # (B,)
    if rewards.shape != (len(prompts),) or not rewards.isfinite().all():
        raise ValueError(f"a reward must return one finite number per picture; for {len(prompts)} "
                         f"pictures (first caption: {prompts[0]!r}) it returned {rewards}")
    return rewards
