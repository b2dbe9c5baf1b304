# SPDX-License-Identifier: MIT
"""The runs and the tables of study.md

    python assets/study.py runs FOLDER [JOBS]   make the runs, JOBS at a time; it can be stopped
    python assets/study.py tables [PATH]        tables of study.tar.xz, or of such a folder
    python assets/study.py changes RUN ...      what training changes
    python assets/study.py steps RUN ...        other numbers of steps
    python assets/study.py schedules RUN ...    the best schedule for each base

A RUN is the folder of one run, FOLDER/SEED/FLAGS. The last three need its weights, which are too
large to keep; changes.txt, steps.txt and schedules.txt are what they printed.
"""
import collections
import concurrent.futures
import csv
import dataclasses
import itertools
import os
import pathlib
import random
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import typing

import torch
from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import mask_grpo  # noqa: E402
import reward  # noqa: E402

# --------------------------------------------------------------------------------------------------
# The runs. All are evaluated every 27 updates, which saves time and changes nothing else.


class Variant(typing.NamedTuple):
    """A row of a table"""
    title: str
    flags: str                      # in addition to the defaults
    seeds: tuple                    # the seeds that were run


NOISY = "--caption-noise=0.5"                   # 46% of the captions are wrong
TWO_THREADS = "two threads"                     # in place of flags: the default, with two threads
SECOND = "second machine"                       # before the flags: runs that are kept apart
HACKING = "--reward=assets.study:recall --measure=correct"
THREE = (0, 1, 2)
EIGHT = tuple(range(8))
FRESH = (3, 4, 5, 6, 7)                         # no learning rate was chosen on these seeds


def at_rates(start=""):
    """Each definition at each learning rate, three seeds each -> list of Variant

    start: the flags that all have in common
    """
    rows = []
    for definition in ("p1", "p2", "ar"):
        for lr in ("5e-4", "1.5e-3", "4.5e-3"):
            flags = []
            if start:
                flags.append(start)
            if definition != "p1":              # those that are defaults are left out
                flags.append(f"--transition={definition}")
            if lr != "1.5e-3":
                flags.append(f"--lr={lr}")
            rows.append(Variant(f"`{definition}`, {lr}", " ".join(flags), THREE))
    return rows


TABLES = {
    "default": [
        Variant("`p1`, the default", "", tuple(range(10))),
        Variant("trained with two threads", TWO_THREADS, tuple(range(10)))],
    "learning rates": at_rates(),
    "definitions": [
        Variant("`p1`, the default", "", EIGHT),
        Variant("`p2`", "--transition=p2", EIGHT),
        Variant("`ar`", "--transition=ar", THREE),
        Variant("`p1_literal`", "--transition=p1_literal", THREE),
        Variant("`p2`, seeds 3 to 7", "--transition=p2", FRESH)],
    "learning rates, noisy captions": at_rates(f"{SECOND} {NOISY}"),
    "noisy captions": [
        Variant("`p1`, wrong captions", NOISY, EIGHT),
        Variant("`p2`, wrong captions", f"{NOISY} --transition=p2", EIGHT),
        Variant("the same, seeds 3 to 7", f"{NOISY} --transition=p2", FRESH)],
    "ranking noise": [
        Variant("the default, 3", "", THREE),
        Variant("none", "--temperature=0", THREE),
        Variant("48", "--temperature=48", THREE)],
    "ranking noise 1": [
        Variant("`p1`", "--temperature=1", THREE),
        Variant("`p1_literal`", "--temperature=1 --transition=p1_literal", THREE)],
    "other numbers of steps": [
        Variant("12", "--steps=12 --eval-steps=12", THREE),
        Variant("8, the default", SECOND, THREE),
        Variant("6", "--steps=6 --eval-steps=6", THREE),
        Variant("4", "--steps=4 --eval-steps=4", THREE)],
    "other settings": [
        Variant("the default", SECOND, THREE),
        Variant("KL, beta 0.01", "--beta=0.01", THREE),
        Variant("KL, beta 0.1", "--beta=0.1", THREE),
        Variant("no filter, 110 updates", "--filter-quantile=0 --updates=110", THREE),
        Variant("not divided by the std", "--no-divide-by-std", THREE),
        Variant("two inner epochs", "--inner-epochs=2", THREE),
        Variant("loss on 4 random steps", "--score-steps=4", THREE),
        Variant("loss on the first 4 steps", "--score-steps=4 --reduction=first", THREE),
        Variant("loss on the last 4 steps", "--score-steps=4 --reduction=last", THREE),
        Variant("trained with 4 of 8 steps", "--steps=4", THREE)],
    "hacking": [
        Variant("0", HACKING, THREE),
        Variant("0.1", f"{HACKING} --beta=0.1", THREE),
        Variant("1", f"{HACKING} --beta=1", THREE)],
}
COMPARED = {                                    # flags that the other rows differ from; "": default
    "learning rates, noisy captions": f"{SECOND} {NOISY}",
    "noisy captions": NOISY,
    "ranking noise 1": "--temperature=1",
    "other numbers of steps": SECOND,
    "other settings": SECOND}
