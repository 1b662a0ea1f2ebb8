"""``python -m tests.chaos``: kill training runs at all moments, and see that they end as if nothing had happened."""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path

from tests.chaos.attack import Kill, Outcome, attack, copy, differences, draw
from tests.chaos.campaigns import CAMPAIGNS, EVERYTHING, SMALL
from tests.pipeline.conftest import Clone, make_clone

PRINTING = threading.Lock()


def say(line: str) -> None:
    with PRINTING:
        print(line, flush=True)


def campaign(name: str, base: Clone, folder: Path, seed: int) -> Outcome:
    """Run one campaign, print how it went, and delete its folder where all went well."""
    began = time.monotonic()
    chosen = CAMPAIGNS[name]
    kills = draw(chosen.kills, seed + zlib.crc32(name.encode()))
    outcome = Outcome()
    try:
        outcome = run(kills, chosen.stops_early, {**EVERYTHING, **chosen.changes}, base, folder)
    except (AssertionError, OSError, subprocess.SubprocessError) as error:
        outcome.faults.append(f"{type(error).__name__}: {error}")
    except Exception:
        outcome.faults.append(traceback.format_exc())
    verdict = f"DIFFERENT, kept in {folder}" if outcome.faults else "identical"
    say(
        f"{name:34} {len(outcome.kills)} kills, {outcome.repeated:2} steps made twice, "
        f"{time.monotonic() - began:4.0f} s: {verdict}\n    {', '.join(map(str, kills))}"
    )
    for fault in outcome.faults:
        say(f"    {fault}")
    if not outcome.faults:
        shutil.rmtree(folder, ignore_errors=True)
    return outcome


def run(kills: list[Kill], stops_early: bool, changes: dict[str, object], base: Clone, folder: Path) -> Outcome:
    # Nothing of the section hardware may have a part in the result.
    undisturbed = {**changes, "hardware__num_workers": 0, "hardware__checkpoint_every": "1 h"}
    reference = copy(base, folder / "reference", undisturbed)
    reference.repro()
    killed = copy(base, folder / "killed", changes)
    outcome = attack(killed, kills, folder / "log")
    if outcome.faults:
        return outcome
    outcome.faults += differences(killed, reference)
    if stops_early:
        epochs = len((reference.path / "models/a/history.csv").read_text(encoding="utf-8").splitlines()) - 1
        if not 3 <= epochs < int(str(changes["trainer__epochs"])):
            outcome.faults.append(f"early stopping did not end the run: {epochs} epochs")
    return outcome


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="of the calls at which runs are killed; one is drawn if there is none")
    parser.add_argument("--only", nargs="*", help="campaigns whose names contain one of these words")
    arguments = parser.parse_args()
    if not sys.platform.startswith("linux"):
        print("kills go by /proc: on Linux alone")
        return 1
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(10**6)
    names = [name for name in CAMPAIGNS if not arguments.only or any(word in name for word in arguments.only)]
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="anneal-chaos-"))
    cores = sorted(os.sched_getaffinity(0))
    places = count()

    def take_a_core() -> None:  # for the thread and all processes that it starts
        os.sched_setaffinity(0, {cores[next(places) % len(cores)]})

    say(f"seed {seed}; {len(names)} campaigns on {len(cores)} cores in {folder}")
    base = make_clone(folder / "base")
    base.set(**SMALL)
    base.repro("augment")
    import mlflow  # noqa: F401  # once, and not in several threads at a time

    with ThreadPoolExecutor(len(cores), initializer=take_a_core) as pool:
        one = partial(campaign, base=base, seed=seed)
        outcomes = list(
            pool.map(lambda name: one(name, folder=folder / name.replace(", ", "-").replace(" ", "-")), names)
        )
    kills = [kill for outcome in outcomes for kill in outcome.kills]
    for title, counts in (
        ("moments", Counter(kill.moment for kill in kills)),
        ("killed", Counter(kill.whom for kill in kills)),
    ):
        say(f"{title}: " + ", ".join(f"{what} {number}" for what, number in sorted(counts.items())))
    same = sum(not outcome.faults for outcome in outcomes)
    minutes = (time.monotonic() - began) / 60
    say(f"{same}/{len(outcomes)} identical after {len(kills)} SIGKILLs, seed {seed}, {minutes:.1f} minutes")
    if same == len(outcomes):
        shutil.rmtree(folder, ignore_errors=True)
    return int(same != len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
