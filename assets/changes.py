# SPDX-License-Identifier: MIT
"""What training changes: `python assets/changes.py RUN ... | tee assets/changes.txt`

Each RUN is the folder of a run in the shapes world. Its base and trained policy sample the held-out
pictures of evaluation, with the noise used there. Prints a table of means over the runs, and what
each step reveals, in tokens per picture, for assets/revealing.png. Steps count from 1.
"""
import collections
import math
import pathlib
import statistics
import sys

import torch
from PIL import Image

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import mask_grpo  # noqa: E402
import reward  # noqa: E402

SIDE = reward.LATTICE
MEASURES = {
    "held-out pictures that are correct, %": "right",
    "step that reveals the first tile of an object": "first",
    "step that reveals the last tile of an object": "last",
    "objects begun in the last three steps, %": "late",
    "pictures in which a step begins two objects or more, %": "together",
    "distinct pictures, % of those sampled": "distinct",
    "commonest colour of objects whose colour is open, %": "commonest",
    "entropy of a draw in the first step, bits": "entropy"}
KINDS = ("background", "first tile of an object", "other tiles of an object")


def policies(run):
    """The base and the trained policy of a run's folder: yields name, policy, config, captions

    captions are those of checkpoint.pt, in two splits. SystemExit if the folder holds no run.
    """
    run = pathlib.Path(run)
    if not (run / "checkpoint.pt").exists():
        sys.exit(f"{run} holds no run: checkpoint.pt is missing")
    saved = torch.load(run / "checkpoint.pt", "cpu")
    config = mask_grpo.Config(**{**saved["config"], "device": "cpu"})
    policy = mask_grpo.shapes_policy(config)
    base = torch.load(next(run.glob("base-*.pt")), "cpu")
    for name, weights in (("base", base), ("trained", saved["policy"])):
        policy.load_state_dict(weights)
        yield name, policy, config, saved["captions"]


def by_cell(x):
    """Positions, ordered by cell of the lattice: (B, 36) -> (B, 9, 4)"""
    return x.view(-1, SIDE, 2, SIDE, 2).transpose(2, 3).reshape(-1, SIDE ** 2, 4)


def percent(x):
    """The share of a bool tensor that is True, in percent -> float"""
    return 100 * x.double().mean().item()


def commonest_color(images, captions):
    """The share of the commonest colour where captions leave all colours open, in percent"""
    colors = collections.Counter()
    for cells, caption in zip(reward.look(images).tolist(), captions):
        wanted, _ = reward.WANTED[caption]
        if all(color is None for _, color, _ in wanted):
            colors.update(reward.OBJECTS[o][1] for o in cells if o >= 0)
    return 100 * max(colors.values()) / sum(colors.values())


def first_entropy(policy, captions):
    """The entropy of a draw of the first step, in bits, averaged over captions and positions"""
    masks = torch.full((len(captions), policy.num_tokens), policy.codebook_size)
    with torch.no_grad():
        logp = policy(policy.encode(captions), masks).log_softmax(-1)               # (C, 36, K)
    return -(logp.exp() * logp).sum(-1).mean().item() / math.log(2)


def measure(policy, splits, config):
    """MEASURES of a policy, and the tokens per picture for each kind and step -> dict, (3, T)"""
    n = config.eval_pictures
    T = config.eval_steps
    prompts = []                                                    # in the order of evaluate
    for split in splits:
        for texts in split.values():
            prompts += [texts[i % len(texts)] for i in range(n)]
    generator = torch.Generator().manual_seed(config.seed + 1)      # with its noise, too
    trajectory = mask_grpo.sample(policy, prompts, config, T, generator)
    half = len(prompts) // 2                                        # the training captions
    held = prompts[half:]                                           # B
    codes = trajectory.tokens[half:]                                # (B, 36)
    tokens = by_cell(codes)                                         # (B, 9, 4)
    steps = by_cell(trajectory.revealed_at[half:]) + 1              # (B, 9, 4)
    images = [Image.fromarray(x) for x in policy.decode(codes).numpy()]

    # an object is a cell with a tile in it, whole or broken
    drawn = tokens > 0                                              # (B, 9, 4)
    there = drawn.any(-1)                                           # (B, 9)
    begun = torch.where(drawn, steps, 99).amin(-1)                  # (B, 9)
    ended = torch.where(drawn, steps, 0).amax(-1)                   # (B, 9)
    together = []
    for i in range(len(held)):
        first_steps = begun[i][there[i]].tolist()
        together.append(len(set(first_steps)) < len(first_steps))

    first = torch.bincount(begun[there], minlength=T + 1)[1:]       # (T,)
    objects = torch.bincount(steps[drawn], minlength=T + 1)[1:]     # (T,)
    ground = torch.bincount(steps[~drawn], minlength=T + 1)[1:]     # (T,)
    return {
        "right": percent(reward.shapes_correct(images, held)),
        "first": begun[there].double().mean().item(),
        "last": ended[there].double().mean().item(),
        "late": percent(begun[there] > T - 3),
        "together": 100 * statistics.mean(together),
        "distinct": 100 * len({tuple(x) for x in codes.tolist()}) / len(held),
        "commonest": commonest_color(images, held),
        "entropy": first_entropy(policy, sorted(set(held))),
    }, torch.stack([ground, first, objects - first]) / len(held)


def main(runs):
    """Print the table, and what each step reveals"""
    found = {"base": [], "trained": []}
    revealed = {"base": 0, "trained": 0}
    for run in runs:
        for name, policy, config, splits in policies(run):
            numbers, kinds = measure(policy, splits, config)
            found[name].append(numbers)
            revealed[name] = revealed[name] + kinds / len(runs)
    print(f"| mean and range of {len(runs)} runs | base | trained |\n|---|---|---|")
    for title, name in MEASURES.items():
        cells = []
        for numbers in found.values():
            values = [x[name] for x in numbers]
            cells.append(f"{statistics.mean(values):.3g} ({min(values):.3g}-{max(values):.3g})")
        print(f"| {title} | {' | '.join(cells)} |")
    for name, kinds in revealed.items():
        for kind, values in zip(KINDS, kinds.tolist()):
            print(f"{name}: {kind}: {' '.join(f'{x:.2f}' for x in values)}")


if __name__ == "__main__":
    main(sys.argv[1:])