SPEED = {                                       # comparisons of speed, with the flags above
    "": TABLES["definitions"],
    NOISY: TABLES["noisy captions"],
    f"{SECOND} {NOISY}": [
        Variant("`p1`, wrong captions, second machine", f"{SECOND} {NOISY}", THREE),
        Variant("`p2`, wrong captions, second machine",
                f"{SECOND} {NOISY} --transition=p2", THREE)]}


def folder_of(seed, flags):
    """Where a run lies below the folder of the study -> str"""
    return f"{seed}/{flags or 'default'}"


def make_run(folder, seed, flags):
    """Make one run, or continue it; do nothing if it is finished

    Runs of one thread share their bases: each is made once per seed.
    """
    out = folder / folder_of(seed, flags)
    if (out / "comparison.png").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    for base in folder.glob(f"{seed}/*/base-*.pt"):
        alike = (base.parent.name == TWO_THREADS) == (flags == TWO_THREADS)
        if alike and not (out / base.name).exists():
            shutil.copy(base, out)
    command = [sys.executable, "mask_grpo.py", "--device=cpu", f"--seed={seed}", f"--out={out}",
               "--eval-every=27"]
    threads = "1"
    if flags == TWO_THREADS:
        threads = "2"
    else:
        command += flags.removeprefix(SECOND).split()
    if (out / "checkpoint.pt").exists():
        command.append("--resume")
    print(f"seed {seed} {flags}", flush=True)
    with open(out / "log.txt", "a") as log:
        subprocess.run(command, cwd=HERE.parent, env={**os.environ, "OMP_NUM_THREADS": threads},
                       stdout=log, stderr=log, check=True)


def make_runs(folder, jobs="1"):
    """Make all runs of TABLES. The first failure ends it, as Ctrl-C does."""
    folder = pathlib.Path(folder).absolute()
    wanted = {}                                 # a dict, since it keeps the order
    for table in TABLES.values():
        for variant in table:
            for seed in variant.seeds:
                wanted[seed, variant.flags] = True
    with concurrent.futures.ThreadPoolExecutor(int(jobs)) as pool:
        running = [pool.submit(make_run, folder, seed, flags) for seed, flags in wanted]
        try:
            for run in running:
                run.result()
        finally:
            pool.shutdown(cancel_futures=True)


def recall(images, prompts):
    """A reward that can be hacked: the share of the requested objects that are there -> (B,)

    Objects that nobody asked for cost nothing.
    """
    shares = []
    for cells, prompt in zip(reward.look(images).tolist(), prompts):
        wanted, _ = reward.WANTED[prompt]
        there = [reward.OBJECTS[o] for o in cells if o >= 0]
        asked = 0
        found = 0
        for count, color, shape in wanted:
            matching = [c for s, c in there if s == shape and color in (None, c)]
            asked += count
            found += min(count, len(matching))
        shares.append(found / asked)
    return torch.tensor(shares)


# --------------------------------------------------------------------------------------------------
# The tables of metrics.csv and the logs.


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


def read_runs(path=HERE / "study.tar.xz"):
    """(seed, flags) -> what the tables show of a run, a dict

    SystemExit if a run of TABLES is missing, or has not ended.
    """
    path = pathlib.Path(path)
    files = read_files(path)
    runs = {}
    for table in TABLES.values():
        for variant in table:
            for seed in variant.seeds:
                name = folder_of(seed, variant.flags)
                log = files.get(f"{name}/log.txt", "").splitlines()
                if len(log) < 4 or not log[-3].startswith("base held-out"):    # how a run ends
                    sys.exit(f"{path} holds no run {name}; make it with: python assets/study.py "
                             "runs FOLDER")
                rows = list(csv.DictReader(files[f"{name}/metrics.csv"].splitlines()))
                runs[seed, variant.flags] = summary(rows, log)
    return runs


