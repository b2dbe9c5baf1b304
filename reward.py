# SPDX-License-Identifier: MIT
"""What a good picture is: captions and rewards for Mask-GRPO.

A reward is any callable (images: list[PIL.Image], prompts: list[str]) -> float tensor (B,): one
number per picture, and larger is better. It sees neither tokens nor logits, so it works with any
policy.

Sections 1 to 3 are the *shapes world*, in which a picture can be judged exactly. A picture is a
lattice of 3 x 3 cells. Each cell is empty or holds one object, and an object is drawn as 2 x 2
tiles, so a picture has 6 x 6 tokens. Captions ask for the six things that GenEval asks for (Ghosh
et al., 2023): a single object, two objects, a count, a colour, a position, and colours bound to
objects. No single token is difficult. The difficulty is that tokens must agree with each other,
although tokens drawn in the same step are drawn independently.

Dims: B pictures of 48 x 48 pixels, N = 36 tokens, K = 49 codes (the background and 12 objects x 4).
"""
import contextlib
import importlib.util
import itertools
import json
import math
import pathlib
import random
import re
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image, ImageDraw, ImageFont

# --------------------------------------------------------------------------------------------------
# 1. Objects and their tiles. Code 0 is the background. Object o owns the codes 1 + 4 o + quarter,
#    with the quarters in reading order. The four tiles of an object are cut from one drawing, so a
#    quarter in the wrong place can be seen.

SHAPES = {"circle": 64, "square": 4, "triangle": 3, "star": 10}     # corners of each polygon
COLORS = {"red": (214, 64, 58), "green": (46, 158, 91), "blue": (52, 104, 206)}
BACKGROUND = (248, 246, 240)
OBJECTS = list(itertools.product(SHAPES, COLORS))   # object o is the pair (shape, colour)
EMPTY, BROKEN = -1, -2                              # what else a cell can hold
LATTICE, TILE = 3, 8                                # cells per side, pixels per side of a tile
GRID = 2 * LATTICE                                  # tokens per side
CODEBOOK_SIZE = 1 + 4 * len(OBJECTS)

def draw_object(shape, color):
    """A cell that holds an object -> uint8 array (2p, 2p, 3), p = TILE"""
    size, corners, points = 2 * TILE * 8, SHAPES[shape], []     # 8 times too large, then averaged
    for i in range(corners):
        turn = 0.5 if shape == "square" else 0      # it stands on a side, not on a corner
        angle = 2 * math.pi * (i + turn) / corners  # clockwise from the top
        radius = size * (0.2 if shape == "star" and i % 2 else 0.46)        # a star's inner corners
        points.append((radius * math.sin(angle), -radius * math.cos(angle)))
    middle = (min(y for _, y in points) + max(y for _, y in points)) / 2
    image = Image.new("RGB", (size, size), BACKGROUND)
    ImageDraw.Draw(image).polygon([(size / 2 + x, size / 2 + y - middle) for x, y in points],
                                  fill=COLORS[color])
    return np.asarray(image.resize((2 * TILE, 2 * TILE), Image.Resampling.BOX))

# what a cell can look like, the empty one last: uint8 (13, 2p, 2p, 3)
CELLS = torch.from_numpy(np.stack([*(draw_object(*o) for o in OBJECTS), np.full(
    (2 * TILE, 2 * TILE, 3), BACKGROUND, np.uint8)]))
# the codebook as pixels, uint8 (K, p, p, 3); the empty cell gives only one tile, the first
TILES = CELLS.view(-1, 2, TILE, 2, TILE, 3).transpose(2, 3).flatten(0, 2)[:-3].roll(1, 0)

# --------------------------------------------------------------------------------------------------
# 2. Captions, and a correct picture for each. Some captions are held out from RL, though not from
#    pretraining. Captions with the same meaning ("a star left of a circle", "a circle right of a
#    star") are in the same split, so the held-out ones are not mere rewordings of the others.

