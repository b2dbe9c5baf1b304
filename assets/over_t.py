# SPDX-License-Identifier: MIT
"""Evaluates runs at other T: `python assets/over_t.py RUN ... | tee assets/over_t.txt`

Prints a table of study.md: the share of correct held-out pictures, for the base and the trained
policy of each run, sampled with several numbers of steps.
"""
import dataclasses
import pathlib
import sys

sys.path[:0] = [str(folder) for folder in pathlib.Path(__file__).resolve().parents[:2]]
import changes  # noqa: E402
import mask_grpo  # noqa: E402
import reward  # noqa: E402

TIMES = (10, 11, 12, 13, 14, 15, 18, 36)


def shares(run):
    """A run's folder -> its seed, and two lists: base and trained policy at each of TIMES"""
    found = []
    for _, policy, config, splits in changes.policies(run):
        scores = [mask_grpo.evaluate(policy, reward.shapes_correct, splits,
                                     dataclasses.replace(config, eval_steps=T), 0)["scores"]
                  for T in TIMES]                                   # (2, C, n) each
        found.append([100 * each[1].mean() for each in scores])     # held-out captions, in percent
    return config.seed, found


if __name__ == "__main__":
    print(f"| %, at T = | {' | '.join(map(str, TIMES))} |")
    print("|---" * (len(TIMES) + 1) + "|")
    for run in sys.argv[1:]:
        seed, rows = shares(run)
        cells = " | ".join(f"{base:.0f} → {trained:.0f}" for base, trained in zip(*rows))
        print(f"| seed {seed} | {cells} |", flush=True)