def summary(rows, log):
    """What the tables show of a run, from its rows and its log -> dict"""
    scores = {}                                 # (update, split) -> the share of right pictures
    for line in log:
        found = re.match(r"(?:base|update (\d+)) (training|held-out) (\.\d+|1\.\d+)", line)
        if found:
            scores[int(found[1] or 0), found[2]] = float(found[3])
    last = len(rows)
    return {
        "rows": rows, "scores": scores,
        "base": scores[0, "held-out"], "trained": scores[last, "held-out"],
        "on training captions": scores[last, "training"],
        "reward": statistics.mean(float(row["reward"]) for row in rows),
        "grad": float(rows[0]["grad"]),
        "groups": sum(int(row["sampled"]) for row in rows),
        "seconds": sum(float(row["seconds"]) for row in rows)}


# how many standard errors a mean must be from 0, by the number of seeds: Student's t at 5%
LIMITS = {2: 12.71, 3: 4.30, 5: 2.78, 8: 2.36}


def mean(values, digits=2):
    """The mean of some numbers, and their standard deviation, as text"""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def difference(ours, others):
    """The mean of paired differences and its standard error, as text; a star beyond LIMITS"""
    differences = [one - other for one, other in zip(ours, others, strict=True)]
    middle = statistics.mean(differences)
    error = statistics.stdev(differences) / len(differences) ** 0.5
    star = ""
    if abs(middle) > LIMITS[len(differences)] * error:
        star = " *"
    return f"{middle:+.3f} ± {error:.3f}{star}"


def row(variant, runs, compared):
    """A row of a table: the base, the trained policy, and its difference from other flags"""
    mine = [runs[seed, variant.flags] for seed in variant.seeds]
    trained = [run["trained"] for run in mine]
    cells = [variant.title, str(len(mine)), mean([run["base"] for run in mine]), mean(trained), ""]
    if variant.flags != compared:
        others = [runs[seed, compared]["trained"] for seed in variant.seeds]
        cells[-1] = difference(trained, others)
    for name, digits in (("grad", 2), ("groups", 0), ("seconds", 0)):
        cells.append(f"{statistics.mean(run[name] for run in mine):.{digits}f}")
    return f"| {' | '.join(cells)} |"


def speed_row(variant, runs, compared):
    """A row of the table of speed: the training reward, averaged over all updates"""
    rewards = [runs[seed, variant.flags]["reward"] for seed in variant.seeds]
    others = [runs[seed, compared]["reward"] for seed in variant.seeds]
    cells = [variant.title, str(len(rewards)), mean(rewards, 3), ""]
    if variant.flags != compared:
        cells[-1] = difference(rewards, others)
    return f"| {' | '.join(cells)} |"


def hacking_row(variant, runs):
    """A row of the table of reward hacking

    "best" is the evaluation after the base with the most right pictures of *training* captions.
    """
    mine = [runs[seed, variant.flags] for seed in variant.seeds]
    best = []
    for run in mine:
        shares = {}                             # of training captions, after each evaluation
        for (update, split), share in run["scores"].items():
            if split == "training" and update > 0:
                shares[update] = share
        best.append(run["scores"][max(shares, key=shares.get), "held-out"])
    cells = [
        variant.title, str(len(mine)),
        mean([float(run["rows"][0]["reward"]) for run in mine]),
        mean([float(run["rows"][-1]["reward"]) for run in mine]),
        mean([run["base"] for run in mine]), mean(best), mean([run["trained"] for run in mine]),
        mean([float(run["rows"][-1]["kl"]) for run in mine])]
    return f"| {' | '.join(cells)} |"


