# SPDX-License-Identifier: MIT
"""Prints the tables of study.md: `python assets/study.py [FOLDER]`

The runs are those of study.tar.xz, or of a folder that study.sh has filled.
"""
import csv
import pathlib
import re
import statistics
import sys
import tarfile

HERE = pathlib.Path(__file__).resolve().parent
TABLES = {                                      # title of a row -> flags
    "definitions": {
        "`p1`, the default": "default", "`p2`": "--transition=p2", "`ar`": "--transition=ar",
        "`p1_literal`, without the noise": "--transition=p1_literal"},
    "parts": {
        "not divided by the std": "--no-divide-by-std",
        "no filter, as many pictures": "--filter-quantile=0 --updates=93",
        "KL": "--beta=0.01", "KL, ten times as strong": "--beta=0.1",
        "two inner epochs": "--inner-epochs=2",
        "no noise in the ranking": "--temperature=0",
        "no noise, `p2`": "--temperature=0 --transition=p2"},
    "savings": {
        "loss on 6 of 12 steps, at random": "--score-steps=6",
        "loss on 3 of 12 steps, at random": "--score-steps=3",
        "loss on the first 6 steps": "--score-steps=6 --reduction=first",
        "loss on the last 6 steps": "--score-steps=6 --reduction=last",
        "trained with 6 steps": "--steps=6"},
    "sizes": {
        "groups of 4, as many pictures": "--group-size=4 --groups=24",
        "groups of 16, as many pictures": "--group-size=16 --groups=6",
        "learning rate / 3": "--lr=5e-4", "learning rate x 3": "--lr=4.5e-3",
        "twice the updates": "--updates=108"}}
HACKING = "--reward=assets.hacking:recall --measure=correct"


def read_files(path):
    """The tables and logs of a folder or an archive: SEED/FLAGS/NAME -> text"""
    files = {}
    if path.is_dir():
        for kind in ("metrics.csv", "log.txt"):
            for file in path.glob(f"*/*/{kind}"):
                files[file.relative_to(path).as_posix()] = file.read_text()
    elif path.exists():
        with tarfile.open(path) as tar:
            for member in tar:
                files[member.name] = tar.extractfile(member).read().decode()
    return files


def summary(seed, flags, rows, end):
    """What the tables show of a run, of its rows and the last three lines of its log -> dict"""
    size = 6
    named = re.search(r"--group-size=(\d+)", flags)
    if named:
        size = int(named[1])
    reached = [int(row["update"]) for row in rows if float(row["heldout"] or 0) >= 0.7]
    return {
        "seed": int(seed), "rows": rows, "base": float(end[0].split()[2]),
        "trained": float(rows[-1]["heldout"]), "reached": reached[:1],
        "grad": float(rows[0]["grad"]),
        "pictures": size * sum(int(row["sampled"]) for row in rows),
        "seconds": sum(float(row["seconds"]) for row in rows)}


def read_runs(path):
    """Flags -> the runs with them, ordered by seed, a dict each

    SystemExit if a row of TABLES has fewer than two, the least that has a standard deviation.
    """
    files = read_files(path)
    runs = {}
    for name in sorted(files):
        if not name.endswith("/metrics.csv"):
            continue
        seed, flags, _ = name.split("/")
        rows = list(csv.DictReader(files[name].splitlines()))
        end = files.get(f"{seed}/{flags}/log.txt", "").splitlines()[-3:]
        ended = end and end[0].startswith("base held-out") and "held-out" in end[-1]
        if ended:
            runs.setdefault(flags, []).append(summary(seed, flags, rows, end))
    for table in TABLES.values():
        for flags in table.values():
            if len(runs.get(flags, [])) < 2:
                sys.exit(f"{path} holds no runs, or too few, of {flags}; assets/study.sh makes "
                         "them")
    return runs


def mean(values, digits=2):
    """The mean of some numbers, and their standard deviation, as text"""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def row(title, flags, runs):
    """A row of a table, next to the base of the same seeds"""
    bases = [run["base"] for run in runs]
    trained = [run["trained"] for run in runs]
    below = sum(run["trained"] < run["base"] for run in runs)
    reached = []
    for run in runs:
        reached += run["reached"]
    first = "-"
    if reached:
        first = f"{statistics.mean(reached):.0f}"
    if 0 < len(reached) < len(runs):
        first += f" ({len(reached)} of {len(runs)})"
    grad = statistics.mean(run["grad"] for run in runs)
    pictures = statistics.mean(run["pictures"] for run in runs)
    seconds = statistics.mean(run["seconds"] for run in runs)
    shown = ""
    if flags != "default":
        shown = f"`{flags.replace('=', ' ')}`"
    return (f"| {title} | {shown} | {len(runs)} | {mean(bases)} | {mean(trained)} | {below} | "
            f"{first} | {grad:.2f} | {pictures:.0f} | {seconds:.0f} |")


def hacking_row(flags, runs):
    """A row of the table of reward hacking"""
    beta = "0"
    if "--beta=" in flags:
        beta = flags.split("--beta=")[1]
    first = [float(run["rows"][0]["reward"]) for run in runs]
    last = [float(run["rows"][-1]["reward"]) for run in runs]
    bases = [run["base"] for run in runs]
    best = [max(float(row["heldout"] or 0) for row in run["rows"]) for run in runs]
    trained = [run["trained"] for run in runs]
    kl = "-"
    if beta != "0":
        kl = mean([float(run["rows"][-1]["kl"]) for run in runs])
    return (f"| {beta} | {len(runs)} | {mean(first)}, {mean(last)} | {mean(bases)}, {mean(best)}, "
            f"{mean(trained)} | {kl} |")


def main(path=HERE / "study.tar.xz"):
    """Print the table of the seeds, one for each of TABLES, and the table of reward hacking"""
    runs = read_runs(pathlib.Path(path))
    print(f"| seed | {' | '.join(str(run['seed']) for run in runs['default'])} | mean ± sd |")
    for name, digits in (("base", 2), ("trained", 2), ("seconds", 0)):
        values = [run[name] for run in runs["default"]]
        cells = [f"{value:.{digits}f}" for value in values]
        print(f"| {name} | {' | '.join(cells)} | {mean(values, digits)} |")
    for name, table in TABLES.items():
        print(f"| {name} | flags | seeds | base | trained | below base | updates to 0.7 | gradient "
              "| pictures | seconds |")
        if "default" not in table.values():
            print(row("`p1`, the default, seeds 0 to 2", "default", runs["default"][:3]))
        for title, flags in table.items():
            print(row(title, flags, runs[flags]))
    print("| beta | seeds | reward: first, last update | correct: base, best after it, last | KL |")
    for flags in sorted(runs):
        if flags.startswith(HACKING):
            print(hacking_row(flags, runs[flags]))


if __name__ == "__main__":
    main(*sys.argv[1:2])
