# SPDX-License-Identifier: MIT
"""Draws the README's figures from what is kept in this folder: `python assets/figures.py`

step.png        one step, from the numbers of the drawing at the top of mask_grpo.py
pictures.png    pictures of pictures.json: the base and the trained policy
curves.png      the training rewards of study.tar.xz
unmasking.png   the last caption of pictures.json that training mended, step by step

`python assets/figures.py RUN` first writes pictures.json anew: the first held-out caption of each
category, sampled with the same noise by the base and the trained policy of the run in folder RUN.
"""
import csv
import json
import pathlib
import sys
import tarfile
import textwrap

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import mask_grpo  # noqa: E402
import reward  # noqa: E402

# one step
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
# curves
CURVES = (("p1, Eq. 14 with noise", "default", (31, 95, 180)),
          ("p2, Eq. 15", "--transition=p2", (224, 120, 0)),
          ("AR-style, Eq. 13", "--transition=ar", (110, 110, 110)))
SMOOTH = 5                                      # updates in the running mean


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
    for i, value in enumerate(NOISY_CONFIDENCE):
        write(draw, LEFT + i * COLUMN + COLUMN // 2, 502,
              "revealed: U" if value >= THRESHOLD else "masked again: R", 24)
    draw.line((20, 525, WIDTH - 20, 525), "gray", 2)
    for row, (name, factors) in enumerate(FACTORS):
        y = 567 + 60 * row
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
          "the threshold", 29, anchor="lm")
    return image


def keep_pictures(run):
    """Sample one caption of each category by the base and the trained policy -> pictures.json"""
    saved = torch.load(pathlib.Path(run, "checkpoint.pt"), "cpu")
    config = mask_grpo.Config(**saved["config"])
    policy = mask_grpo.shapes_policy(config)
    captions = [group[0] for group in saved["captions"][1].values()]
    kept = {"captions": captions, "seed": config.seed, "updates": len(saved["rows"])}
    base = torch.load(next(pathlib.Path(run).glob("base-*.pt")), "cpu")
    for name, weights in (("base", base), ("trained", saved["policy"])):
        policy.load_state_dict(weights)
        generator = torch.Generator().manual_seed(config.seed + 1)
        trajectory = mask_grpo.sample(policy, captions, config, config.eval_steps, generator)
        kept[name] = {"tokens": trajectory.tokens.tolist(),
                      "revealed_at": trajectory.revealed_at.tolist()}
    (HERE / "pictures.json").write_text(json.dumps(kept) + "\n", encoding="utf-8")


def pixels(codes, masked=None):
    """Codes (36,) -> Image of 48 x 48 pixels; masked: the positions that are gray"""
    tiles = reward.TILES[torch.tensor(codes)]                                   # (36, p, p, 3)
    if masked is not None:
        tiles[masked] = 205
        tiles[masked, 0] = tiles[masked, :, 0] = 180                            # lines between them
    side, p = reward.GRID, reward.TILE
    rows = tiles.view(side, side, p, p, 3).transpose(1, 2)                      # (6, p, 6, p, 3)
    return Image.fromarray(rows.reshape(side * p, side * p, 3).numpy())


def framed(image, scale):
    """An Image, `scale` times as large, in a frame of one pixel."""
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    ImageDraw.Draw(image).rectangle((0, 0, image.width - 1, image.height - 1), outline="gray")
    return image


