# SPDX-License-Identifier: MIT
"""Evaluates runs at other T: `python assets/over_t.py RUN ... | tee assets/over_t.txt`

Prints a table of study.md: the share of correct held-out pictures, for the base and the trained
policy of each run, sampled with several numbers of steps.
"""
import dataclasses
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import mask_grpo  # noqa: E402
import reward  # noqa: E402

TIMES = (10, 11, 12, 13, 14, 15, 18, 36)


def shares(run):
    """A run's folder -> its seed, and two lists: base and trained policy at each of TIMES"""
    saved = torch.load(pathlib.Path(run, "checkpoint.pt"), "cpu")
    config = mask_grpo.Config(**saved["config"])
    base = torch.load(next(pathlib.Path(run).glob("base-*.pt")), "cpu")
    policy, found = mask_grpo.shapes_policy(config), []
    for weights in (base, saved["policy"]):
        policy.load_state_dict(weights)
        scores = [mask_grpo.evaluate(policy, reward.shapes_correct, saved["captions"],
                                     dataclasses.replace(config, eval_steps=T), "")["scores"]
                  for T in TIMES]                                   # (2, C, n) each
        found.append([100 * each[1].mean() for each in scores])     # held-out captions, in percent
    return config.seed, found


if __name__ == "__main__":
    print(f"| %, at T = | {' | '.join(map(str, TIMES))} |")
    print("|---" * (len(TIMES) + 1) + "|")
    for run in sys.argv[1:]:
        if not pathlib.Path(run, "checkpoint.pt").exists():
            sys.exit(f"{run} holds no run: checkpoint.pt is missing")
        seed, rows = shares(run)
        cells = " | ".join(f"{base:.0f} → {trained:.0f}" for base, trained in zip(*rows))
        print(f"| seed {seed} | {cells} |", flush=True)
