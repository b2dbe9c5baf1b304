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


def shares(policy, config, splits):
    """The share of correct held-out pictures at each of TIMES, in percent -> list"""
    found = []
    for T in TIMES:
        other = dataclasses.replace(config, eval_steps=T)
        evaluation = mask_grpo.evaluate(policy, reward.shapes_correct, splits, other, 0)
        found.append(100 * evaluation["scores"][1].mean())
    return found


def main(runs):
    """Print a row per run"""
    print(f"| %, at T = | {' | '.join(str(T) for T in TIMES)} |")
    print("|---" * (len(TIMES) + 1) + "|")
    for run in runs:
        rows = {}
        for name, policy, config, splits in changes.policies(run):
            rows[name] = shares(policy, config, splits)
        cells = []
        for base, trained in zip(rows["base"], rows["trained"]):
            cells.append(f"{base:.0f} → {trained:.0f}")
        print(f"| seed {config.seed} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