def print_tables(path=HERE / "study.tar.xz"):
    """The tables of an archive or a folder"""
    runs = read_runs(path)
    default, *repeated = TABLES["default"]
    mine = [runs[seed, default.flags] for seed in default.seeds]
    print(f"| seed | {' | '.join(str(seed) for seed in default.seeds)} | 0 to 7 |")
    for name in ("base", "trained", "on training captions", "seconds"):
        digits = 0 if name == "seconds" else 2
        values = [run[name] for run in mine]
        cells = [f"{value:.{digits}f}" for value in values]
        print(f"| {name} | {' | '.join(cells)} | {mean(values[:8], digits)} |")
    for variant in repeated:
        values = [runs[seed, variant.flags]["trained"] for seed in variant.seeds]
        cells = [f"{value:.2f}" for value in values]
        print(f"| {variant.title} | {' | '.join(cells)} | {mean(values[:8])} |")
    for name, table in TABLES.items():
        if name == "hacking":
            print("| beta | seeds | reward: first | last update | right: base | best | last | KL |")
            for variant in table:
                print(hacking_row(variant, runs))
        elif name != "default":
            print(f"| {name} | seeds | base | trained | difference | gradient | groups | seconds |")
            for variant in table:
                print(row(variant, runs, COMPARED.get(name, default.flags)))
    print("| speed | seeds | reward over all updates | difference |")
    for compared, table in SPEED.items():
        for variant in table:
            print(speed_row(variant, runs, compared))


# --------------------------------------------------------------------------------------------------
# What needs weights.

SIDE = reward.LATTICE
MEASURES = {
    "held-out pictures that are right, %": "right",
    "objects whose first step reveals more than one tile, %": "blind",
    "revealed before the first tile of an object, % of the picture": "first",
    "revealed before the last tile of an object, % of the picture": "last",
    "distinct pictures, % of those sampled": "distinct",
    "commonest colour of objects whose colour is open, %": "commonest",
    "pictures of captions with two colours that are right, %": "attribution"}
KINDS = ("background", "first tiles of objects", "other tiles of objects")
TIMES = (3, 4, 6, 8, 10, 12, 15, 18, 24, 36)


def policies(run):
    """The base and the trained policy of a run's folder: yields name, policy, config, captions

    The policy is one module, whose weights change. captions are those of checkpoint.pt, in two
    splits. SystemExit if the folder holds no run that has ended.
    """
    run = pathlib.Path(run)
    saved = None
    if (run / "checkpoint.pt").exists():
        saved = torch.load(run / "checkpoint.pt", "cpu")
    if saved is None or len(saved["state"]["rows"]) < saved["config"]["updates"]:
        sys.exit(f"{run} holds no run that has ended; make it with: python assets/study.py runs "
                 "FOLDER")
    config = mask_grpo.Config(**{**saved["config"], "device": "cpu"})
    policy = mask_grpo.shapes_policy(config).eval()
    base = (f"base-{config.seed}-{config.width}-{config.layers}-{config.pretrain_steps}-"
            f"{config.caption_noise}.pt")
    for name, weights in (("base", torch.load(run / base, "cpu")), ("trained", saved["policy"])):
        policy.load_state_dict(weights)
        yield name, policy, config, saved["captions"]