NUMBERS = {"two": 2, "three": 3}
# where the second object is, seen from the first: (rows down, columns to the right)
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 0), "below": (-1, 0)}
# the categories and their shares in pretraining: more of what the base learns most slowly
CATEGORIES = {"single": 1, "two": 2, "counting": 2, "color": 1, "position": 6, "attribution": 3}

def all_captions():
    """Yields (caption, category, meaning, [(count, colour or None, shape), ...], relation)"""
    for a in SHAPES:
        yield f"a {a}", "single", a, [(1, None, a)], None
    for a, b in itertools.permutations(SHAPES, 2):
        pair = [(1, None, a), (1, None, b)]
        yield f"a {a} and a {b}", "two", f"{sorted([a, b])}", pair, None
        for word, (rows, columns) in RELATIONS.items():
            first, second = (a, b) if rows + columns > 0 else (b, a)    # from the left or the top
            meaning = f"{first} {abs(rows)} {second}"
            yield f"a {a} {word} a {b}", "position", meaning, pair, (rows, columns)
        for c, d in itertools.product(COLORS, repeat=2):
            yield (f"a {c} {a} and a {d} {b}", "attribution", f"{sorted([c + a, d + b])}",
                   [(1, c, a), (1, d, b)], None)
    for a, (word, count) in itertools.product(SHAPES, NUMBERS.items()):
        yield f"{word} {a}s", "counting", f"{a} {count}", [(count, None, a)], None
    for a, color in OBJECTS:
        yield f"a {color} {a}", "color", f"{color} {a}", [(1, color, a)], None

# what each caption asks for: the generator that writes a caption also says what it means
WANTED = {caption: (wanted, relation) for caption, *_, wanted, relation in all_captions()}

def phrases(caption):
    """The text tokens of a small policy: "a star and a circle" -> ["a star", "and a circle"]"""
    before = f" (?=and|{'|'.join(RELATIONS)}|[a-z]+s$)"         # a plural follows its number
    return re.split(before, caption) if caption else []

PHRASES = sorted({phrase for caption in WANTED for phrase in phrases(caption)})

def captions(heldout):
    """The training captions, or the held-out ones: category -> list[str]

    Every fifth meaning of a category is held out. All its text tokens occur in training captions.
    """
    chosen = {}
    for category in CATEGORIES:
        mine = [(meaning, caption) for caption, c, meaning, *_ in all_captions() if c == category]
        held = sorted({meaning for meaning, _ in mine})[::5]
        chosen[category] = [caption for m, caption in mine if (m in held) == heldout]
    return chosen

def in_order(first, second, relation):
    """Whether cells `first` and `second` stand in the relation; True if there is none."""
    rows, columns = second // LATTICE - first // LATTICE, second % LATTICE - first % LATTICE
    return relation is None or rows * relation[0] + columns * relation[1] > 0

