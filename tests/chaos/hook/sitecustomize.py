"""Kills the trainer, dvc, or both with all that belongs to them, at an exact call; and counts optimizer steps.

Python imports this at its start where the folder is on PYTHONPATH, which it is for the processes of a campaign alone.
Nothing happens but in a trainer. ANNEAL_CHAOS names a folder with ``plan.json``, the kills in their order, and
``done``, the number of those that have happened; ``steps.log`` gets a line an optimizer step: kills before it, member, step.
"""

import functools
import importlib.machinery
import importlib.util
import json
import os
import re
import shutil  # before os is changed: it looks at once what os can do
import signal
import sys

assert shutil

MAIN = os.getpid()


def read(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def write(path, text, mode="w"):
    with open(path, mode, encoding="utf-8") as file:
        file.write(text)


def descendants(root):
    parents = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            parents[int(name)] = int(read(f"/proc/{name}/stat").rpartition(")")[2].split()[1])
        except OSError:
            continue
    found = [root]
    for pid in found:
        found += [child for child, parent in parents.items() if parent == pid]
    return found


def dvc():
    pid = os.getppid()
    command = read(f"/proc/{pid}/cmdline").replace("\0", " ")
    assert "dvc" in command and "repro" in command, f"the trainer's parent is no dvc but {command}"
    return pid


def kill(whom):
    if whom == "all":
        pids = [pid for pid in descendants(dvc()) if pid != MAIN]
        for pid in pids:  # none may see another die and do something about it
            os.kill(pid, signal.SIGSTOP)
        for pid in reversed(pids):  # dvc last: this process dies with it
            os.kill(pid, signal.SIGKILL)
    os.kill(dvc() if whom == "dvc" else MAIN, signal.SIGKILL)


def path_in(arguments):
    """Return the last path among the arguments, or that of a file descriptor."""
    if arguments and isinstance(arguments[0], int):
        return os.readlink(f"/proc/self/fd/{arguments[0]}")
    paths = [os.fspath(value) for value in arguments if isinstance(value, str | os.PathLike)]
    return os.path.abspath(paths[-1]) if paths else ""


class Watch:
    """One kill that is to come."""

    def __init__(self, folder, number, moment, call, whom):
        self.folder, self.number, self.moment, self.call, self.whom = folder, number, moment, call, whom
        self.seen = 0

    def counts(self, arguments):
        if os.getpid() != MAIN:  # a loader process
            return False
        if self.moment["path"] and not re.search(self.moment["path"], path_in(arguments)):
            return False
        return not self.moment["in_window"] or arguments[0].trainer.fit_loop._should_accumulate()

    def wrap(self, function):
        @functools.wraps(function)
        def watched(*arguments, **options):
            counts = self.counts(arguments)
            if counts and not self.moment["after"]:
                self.strike(arguments)
            result = function(*arguments, **options)
            if counts and self.moment["after"]:
                self.strike(arguments)
            return result

        return watched

    def strike(self, arguments):
        self.seen += 1
        if self.seen != self.call:
            return
        if self.moment["cut"]:
            os.ftruncate(arguments[0], os.fstat(arguments[0]).st_size // 2)
        write(f"{self.folder}/done", str(self.number + 1))
        kill(self.whom)


class AfterImport:
    """Changes attributes of modules as soon as they have been imported."""

    def __init__(self, changes):
        self.changes = changes  # module -> [(attribute, function to function)]

    def find_spec(self, name, path=None, target=None):
        changes = self.changes.pop(name, None)
        if changes is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            change(module, changes)

        spec.loader.exec_module = exec_module
        return spec


def change(module, changes):
    for attribute, wrap in changes:
        *owners, name = attribute.split(".")
        owner = functools.reduce(getattr, owners, module)
        setattr(owner, name, wrap(getattr(owner, name)))


def arm(folder, member):
    number = int(read(f"{folder}/done"))
    write(f"{folder}/trainer", str(MAIN))
    plan = json.loads(read(f"{folder}/plan.json"))

    def count_steps(function):
        @functools.wraps(function)
        def counted(self, *arguments, **options):
            result = function(self, *arguments, **options)
            if self.trainer.max_steps < 0:  # not those of a range test
                write(f"{folder}/steps.log", f"{number} {member} {self.trainer.global_step + 1}\n", "a")
            return result

        return counted

    changes = {"anneal.training.module": [("TrainingModule.optimizer_step", count_steps)]}
    if number < len(plan):
        watch = Watch(folder, number, **plan[number])
        for function in watch.moment["functions"]:
            module, attribute = function.split(":")
            changes.setdefault(module, []).append((attribute, watch.wrap))
    change(os, changes.pop("os", []))
    sys.meta_path.insert(0, AfterImport(changes))


if "ANNEAL_CHAOS" in os.environ and "stages.train" in sys.orig_argv:
    arm(os.environ["ANNEAL_CHAOS"], sys.orig_argv[-1])
