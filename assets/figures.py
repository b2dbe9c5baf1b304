# SPDX-License-Identifier: MIT
"""Draws the figures from what is kept in this folder: `python assets/figures.py`

unmasking.gif   the last two captions of pictures.json that training fixed, step by step
step.png        one step, from the example at the top of mask_grpo.py
over_t.png      base and trained policy at other numbers of steps, from steps.txt
pictures.png    pictures of pictures.json: the base and the trained policy
revealing.png   what each step reveals, from changes.txt
curves.png      the training rewards of study.tar.xz
hacking.png     pictures of pictures.json: trained on a reward that can be hacked

`python assets/figures.py STUDY` first writes pictures.json anew, from the runs of seed 0 in a
folder of `study.py runs`. It samples the first held-out caption of each category, with the same
noise for all policies.
"""
import json
import math
import pathlib
import re
import sys
import textwrap

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import mask_grpo  # noqa: E402
import reward  # noqa: E402
import study  # noqa: E402

WIDTH = 1000                                    # of all figures; a phone shows 390 of them
KEPT = "#1b6e3c"
DISCARDED = "#a33b2e"
INK = "black"
# one step
DRAWN = ("sky", "cat", "sky", "dog")
NOISY_CONFIDENCE = (-0.3, -2.1, -0.9, -1.6)     # the two highest are kept
THRESHOLD = -0.9                                # the lowest of those that are kept
COLORS = {"sky": "#cfe3f7", "cat": "#f6dcc4", "dog": "#e3d5f0", "MASK": "#d9d9d9"}
FACTORS = (                                     # what each definition multiplies, by position
    ("ar", ("p(sky)", "p(cat)", "p(sky)", "p(dog)")),
    ("p2", ("p(sky)", "", "p(sky)", "")),
    ("p1", ("p(sky)", "P(below)", "p(sky)", "P(below)")))
LEFT = 220
COLUMN = 190
# what a step reveals, in the order of changes.txt
KINDS = (("background", "#d0d0d0"), ("first tile of an object", "#c04a1a"),
         ("its other tiles", "#f2b48c"))
# training rewards
CURVES = (("p1: Eq. 14 with the noise", (31, 95, 180)), ("p2: Eq. 15", (224, 120, 0)),
          ("ar: Eq. 13", (110, 110, 110)))
SMOOTH = 5                                      # updates in the running mean
# policies in pictures.json, and the folders of their runs
RUNS = {"trained": "", "hacked": study.HACKING, "weak KL": f"{study.HACKING} --beta=0.1",
        "strong KL": f"{study.HACKING} --beta=1"}
# shares of right pictures over T: a panel for each world
PANELS = (("captions right in pretraining", ""), ("46% of them wrong", ", captions wrong 0.5"))
POLICIES = {"base": (110, 110, 110), "trained": (31, 95, 180)}


def font(size):
    """Pillow's own font, so that every machine draws the same."""
    return ImageFont.load_default(size=size)


def write(draw, x, y, text, size=30, color=INK, anchor="mm"):
    """A line of text at (x, y)."""
    draw.text((x, y), text, color, font(size), anchor)