def sampled(policy, splits, config, T):
    """The held-out pictures of evaluation, with its noise -> trajectory, captions, PIL images"""
    n = config.eval_pictures
    prompts = []                                                    # in the order of evaluate
    for split in splits:
        for texts in split.values():
            prompts += [texts[i % len(texts)] for i in range(n)]
    generator = torch.Generator().manual_seed(config.seed + 1)      # with its noise, too
    trajectory = mask_grpo.sample(policy, prompts, config, T, generator)
    held = torch.arange(len(prompts) // 2, len(prompts))
    trajectory = mask_grpo.select(trajectory, held)
    images = [Image.fromarray(x) for x in policy.decode(trajectory.tokens).numpy()]
    return trajectory, prompts[len(held):], images


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
    return 100 * max(colors.values(), default=0) / max(1, sum(colors.values()))


def measure(policy, splits, config, T):
    """MEASURES of a policy, the tokens per picture for each kind and step, and what is right

    -> dict, (3, T), list of (caption, right)
    """
    trajectory, captions, images = sampled(policy, splits, config, T)
    right = reward.shapes_correct(images, captions) == 1            # (B,)
    tokens = by_cell(trajectory.tokens)                             # (B, 9, 4)
    steps = by_cell(trajectory.revealed_at)                         # (B, 9, 4)
    revealed = torch.bincount(trajectory.revealed_at[0], minlength=T)       # (T,) by each step
    before = (revealed.cumsum(0) - revealed) / policy.num_tokens    # (T,) share, before each step

    # an object is a cell with a tile in it, whole or broken
    drawn = tokens > 0                                              # (B, 9, 4)
    there = drawn.any(-1)                                           # (B, 9)
    begun = torch.where(drawn, steps, T).amin(-1)                   # (B, 9)
    ended = torch.where(drawn, steps, -1).amax(-1)                  # (B, 9)
    at_once = (drawn & (steps == begun[..., None])).sum(-1)         # (B, 9) tiles of its first step

    first = torch.bincount(begun[there], minlength=T)               # (T,)
    objects = torch.bincount(steps[drawn], minlength=T)             # (T,)
    ground = torch.bincount(steps[~drawn], minlength=T)             # (T,)
    of_two_colors = torch.tensor([caption in splits[1]["attribution"] for caption in captions])
    return {
        "right": percent(right),
        "blind": percent(at_once[there] > 1),
        "first": 100 * before[begun[there]].double().mean().item(),
        "last": 100 * before[ended[there]].double().mean().item(),
        "distinct": 100 * len({tuple(x) for x in trajectory.tokens.tolist()}) / len(captions),
        "commonest": commonest_color(images, captions),
        "attribution": percent(right[of_two_colors]),
    }, torch.stack([ground, first, objects - first]) / len(captions), list(zip(captions, right))


def error_over_captions(outcomes):
    """The standard error of the mean over categories, if their meanings are a sample of meanings

    A category of a single meaning does not contribute. outcomes: (caption, right) of all pictures
    """
    captions = {caption.text: caption for caption in reward.all_captions()}
    by_category = collections.defaultdict(lambda: collections.defaultdict(list))
    for text, right in outcomes:
        caption = captions[text]
        by_category[caption.category][caption.meaning].append(float(right))
    variance = 0
    for meanings in by_category.values():
        shares = [statistics.mean(rights) for rights in meanings.values()]
        if len(shares) > 1:
            variance += statistics.variance(shares) / len(shares)
    return variance ** 0.5 / len(by_category)


def print_changes(runs):
    """Base at the T of the run and at 36 steps, trained at the T of the run"""
    found = {"base": [], "base, 36 steps": [], "trained": []}
    revealed = {"base": 0, "trained": 0}
    outcomes = {"base": [], "trained": []}
    for run in runs:
        for name, policy, config, splits in policies(run):
            numbers, kinds, right = measure(policy, splits, config, config.eval_steps)
            found[name].append(numbers)
            revealed[name] = revealed[name] + kinds / len(runs)
            outcomes[name] += right
            if name == "base":
                found["base, 36 steps"].append(measure(policy, splits, config, 36)[0])
    print(f"| mean and range of {len(runs)} runs | {' | '.join(found)} |\n|---|---|---|---|")
    for title, name in MEASURES.items():
        cells = []
        for numbers in found.values():
            values = [x[name] for x in numbers]
            cells.append(f"{statistics.mean(values):.0f} ({min(values):.0f}-{max(values):.0f})")
        print(f"| {title} | {' | '.join(cells)} |")
    for name, right in outcomes.items():
        print(f"{name}: standard error over captions {error_over_captions(right):.3f}")
    for name, kinds in revealed.items():
        for kind, values in zip(KINDS, kinds.tolist()):
            print(f"{name}: {kind}: {' '.join(f'{x:.2f}' for x in values)}")


def right_percent(images, captions):
    """The share of right pictures, in percent, as text"""
    return f"{percent(reward.shapes_correct(images, captions) == 1):.0f}"


def print_steps(runs):
    """The share of right held-out pictures at each of TIMES; a base that runs share appears once"""
    print(f"| run, %, at T = | {' | '.join(str(T) for T in TIMES)} |")
    print("|---" * (len(TIMES) + 1) + "|")
    bases = set()
    for run in runs:
        for name, policy, config, splits in policies(run):
            title = f"seed {config.seed}"
            if config.caption_noise > 0:
                title += f", captions wrong {config.caption_noise:g}"
            if name == "trained":
                title += f", {config.transition}"
            elif title in bases:
                continue
            bases.add(title)
            cells = []
            for T in TIMES:
                _, captions, images = sampled(policy, splits, config, T)
                cells.append(right_percent(images, captions))
            print(f"| {title}, {name} | {' | '.join(cells)} |", flush=True)


# --------------------------------------------------------------------------------------------------
# Rivals of training: ways to sample from the *untrained* base in eight steps that get more pictures
# right. Each is chosen on pictures of training captions, and then measured as in evaluation, on
# held-out captions.
#
#   noise      the best of NOISES as the scale of the ranking noise; with the largest, the order of
#              the first steps is almost random
#   schedule   the best schedule and noise that hill climbs find
#   objects    an order of revealing made for this world: whatever is not background ranks first

STEPS = 8
NOISES = (0, 1.5, 3, 6, 12, 24, 48, 96)
BY_HAND = ([34, 32, 30, 24, 14, 7, 3, 0], [35, 34, 32, 28, 22, 15, 7, 0])
TRIALS = 50                                     # per climb
SEARCH = {"seeds": (1000, 1001), "pictures": 24}            # what a trial samples, per category
FINAL = {"seeds": (2000, 2001), "pictures": 48}             # and the last comparison


def schedules_at_first(N, rng):
    """The schedules from which the climbs begin: the cosine, linear, two by hand, one at random"""
    linear = [N - N * (t + 1) // STEPS for t in range(STEPS)]
    chance = sorted(rng.sample(range(1, N), STEPS - 1), reverse=True) + [0]
    return [mask_grpo.mask_schedule(STEPS, N), linear, *BY_HAND, chance]


def neighbour(schedule, noise, N, rng):
    """A schedule with one or two counts moved by 1 to 3, or another scale of the noise"""
    if rng.random() < 0.15:
        return schedule, noise * rng.choice((0.5, 2))
    while True:
        moved = list(schedule)
        for _ in range(rng.choice((1, 2))):
            moved[rng.randrange(len(moved) - 1)] += rng.choice((-3, -2, -1, 1, 2, 3))
        if all(before > after for before, after in zip([N, *moved], moved)):
            return moved, noise


def with_schedule(schedule, function, *arguments):
    """The result of a function that samples, with this schedule in place of the cosine"""
    cosine = mask_grpo.mask_schedule

    def replaced(T, N):
        return schedule

    mask_grpo.mask_schedule = replaced
    try:
        return function(*arguments)
    finally:
        mask_grpo.mask_schedule = cosine


def right_of(policy, split, config, schedule, noise, seeds, pictures):
    """The share of right pictures of a split's captions, the mean over seeds of the draws"""
    shares = []
    for seed in seeds:
        changed = dataclasses.replace(config, seed=seed, temperature=noise, eval_pictures=pictures)
        found = with_schedule(schedule, mask_grpo.evaluate, policy, reward.shapes_correct, [split],
                              changed, 0)
        shares.append(found["scores"].mean().item())
    return statistics.mean(shares)


def climb(policy, split, config, schedule, noise, rng):
    """The best schedule and scale of the noise that one climb finds -> list, float"""
    best = right_of(policy, split, config, schedule, noise, **SEARCH)
    for _ in range(TRIALS):
        tried, scale = neighbour(schedule, noise, policy.num_tokens, rng)
        share = right_of(policy, split, config, tried, scale, **SEARCH)
        if share >= best:
            schedule = tried
            noise = scale
            best = share
    return schedule, noise


def best_of(ways, share_of):
    """The way with the highest share; the first of those that are equal"""
    shares = [share_of(way) for way in ways]
    return ways[shares.index(max(shares))]


def best_noise(policy, split, config):
    """The best of NOISES at the cosine schedule -> float"""
    cosine = mask_grpo.mask_schedule(STEPS, policy.num_tokens)

    def share_of(noise):
        return right_of(policy, split, config, cosine, noise, **SEARCH)

    return best_of(NOISES, share_of)


def best_schedule(policy, split, config, noise):
    """The best schedule, and the best scale of the noise with it -> list, float

    The climbs begin with `noise`. Their starts and ends are compared once more, with other draws.
    """
    rng = random.Random(0)
    starts = schedules_at_first(policy.num_tokens, rng)
    candidates = [(schedule, noise) for schedule in starts]
    for schedule in starts:
        candidates.append(climb(policy, split, config, schedule, noise, rng))

    def share_of(candidate):
        schedule, noise = candidate
        return right_of(policy, split, config, schedule, noise, **FINAL)

    return best_of(candidates, share_of)


@torch.no_grad()
def objects_first(policy, prompts, schedule, noise, generator):
    """A sampler like mask_grpo.rollout, in which draws that are not background rank first

    It knows that code 0 is the background. -> tokens (B, N)
    """
    ids = policy.encode(prompts)
    MASK = policy.codebook_size
    tokens = torch.full((len(ids), policy.num_tokens), MASK)                        # (B, N)
    before = policy.num_tokens
    for t, after in enumerate(schedule):
        logp = policy(ids, tokens).log_softmax(-1)                                  # (B, N, K)
        drawn = (logp + mask_grpo.gumbel(logp.shape, generator, "cpu")).argmax(-1)  # (B, N)
        confidence = logp.gather(-1, drawn[..., None])[..., 0]                      # (B, N)
        noise *= 1 - (t + 1) / len(schedule)
        rank = confidence + noise * mask_grpo.gumbel(confidence.shape, generator, "cpu")
        rank = rank + 100 * (drawn > 0)                                             # (B, N)
        keep = rank.masked_fill(tokens != MASK, -1e9).topk(before - after).indices
        tokens = tokens.scatter(1, keep, drawn.gather(1, keep))
        before = after
    return tokens


def share_objects_first(policy, split, config, schedule, noise):
    """The share of right pictures of a split's captions with objects_first -> float"""
    prompts = []
    for texts in split.values():
        prompts += [texts[i % len(texts)] for i in range(config.eval_pictures)]
    generator = torch.Generator().manual_seed(config.seed + 1)
    tokens = objects_first(policy, prompts, schedule, noise, generator)
    images = [Image.fromarray(x) for x in policy.decode(tokens).numpy()]
    return (reward.shapes_correct(images, prompts) == 1).double().mean().item()


def best_objects_first(policy, split, config):
    """For objects_first, the best of the first schedules, each with two scales of the noise"""
    starts = schedules_at_first(policy.num_tokens, random.Random(0))

    def share_of(candidate):
        schedule, noise = candidate
        return share_objects_first(policy, split, config, schedule, noise)

    return best_of(list(itertools.product(starts, (3, 12))), share_of)


def share_held_out(policy, splits, config, noise, schedule=None):
    """The share of right held-out pictures with other noise, and another schedule, as text"""
    changed = dataclasses.replace(config, temperature=noise)
    if schedule is None:
        schedule = mask_grpo.mask_schedule(STEPS, policy.num_tokens)
    _, captions, images = with_schedule(schedule, sampled, policy, splits, changed, STEPS)
    return right_percent(images, captions)


def rivals(policy, splits, config):
    """What the rivals are for a base, and how many held-out pictures they get right -> dict"""
    shuffled = {}                               # a search sees the first captions only
    for category, texts in splits[0].items():
        shuffled[category] = random.Random(0).sample(texts, len(texts))
    noise = best_noise(policy, shuffled, config)
    schedule, its_noise = best_schedule(policy, shuffled, config, noise)
    by_objects = best_objects_first(policy, shuffled, config)
    share_by_objects = share_objects_first(policy, splits[1], config, *by_objects)
    return {
        "noise": share_held_out(policy, splits, config, noise),
        "schedule": share_held_out(policy, splits, config, its_noise, schedule),
        "objects first": f"{100 * share_by_objects:.0f}",
        "the noise": f"{noise:g}",
        "the schedule": " ".join(map(str, schedule)),
        "its noise": f"{its_noise:g}"}


def print_schedules(runs):
    """The rivals for the base of each run, in percent of right held-out pictures"""
    titles = ("run", "base", "noise", "schedule", "objects first", "trained", "the noise",
              "the schedule", "its noise")
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    for run in runs:
        cells = {}
        for name, policy, config, splits in policies(run):
            if config.eval_steps != STEPS:
                sys.exit(f"{run} samples in {config.eval_steps} steps, but schedules have {STEPS}")
            cells[name] = share_held_out(policy, splits, config, config.temperature)
            if name == "base":
                cells |= rivals(policy, splits, config)
        cells["run"] = f"seed {config.seed}"
        if config.caption_noise > 0:
            cells["run"] += f", captions wrong {config.caption_noise:g}"
        print(f"| {' | '.join(cells[title] for title in titles)} |", flush=True)


COMMANDS = {"runs": make_runs, "tables": print_tables}
OF_RUNS = {"changes": print_changes, "steps": print_steps, "schedules": print_schedules}


def main(words):
    """One of the commands at the top"""
    name, *arguments = words or [""]
    if name in OF_RUNS and arguments:
        OF_RUNS[name](arguments)
    elif name == "tables" or (name == "runs" and arguments):
        COMMANDS[name](*arguments)
    else:
        sys.exit(__doc__.split("\n\n")[1])


if __name__ == "__main__":
    main(sys.argv[1:])