def curves():
    """The rewards of the runs kept for each of CURVES, smoothed -> a list of (S, updates)"""
    rewards = [[] for _ in CURVES]
    with tarfile.open(HERE / "study.tar.xz") as tar:
        for member in sorted(tar, key=lambda member: member.name):
            _, _, flags, file = member.name.split("/")
            for kept, (_, wanted, _) in zip(rewards, CURVES):
                if file == "metrics.csv" and flags == wanted:
                    rows = csv.DictReader(tar.extractfile(member).read().decode().splitlines())
                    kept.append([float(row["reward"]) for row in rows])
    seeds = min(len(kept) for kept in rewards)
    padded = [F.pad(torch.tensor(kept[:seeds])[:, None], (SMOOTH // 2,) * 2, "replicate")
              for kept in rewards]                                          # (S, 1, updates + 4)
    return [x.unfold(-1, SMOOTH, 1).mean(-1)[:, 0] for x in padded]


def chart(low=0.2):
    """The mean over seeds and their range, for each of CURVES -> Image"""
    image = Image.new("RGB", (760, 960), "white")
    runs, draw, (left, top, right, bottom) = curves(), ImageDraw.Draw(image), (90, 100, 730, 840)
    updates = runs[0].shape[1]
    write(draw, 20, 40, "mean training reward", 42, anchor="lm")

    def points(values):
        return [(left + (right - left) * i / (updates - 1),
                 bottom - (bottom - top) * (value - low) / (1 - low))
                for i, value in enumerate(values.tolist())]

    for tenth in range(round(low * 10), 11):
        y = bottom - (bottom - top) * (tenth / 10 - low) / (1 - low)
        draw.line((left, y, right, y), "#d9d9d9", 2)
        write(draw, left - 14, y, f"{tenth / 10:.1f}", 34, anchor="rm")
    for update in (1, *range(9, 100, 9)):
        if update <= updates:
            x = left + (right - left) * (update - 1) / (updates - 1)
            write(draw, x, bottom + 34, str(update), 34)
    write(draw, (left + right) / 2, bottom + 84, "update", 34)
    for rewards, (_, _, color) in zip(runs, CURVES):
        shade = Image.new("L", image.size)
        outline = points(rewards.amax(0)) + points(rewards.amin(0))[::-1]
        ImageDraw.Draw(shade).polygon(outline, 55)
        image.paste(color, mask=shade)
    for i, (rewards, (name, _, color)) in enumerate(zip(runs, CURVES)):
        draw.line(points(rewards.mean(0)), color, 7, "curve")
        y = bottom - 150 + 54 * i
        draw.line((left + 30, y, left + 90, y), color, 9)
        write(draw, left + 110, y, name, 36, anchor="lm")
    return image


def base_and_trained():
    """The pictures that were kept, of the base and of the trained policy side by side -> Image"""
    kept = json.loads((HERE / "pictures.json").read_text(encoding="utf-8"))
    image = Image.new("RGB", (760, 960), "white")
    draw = ImageDraw.Draw(image)
    write(draw, 20, 40, f"base | after {kept['updates']} updates", 42, anchor="lm")
    for i, caption in enumerate(kept["captions"]):
        x, y = 20 + i % 2 * 370, 130 + i // 2 * 282
        for j, line in enumerate(textwrap.wrap(caption, 20)[::-1]):
            write(draw, x, y - 8 - 32 * j, line, 30, anchor="ls")
        for j, name in enumerate(("base", "trained")):
            shown = pixels(kept[name]["tokens"][i])
            image.paste(framed(shown, 3), (x + 158 * j, y))
            right = bool(reward.shapes_correct([shown], [caption]))
            write(draw, x + 158 * j, y + 164, "right" if right else "wrong", 30,
                  KEPT if right else DISCARDED, "lm")
    return image


def unmasking(columns=6):
    """A caption that training mended: rows for base and trained policy, columns for steps -> Image

    The last one that only the trained policy gets right; the last of all if there is none.
    """
    kept = json.loads((HERE / "pictures.json").read_text(encoding="utf-8"))
    base, trained = (reward.shapes_correct([*map(pixels, kept[name]["tokens"])], kept["captions"])
                     for name in ("base", "trained"))
    i = max((trained > base).nonzero()[:, 0].tolist(), default=-1)
    steps = 1 + max(kept["base"]["revealed_at"][i])
    times = [round(steps * column / columns) for column in range(1, columns + 1)]
    image = Image.new("RGB", (1500, 690), "white")
    draw = ImageDraw.Draw(image)
    write(draw, 10, 40, f"{kept['captions'][i]}, after t of {steps} steps", 42, anchor="lm")
    for row, name in enumerate(("base", "trained")):
        revealed_at = torch.tensor(kept[name]["revealed_at"][i])
        for column, t in enumerate(times):
            x, y = 10 + 250 * column, 80 + 305 * row
            shown = pixels(kept[name]["tokens"][i], revealed_at >= t)
            image.paste(framed(shown, 5), (x, y))
            title = f"{name}, t = {t}" if column == 0 else f"t = {t}"
            write(draw, x, y + 264, title, 36, anchor="lm")
    return image


FIGURES = {"step.png": one_step, "pictures.png": base_and_trained, "curves.png": chart,
           "unmasking.png": unmasking}
NEEDED = {"study.tar.xz": "the loop in README makes it",
          "pictures.json": "name the folder of a run"}

if __name__ == "__main__":
    if len(sys.argv) > 1:
        if not pathlib.Path(sys.argv[1], "checkpoint.pt").exists():
            sys.exit(f"{sys.argv[1]} holds no run: checkpoint.pt is missing")
        keep_pictures(sys.argv[1])
    for name, mend in NEEDED.items():
        if not (HERE / name).exists():
            sys.exit(f"{HERE / name} is missing; {mend}")
    for name, figure in FIGURES.items():
        figure().save(HERE / name, optimize=True)
