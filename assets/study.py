# SPDX-License-Identifier: MIT
"""Prints the README's tables of results from the runs in study.tar.xz: `python assets/study.py`"""
import collections
import csv
import pathlib
import re
import statistics
import sys
import tarfile

HERE = pathlib.Path(__file__).resolve().parent
ROWS = (                                        # title, flags, number of seeds, in three tables
    (("p1, the default", "", 5), ("p2", "--transition p2", 5), ("AR-style", "--transition ar", 5),
     ("p1 as printed, noise ignored", "--transition p1_literal", 5),
     ("p1, seeds 0 to 2 alone", "", 3),
     ("twice the updates (with 54: 0.86)", "--updates 108", 8),
     ("6 of 12 steps, at random", "--score-steps 6", 3),
     ("no filter, as many pictures", "--filter-quantile 0 --updates 102", 3)),
    (("AR-style, twice the updates", "--transition ar --updates 108", 3),
     ("AR-style, gradient not clipped", "--transition ar --max-grad-norm 1000", 3),
     ("without noise", "--temperature 0", 3),
     ("p2 without noise", "--transition p2 --temperature 0", 3),
     ("3 of 12 steps, at random", "--score-steps 3", 3),
     ("the first 6 of 12 steps", "--score-steps 6 --reduction first", 3),
     ("the last 6 of 12 steps", "--score-steps 6 --reduction last", 3),
     ("trained with 6 steps", "--steps 6", 3), ("two inner epochs", "--inner-epochs 2", 3),
     ("group size 16", "--group-size 16 --groups 6", 3), ("learning rate / 3", "--lr 5e-4", 3),
     ("learning rate x 3", "--lr 4.5e-3", 3), ("KL", "--beta 0.01", 3),
     ("KL, stronger", "--beta 0.1", 3)))

def read_runs(path):
    """The runs in an archive, SEED/FLAGS/metrics.csv and log.txt -> flags -> list of dicts"""
    runs = collections.defaultdict(list)
    with tarfile.open(path) as tar:
        files = {member.name: tar.extractfile(member).read().decode() for member in tar}
    for name in sorted(name for name in files if name.endswith("/metrics.csv")):
        _, seed, flags, _ = name.split("/")
        rows = list(csv.DictReader(files[name].splitlines()))
        log = files[name.replace("metrics.csv", "log.txt")]
        size = int((re.search(r"--group-size=(\d+)", flags) or [0, 4])[1])
        reached = [int(row["update"]) for row in rows if float(row["heldout"] or 0) >= 0.7]
        runs["" if flags == "default" else flags.replace("=", " ")].append({
            "seed": int(seed), "base": float(re.search(r"heldout_base: (\S+)", log)[1]),
            "trained": float(rows[-1]["heldout"]), "reached": reached[:1],
            "pictures": size * sum(int(row["sampled"]) for row in rows)})
    return runs

def row(title, flags, runs):
    """A row of a table."""
    def spread(name):
        values = [run[name] for run in runs]
        return f"{statistics.mean(values):.2f}±{statistics.stdev(values):.2f}"

    below = sum(run["trained"] < run["base"] for run in runs)
    reached = [run["reached"][0] for run in runs if run["reached"]]
    first = f"{statistics.mean(reached):.0f}" if reached else "-"
    if 0 < len(reached) < len(runs):
        first += f" ({len(reached)})"
    pictures = statistics.mean(run["pictures"] for run in runs)
    return (f"| {title} | {f'`{flags}`' if flags else ''} | {len(runs)} | {spread('base')} | "
            f"{spread('trained')} | {below} | {first} | {pictures:.0f} |")

def main(path=HERE / "study.tar.xz"):
    """Print the table of seeds, and the others."""
    if not path.exists():
        sys.exit(f"{path} is missing: it holds the kept runs")
    runs = read_runs(path)
    print(f"| seed | {' | '.join(str(run['seed']) for run in runs[''])} | mean |")
    for title, name in (("base, held-out", "base"), ("trained, held-out", "trained")):
        values = [run[name] for run in runs[""]]
        print(f"| {title} | {' | '.join(f'{x:.2f}' for x in [*values, statistics.mean(values)])} |")
    for table in ROWS:
        print("| run | flags | seeds | base | held-out | below base | updates to 0.7 | pictures |")
        for title, flags, seeds in table:
            print(row(title, flags, [run for run in runs[flags] if run["seed"] < seeds]))

if __name__ == "__main__":
    main()