def draw_scene(caption, rng: random.Random):
    """A correct picture for a caption, random in what the caption leaves open -> N codes

    Two conventions that the captions do not mention keep the drawings simple. All objects share a
    row (or a column, if one is to be above the other). Half of the colours left open are red.
    """
    wanted, relation = WANTED[caption]
    shapes = [(shape, color) for count, color, shape in wanted for _ in range(count)]
    rows = [range(LATTICE * row, LATTICE * (row + 1)) for row in range(LATTICE)]
    lines = [*zip(*rows)] if relation and relation[0] else rows
    cells = rng.sample(rng.choice(lines), len(shapes))
    while relation and not in_order(*cells, relation):
        cells = rng.sample(rng.choice(lines), len(shapes))
    codes = np.zeros((LATTICE, 2, LATTICE, 2), int)                     # (row, half, column, half)
    for cell, (shape, color) in zip(cells, shapes):
        o = OBJECTS.index((shape, color or rng.choice(["red", *COLORS])))
        codes[cell // LATTICE, :, cell % LATTICE] = 1 + 4 * o + np.arange(4).reshape(2, 2)
    return codes.flatten().tolist()

def draw_pairs(n, rng: random.Random):
    """n captions from both splits, and a correct picture for each -> list, (n, N) long"""
    splits = [captions(heldout) for heldout in (False, True)]
    prompts = [rng.choice([caption for split in splits for caption in split[category]])
               for category in rng.choices([*CATEGORIES], CATEGORIES.values(), k=n)]
    return prompts, torch.tensor([draw_scene(prompt, rng) for prompt in prompts])

# --------------------------------------------------------------------------------------------------
# 3. The reward of the shapes world. It looks at pixels only and knows nothing of tokens.

def look(images, tolerance=40):
    """What stands in each cell: an object's index, EMPTY, or BROKEN -> long (B, 9)

    Every pixel of the cell must be within the tolerance of a single entry of CELLS. A tile in the
    wrong place never passes.
    """
    pixels = torch.from_numpy(np.stack([np.array(image.convert("RGB")) for image in images]))
    cells = pixels.short().reshape(-1, LATTICE, 2 * TILE, LATTICE, 2 * TILE, 3).transpose(2, 3)
    cells = cells.reshape(len(images), LATTICE ** 2, 1, -1)                 # (B, 9, 1, 768)
    distance, found = (cells - CELLS.short().flatten(1)).abs().amax(-1).min(-1)     # (B, 9) each
    found[found == len(OBJECTS)] = EMPTY
    return found.masked_fill(distance > tolerance, BROKEN)

def agreement(cells, caption):
    """How well the cells show what the caption asks for, in [0, 1]; 1 is exactly that and no more

    It is the number of correct objects, divided by the number asked for or the number drawn (broken
    ones count), whichever is larger. It is 0.5 if all are correct but in the wrong relation.
    cells (9,) -> float
    """
    wanted, relation = WANTED[caption]
    found = {cell: OBJECTS[o] for cell, o in enumerate(cells.tolist()) if o >= 0}
    places = [[cell for cell, (s, c) in found.items() if s == shape and color in (None, c)]
              for _, color, shape in wanted]        # for each phrase, the cells that match it
    correct = sum(min(count, len(here)) for (count, _, _), here in zip(wanted, places))
    drawn = int((cells != EMPTY).sum())
    share = correct / max(drawn, sum(count for count, _, _ in wanted))
    if share == 1 and not in_order(places[0][0], places[-1][0], relation):
        return 0.5
    return share

def shapes_reward(images, prompts):
    """How well pictures agree with their captions: PIL images (B), captions (B) -> (B,) in [0, 1]

    It is graded. With a reward of only 0 or 1, many groups of the harder captions would have no
    correct picture, and therefore nothing to learn from.
    """
    return torch.tensor([agreement(c, p) for c, p in zip(look(images), prompts)])

def shapes_correct(images, prompts):
    """1 for a picture that is entirely correct, 0 for any other -> (B,) float32"""
    return (shapes_reward(images, prompts) == 1).float()

# --------------------------------------------------------------------------------------------------
# 4. Rewards for real pictures. All three are CLIP models: one network embeds pictures, another
#    embeds texts, and the reward is the (scaled) cosine of the two embeddings.

def cosine(embed, scale, device, batch=32):
    """The reward scale * cosine. embed: images, prompts -> their embeddings, (B, D) each"""
    @torch.no_grad()
    def reward(images, prompts):
        rewards = []
        for i in range(0, len(images), batch):
            with torch.autocast(device.type, torch.bfloat16, device.type == "cuda"):
                pair = embed(images[i:i + batch], prompts[i:i + batch])
            rewards.append(scale * F.cosine_similarity(*(x.float() for x in pair)))
        return torch.cat(rewards).cpu()                                     # (B,)
    return reward

def clip(device, model="ViT-H-14", pretrained="laion2b_s32b_b79k", scale=None):
    """Any CLIP of open_clip. pretrained: a tag or a file. scale: None is the model's own"""
    import open_clip                                # slow, so only here
    net, preprocess = open_clip.create_model_from_pretrained(model, pretrained, device=device)
    net.eval()
    tokenize = open_clip.get_tokenizer(model)       # cuts texts at 77 tokens

    def embed(images, prompts):
        pixels = torch.stack([preprocess(image) for image in images])       # (B, 3, H, W)
        return net.encode_image(pixels.to(device)), net.encode_text(tokenize(prompts).to(device))
    return cosine(embed, scale or net.logit_scale.detach().exp(), device)

def hpsv2(device, model="ViT-H-14", pretrained=None):
    """HPS v2.1 (Wu et al., 2023): a CLIP tuned on human preferences, whose score is the cosine"""
    pretrained = pretrained or hf_hub_download("xswu/HPSv2", "HPS_v2.1_compressed.pt")
    return clip(device, model, pretrained, scale=1)

def pickscore(device, model="yuvalkirstain/PickScore_v1"):
    """PickScore v1 (Kirstain et al., 2023): a CLIP tuned on human preferences, for transformers

    ValueError if the file lacks weights, which transformers would fill with random numbers.
    """
    from transformers import CLIPModel, CLIPProcessor
    processor = CLIPProcessor.from_pretrained(model)
    net, info = CLIPModel.from_pretrained(model, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"its weights lack {', '.join(sorted(info['missing_keys'])[:3])}, ...")
    net.to(device).eval()

    def embed(images, prompts):
        inputs = processor(text=prompts, images=images, return_tensors="pt", truncation=True,
                           padding="max_length", max_length=77).to(device)
        output = net(**inputs)
        return output.image_embeds, output.text_embeds
    return cosine(embed, net.logit_scale.detach().exp(), device)

# Each entry makes a reward from (device, *arguments). `clip:ViT-B-32:openai` has two arguments.
REWARDS = {"shapes": lambda device: shapes_reward, "clip": clip, "hpsv2": hpsv2,
           "pickscore": pickscore}
# What evaluation reports in place of a graded reward: whether a picture is entirely correct.
STRICT = {shapes_reward: shapes_correct}

# --------------------------------------------------------------------------------------------------
# 5. Loading a reward by name, and applying it.

@contextlib.contextmanager
def blame(what):
    """If an error occurs inside, ends the program with one line: `what`, and the reason

    It is for errors in files, names and downloads. It never wraps a user's own reward or model,
    because bugs there should keep their tracebacks.
    """
    try:
        yield
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise SystemExit(f"mask_grpo.py: {what}: {why[:400]}") from None

def find_function(spec):
    """A user's MODULE:FUNCTION -> the function"""
    module, _, name = spec.partition(":")
    if not importlib.util.find_spec(module) or not hasattr(importlib.import_module(module), name):
        raise SystemExit(f"mask_grpo.py: {spec}: found no module {module} with a {name}")
    return getattr(importlib.import_module(module), name)

def load_reward(spec, device=torch.device("cpu")):
    """A reward by its name in REWARDS, with arguments after colons, or MODULE:FUNCTION of your own

    clip:MODEL:TAG, clip:MODEL:FILE, clip:hf-hub:OWNER/NAME and clip:local-dir:FOLDER are spelled as
    in open_clip.
    """
    name, _, rest = spec.partition(":")
    if name not in REWARDS and rest:
        return find_function(spec)
    arguments = rest.split(":", 1) if rest else []
    if rest.startswith(("hf-hub:", "local-dir:")):
        arguments = [rest, None]                    # the model's name says where its weights are
    with blame(f"reward {spec} (choices: {', '.join(REWARDS)}, or MODULE:FUNCTION of your own)"):
        return REWARDS[name](device, *arguments)

@torch.no_grad()
def rate(reward, pixels, prompts):
    """The rewards of pictures: pixels (B, H, W, 3) uint8, prompts (B) -> (B,) float32 on the CPU

    ValueError if the reward is not one finite number per picture.
    """
    images = [Image.fromarray(picture) for picture in pixels.cpu().numpy()]
    rewards = torch.as_tensor(reward(images, list(prompts))).float().cpu()  # (B,)
    if rewards.shape != (len(prompts),) or not rewards.isfinite().all():
        raise ValueError(f"a reward must be one finite number per picture; for {len(prompts)} "
                         f"pictures, the first of {prompts[0]!r}, it is {rewards}")
    return rewards

# --------------------------------------------------------------------------------------------------
# 6. Files: captions to read, pictures to look at.

def read_captions(path):
    """The captions of a file -> list of dicts with a "prompt", and whatever else a record holds

    .json holds a list and .jsonl a record per line. A record is a string, or an object with a
    `caption` (the paper's file) or a `prompt` (GenEval's). Any other file holds a caption per line.
    """
    kind, captions = pathlib.Path(path).suffix.lower(), []
    with blame(f"captions in {path}"):
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
        is_json = kind in (".json", ".jsonl")
        if kind in (".csv", ".tsv") or (not is_json and text[:1] in ("[", "{")):
            raise ValueError("must be a .txt with a caption per line, or be named .json or .jsonl")
        lines = [line for line in text.split("\n") if line.strip()]
        if is_json:
            lines = json.loads(text) if kind == ".json" else [json.loads(line) for line in lines]
        if not isinstance(lines, list):
            raise ValueError("must be a list")
        for i, record in enumerate(lines, 1):
            record = record if isinstance(record, dict) else {"prompt": record}
            prompt = record.get("prompt", record.get("caption"))
            if not isinstance(prompt, str):
                raise ValueError(f"record {i} is not a string and has no `caption` or `prompt`")
            prompt.encode()                         # raises for a lone surrogate
            captions += [{**record, "prompt": prompt.strip()}] if prompt.strip() else []
        if not captions:
            raise ValueError("there are none")
    return captions

def split_captions(path=""):
    """The training captions and the held-out captions -> 2 dicts, category -> list[str]

    A tenth of a file is held out, at most 64 captions, chosen by a checksum: the same ones in every
    run. Without a file they are the captions of the shapes world.
    """
    if not path:
        return [captions(heldout=False), captions(heldout=True)]
    prompts = sorted(dict.fromkeys(record["prompt"] for record in read_captions(path)),
                     key=lambda prompt: zlib.crc32(prompt.encode()))
    if len(prompts) < 2:
        raise SystemExit(f"mask_grpo.py: captions in {path}: training needs at least two")
    held = min(64, -(-len(prompts) // 10))                                  # rounded up
    return [{"captions": prompts[held:]}, {"captions": prompts[:held]}]

def save_grid(path, title, captions, before, after):
    """A PNG of pairs of held-out pictures, before | after, a category per row, with their scores

    captions: category -> list. before, after: scores (2, C, n), pictures (2, C, 4, H, W, 3)
    """
    columns, size = before["pictures"].shape[2], min(max(before["pictures"].shape[4], 96), 256)
    width, height, font = 2 * size + 28, size + 48, ImageFont.load_default(size=13)
    sheet = Image.new("RGB", (columns * width + 12, len(captions) * height + 30), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((12, 8), f"held-out captions, same noise: {title}", "black", font)
    for (i, texts), j in itertools.product(enumerate(captions.values()), range(columns)):
        x, y = 12 + j * width, 30 + i * height
        draw.text((x, y), texts[j % len(texts)][:width // 6], "black", font)
        for shown in (before, after):
            picture = Image.fromarray(shown["pictures"][1, i, j].numpy())
            sheet.paste(picture.resize((size, size), Image.Resampling.BOX), (x, y + 18))
            draw.rectangle((x, y + 18, x + size - 1, y + 17 + size), outline="gray")
            draw.text((x, y + 19 + size), f"{shown['scores'][1, i, j]:.2f}", "gray", font)
            x += size + 4
    sheet.save(path)