def tokens(draw, y, title, names):
    """A row of four tokens, 64 pixels high, with its title on the left."""
    write(draw, 20, y, title, anchor="lm")
    for i, name in enumerate(names):
        x = LEFT + i * COLUMN
        draw.rounded_rectangle((x + 15, y - 32, x + COLUMN - 15, y + 32), 12, COLORS[name], "gray")
        write(draw, x + COLUMN // 2, y, name)


def number_line(draw, top, scale):
    """The noisy confidences of the four draws as bars below a line at 0, and their threshold"""
    write(draw, 20, top + 70, "noisy", anchor="lm")
    write(draw, 20, top + 106, "confidence", anchor="lm")
    draw.line((LEFT, top, LEFT, top + 2.4 * scale), INK, 2)
    for tick in (0, -1, -2):
        y = top - tick * scale
        draw.line((LEFT - 6, y, LEFT + 6, y), INK, 2)
        write(draw, LEFT - 14, y, str(tick), 26, anchor="rm")
    for i, value in enumerate(NOISY_CONFIDENCE):
        x = LEFT + i * COLUMN + COLUMN // 2
        y = top - value * scale
        color = KEPT if value >= THRESHOLD else DISCARDED
        draw.line((x, top, x, y), "#c0c0c0", 3)
        draw.ellipse((x - 11, y - 11, x + 11, y + 11), color)
        lower = 14 if value == THRESHOLD else 0             # beside the dashed line
        write(draw, x + 20, y + lower, f"{value:.1f}", 28, anchor="lm")
    y = top - THRESHOLD * scale
    for x in range(LEFT, WIDTH - 20, 20):                   # dashed
        draw.line((x, y, x + 10, y), INK, 3)
    write(draw, LEFT + 2 * COLUMN, y - 20, "threshold", 28)


def products(draw, top):
    """What each definition multiplies, a row each"""
    for row, (name, factors) in enumerate(FACTORS):
        y = top + 60 * row
        write(draw, 20, y, f"{name} =", 34, anchor="lm")
        seen = False
        for i, factor in enumerate(factors):
            x = LEFT + i * COLUMN
            color = KEPT if factor == "p(sky)" else DISCARDED
            write(draw, x + COLUMN // 2, y, factor, color=color)
            if factor and seen:
                write(draw, x, y, "x")
            seen = seen or factor != ""


def one_step():
    """Four positions: draws, noisy confidences with their threshold, outcome, factors -> Image"""
    image = Image.new("RGB", (WIDTH, 800), "white")
    draw = ImageDraw.Draw(image)
    tokens(draw, 60, "state", ("MASK",) * 4)
    tokens(draw, 150, "draws", DRAWN)
    number_line(draw, top=220, scale=80)                    # pixels per unit of log-probability

    names = []
    for i, value in enumerate(NOISY_CONFIDENCE):
        kept = value >= THRESHOLD
        names.append(DRAWN[i] if kept else "MASK")
        write(draw, LEFT + i * COLUMN + COLUMN // 2, 536,
              "revealed: U" if kept else "masked: R", 26)
    tokens(draw, 480, "next state", names)
    draw.line((20, 562, WIDTH - 20, 562), "gray", 2)
    products(draw, top=604)
    text = "P(below): the chance that a fresh draw here ranks below the threshold"
    write(draw, 20, 770, text, 28, anchor="lm")
    return image


def keep_pictures(folder):
    """Sample a picture per category from the base and the policies of RUNS -> pictures.json"""
    kept = {}
    for name, flags in RUNS.items():
        run = pathlib.Path(folder, study.folder_of(0, flags))
        for title, policy, config, splits in study.policies(run):
            kept["captions"] = [texts[0] for texts in splits[1].values()]
            generator = torch.Generator().manual_seed(config.seed + 1)
            trajectory = mask_grpo.sample(policy, kept["captions"], config, config.eval_steps,
                                          generator)
            kept["base" if title == "base" else name] = {
                "tokens": trajectory.tokens.tolist(),
                "revealed_at": trajectory.revealed_at.tolist()}
    (HERE / "pictures.json").write_text(json.dumps(kept) + "\n", encoding="utf-8")


def read_pictures():
    """pictures.json -> dict"""
    return json.loads((HERE / "pictures.json").read_text(encoding="utf-8"))


def pixels(codes, masked=None):
    """Codes (36,) -> Image of 48 x 48 pixels; masked: the positions that are grey"""
    tiles = reward.TILES[torch.tensor(codes)]                                   # (36, p, p, 3)
    if masked is not None:
        tiles[masked] = 205
        tiles[masked, 0] = tiles[masked, :, 0] = 180                            # lines between them
    side = reward.GRID
    p = reward.TILE
    rows = tiles.view(side, side, p, p, 3).transpose(1, 2)                      # (6, p, 6, p, 3)
    return Image.fromarray(rows.reshape(side * p, side * p, 3).numpy())


def framed(image, scale):
    """An Image, `scale` times as large, in a frame of one pixel."""
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    ImageDraw.Draw(image).rectangle((0, 0, image.width - 1, image.height - 1), outline="gray")
    return image


def base_and_trained():
    """Six pairs of pictures, the base's to the left of the trained policy's -> Image"""
    kept = read_pictures()
    image = Image.new("RGB", (WIDTH, 560), "white")
    draw = ImageDraw.Draw(image)
    for i, caption in enumerate(kept["captions"]):
        x = 12 + i % 3 * 332
        y = 76 + i // 3 * 280
        for j, line in enumerate(textwrap.wrap(caption, 21)[::-1]):
            write(draw, x, y - 10 - 31 * j, line, 29, anchor="ls")
        for j, name in enumerate(("base", "trained")):
            shown = pixels(kept[name]["tokens"][i])
            image.paste(framed(shown, 3), (x + 154 * j, y))
            right = bool(reward.shapes_correct([shown], [caption]))
            write(draw, x + 154 * j, y + 164, f"{name}: {'right' if right else 'wrong'}", 25,
                  KEPT if right else DISCARDED, "lm")
    return image


def fixed(kept, count):
    """The last captions of pictures.json that only the trained policy gets right -> indices

    If there are too few of them, the last of the others come first.
    """
    right = {}
    for name in ("base", "trained"):
        images = [pixels(codes) for codes in kept[name]["tokens"]]
        right[name] = reward.shapes_correct(images, kept["captions"])       # (6,)
    order = (right["trained"] - right["base"]).argsort(stable=True)
    return order[-count:].tolist()


def unmasking():
    """Two captions, each by the base and by the trained policy, step by step -> list of Image

    The first frame has the finished pictures and says which are right, because some viewers show
    no other. The second is all MASK.
    """
    kept = read_pictures()
    chosen = fixed(kept, 2)
    steps = 1 + max(kept["base"]["revealed_at"][0])
    frames = []
    for t in range(steps + 1):
        image = Image.new("RGB", (WIDTH, 420), "white")
        draw = ImageDraw.Draw(image)
        for i, index in enumerate(chosen):
            caption = kept["captions"][index]
            write(draw, 5 + 500 * i, 30, caption, 31, anchor="lm")
            for j, name in enumerate(("base", "trained")):
                x = 5 + 500 * i + 246 * j
                revealed_at = torch.tensor(kept[name]["revealed_at"][index])
                shown = pixels(kept[name]["tokens"][index], revealed_at >= t)
                image.paste(framed(shown, 5), (x, 60))
                title = name
                color = INK
                if t == steps:
                    is_right = bool(reward.shapes_correct([shown], [caption]))
                    title += ": right" if is_right else ": wrong"
                    color = KEPT if is_right else DISCARDED
                write(draw, x, 322, title, 32, color, "lm")
        write(draw, 10, 384, f"step {t} of {steps}", 36, anchor="lm")
        draw.rectangle((240, 370, 240 + 740, 398), outline="gray")
        draw.rectangle((240, 370, 240 + 740 * t / steps, 398), "gray")
        frames.append(image)
    return frames[-1:] + frames[:-1]


def read_steps():
    """steps.txt -> T (list), and title of a row -> shares in percent (list)"""
    lines = (HERE / "steps.txt").read_text(encoding="utf-8").splitlines()
    rows = {}
    for line in lines:
        title, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[title] = cells
    times = [int(T) for T in rows.pop("run, %, at T =")]
    rows.pop("---")
    return times, {title: [int(cell) for cell in cells] for title, cells in rows.items()}


def panel(image, left, title, world):
    """The share of right pictures over T, on a logarithmic axis, in one world"""
    draw = ImageDraw.Draw(image)
    times, rows = read_steps()
    right = left + 400
    top = 130
    bottom = 480

    def place(T, share):
        x = left + (right - left) * math.log(T / times[0]) / math.log(times[-1] / times[0])
        return x, bottom - (bottom - top) * share / 100

    def points(shares):
        return [place(T, share) for T, share in zip(times, shares.tolist())]

    write(draw, left, 90, title, 30, anchor="lm")
    for share in range(0, 101, 20):
        y = place(times[0], share)[1]
        draw.line((left, y, right, y), "#d9d9d9", 2)
        write(draw, left - 10, y, str(share), 26, anchor="rm")
    for T in (3, 4, 6, 8, 12, 18, 36):
        write(draw, place(T, 0)[0], bottom + 26, str(T), 28)
    draw.line((place(8, 0), place(8, 100)), "#b0b0b0", 3)           # the T of training
    for name, color in POLICIES.items():
        found = []
        for row, shares in rows.items():
            if re.fullmatch(rf"seed \d+{re.escape(world)}(, p1)?, {name}", row):
                found.append(shares)
        shares = torch.tensor(found, dtype=torch.float)                         # (S, len(times))
        outline = points(shares.amax(0)) + points(shares.amin(0))[::-1]
        shade = Image.new("L", image.size)
        ImageDraw.Draw(shade).polygon(outline, 60)
        image.paste(color, mask=shade)
        draw.line(points(shares.mean(0)), color, 7, "curve")


def over_t():
    """The share of right pictures over T in two worlds: mean and range over seeds -> Image"""
    image = Image.new("RGB", (WIDTH, 600), "white")
    draw = ImageDraw.Draw(image)
    write(draw, 20, 34, "right pictures of held-out captions, %", 36, anchor="lm")
    for i, (title, world) in enumerate(PANELS):
        panel(image, 70 + 500 * i, title, world)
    write(draw, WIDTH / 2, 540, "T, the number of steps", 28)
    titles = {"base": "base", "trained": "trained with 8 steps"}
    for i, (name, color) in enumerate(POLICIES.items()):
        draw.line((70 + 500 * i, 578, 130 + 500 * i, 578), color, 9)
        write(draw, 146 + 500 * i, 578, titles[name], 30, anchor="lm")
    return image


def revealing():
    """What each step reveals, in tokens per picture: base left, trained right -> Image

    A column is a step. It is divided into background, first tiles of objects, and other tiles.
    """
    parts = {"base": [], "trained": []}
    for line in (HERE / "changes.txt").read_text(encoding="utf-8").splitlines():
        if line.count(": ") == 2:
            name, _, values = line.split(": ")
            parts[name].append([float(x) for x in values.split()])
    image = Image.new("RGB", (WIDTH, 560), "white")
    draw = ImageDraw.Draw(image)
    bottom = 430
    scale = 40                                              # pixels per token
    wide = 51                                               # pixels per step
    for i, (name, title) in enumerate((("base", "base"), ("trained", "after Mask-GRPO"))):
        x0 = 60 + 490 * i
        write(draw, x0, 36, title, 36, anchor="lm")
        for t in range(len(parts[name][0])):
            x = x0 + t * (wide + 3)
            y = bottom
            for values, (_, color) in zip(parts[name], KINDS):
                draw.rectangle((x, y - values[t] * scale, x + wide - 1, y), color)
                y -= values[t] * scale
            write(draw, x + wide / 2, bottom + 22, str(t + 1), 26)
        write(draw, x0 + 4 * (wide + 3), bottom + 56, "step", 28)
        for count in range(0, 9, 2):
            write(draw, x0 - 10, bottom - count * scale, str(count), 26, anchor="rm")
        write(draw, x0 - 26, bottom - 9 * scale, "tokens", 26, anchor="lm")
    x = 60
    for name, color in KINDS:
        draw.rectangle((x, 515, x + 26, 541), color)
        write(draw, x + 38, 528, name, 30, anchor="lm")
        x += 90 + draw.textlength(name, font(30))
    return image


def curves():
    """The rewards of the runs kept for each of CURVES, smoothed -> a list of (S, updates)"""
    runs = study.read_runs()
    smooth = []
    for variant, _ in zip(study.TABLES["definitions"], CURVES):
        rewards = []
        for seed in variant.seeds:
            rows = runs[seed, variant.flags]["rows"]
            rewards.append([float(row["reward"]) for row in rows])
        padded = F.pad(torch.tensor(rewards)[:, None], (SMOOTH // 2, SMOOTH // 2), "replicate")
        smooth.append(padded.unfold(-1, SMOOTH, 1).mean(-1)[:, 0])          # (S, updates)
    return smooth


def chart(low=0.2):
    """The mean over seeds and their range, for each of CURVES -> Image"""
    image = Image.new("RGB", (WIDTH, 600), "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = (80, 80, 970, 490)
    runs = curves()
    updates = runs[0].shape[1]
    write(draw, 20, 34, "mean training reward", 36, anchor="lm")

    def height(value):
        return bottom - (bottom - top) * (value - low) / (1 - low)

    def points(values):
        found = []
        for i, value in enumerate(values.tolist()):
            found.append((left + (right - left) * i / (updates - 1), height(value)))
        return found

    for tenth in range(round(low * 10), 11, 2):
        y = height(tenth / 10)
        draw.line((left, y, right, y), "#d9d9d9", 2)
        write(draw, left - 14, y, f"{tenth / 10:.1f}", 30, anchor="rm")
    for update in (1, *range(9, updates + 1, 9)):
        x = left + (right - left) * (update - 1) / (updates - 1)
        write(draw, x, bottom + 30, str(update), 30)
    write(draw, (left + right) / 2, bottom + 76, "update", 30)
    for rewards, (_, color) in zip(runs, CURVES):
        shade = Image.new("L", image.size)
        outline = points(rewards.amax(0)) + points(rewards.amin(0))[::-1]
        ImageDraw.Draw(shade).polygon(outline, 55)
        image.paste(color, mask=shade)
    draw.rectangle((right - 490, bottom - 185, right - 40, bottom - 30), "white")     # legend
    for i, (rewards, (name, color)) in enumerate(zip(runs, CURVES)):
        draw.line(points(rewards.mean(0)), color, 7, "curve")
        y = bottom - 155 + 48 * i
        draw.line((right - 480, y, right - 420, y), color, 9)
        write(draw, right - 400, y, name, 32, anchor="lm")
    return image


def hacking(columns=4):
    """Pictures after training on a reward that ignores extras, a row for each weight of the KL"""
    kept = read_pictures()
    image = Image.new("RGB", (WIDTH, 870), "white")
    draw = ImageDraw.Draw(image)
    for i in range(columns):
        x = 14 + 246 * i
        for j, line in enumerate(textwrap.wrap(kept["captions"][i + 2], 15)[::-1]):
            write(draw, x, 104 - 32 * j, line, 29, anchor="ls")
        for row, name in enumerate(list(RUNS)[1:]):
            y = 118 + 250 * row
            image.paste(framed(pixels(kept[name]["tokens"][i + 2]), 4), (x, y))
            if i == 0:
                beta = "0"
                if "--beta=" in RUNS[name]:
                    beta = RUNS[name].split("--beta=")[1]
                write(draw, x, y + 216, f"beta {beta}", 30, anchor="lm")
    return image


FIGURES = {"unmasking.gif": unmasking, "step.png": one_step, "over_t.png": over_t,
           "pictures.png": base_and_trained, "revealing.png": revealing, "curves.png": chart,
           "hacking.png": hacking}
NEEDED = {"changes.txt": "assets/study.py changes prints it",
          "steps.txt": "assets/study.py steps prints it",
          "pictures.json": "name a folder that assets/study.py runs has filled"}


def save(figure, path):
    """Write an Image, or a list of them as a GIF that shows each for 0.5 s, the first for 3 s"""
    if isinstance(figure, list):
        durations = [3000] + [500] * (len(figure) - 1)
        figure[0].save(path, save_all=True, append_images=figure[1:], duration=durations, loop=0,
                       optimize=True)
    else:
        figure.save(path, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        keep_pictures(sys.argv[1])
    for name, mend in NEEDED.items():
        if not (HERE / name).exists():
            sys.exit(f"{HERE / name} is missing; {mend}")
    for name, figure in FIGURES.items():
        save(figure(), HERE / name)
