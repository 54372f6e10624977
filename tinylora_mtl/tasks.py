"""Tasks: named sets of (prompt, target) samples, split into train, validation and test.

    tasks = load_tasks(["mini"])              # the eight embedded tasks; "mini-multilingual" is the five languages
    tasks = load_tasks(["word_sorting", "navigate"], samples=50, seed=1)

The embedded tasks are the same for every seed: 500 training, 100 validation and 100 test samples, no prompt in two of
them. A seed chooses only which training samples are kept when `samples` asks for fewer.
"""

import random
from dataclasses import dataclass

from .mini_tasks import LANGUAGES, SKILLS, worded_sample

TASK_SETS = {"mini": list(SKILLS), "mini-multilingual": list(LANGUAGES)}
SIZES = {"train": 500, "validation": 100, "test": 100}


@dataclass(frozen=True)
class Task:
    """One task. Each split is a list of (prompt, target) strings; settings are chosen on validation, never on test."""

    name: str
    train: list
    validation: list
    test: list


def load_tasks(names, samples=None, seed=0):
    """The tasks behind a list of names (of tasks or of task sets), in that order, each once.

    samples: how many training samples of each task to keep, drawn with `seed`; None keeps all.
    Raises ValueError for an unknown or repeated name, and for fewer training samples than asked for.
    """
    wanted = [name for given in names for name in TASK_SETS.get(given, [given])]
    known = [name for members in TASK_SETS.values() for name in members]
    for name in wanted:
        if name not in known:
            raise ValueError(f"unknown task {name!r}; there are: {', '.join([*TASK_SETS, *known])}")
        if wanted.count(name) > 1:
            raise ValueError(f"task {name!r} is asked for more than once")
    if not wanted:
        raise ValueError("no task is given")
    return [keep_samples(embedded_task(name), samples, seed) for name in wanted]


def embedded_task(name):
    """The embedded task of that name, always the same; no prompt is in two splits."""
    rng, seen, samples = random.Random(name), set(), []
    while len(samples) < sum(SIZES.values()):
        sample = worded_sample(name, rng)
        if sample[0] not in seen:
            seen.add(sample[0])
            samples.append(sample)
    test, rest = samples[:SIZES["test"]], samples[SIZES["test"]:]
    return Task(name, rest[SIZES["validation"]:], rest[:SIZES["validation"]], test)


def keep_samples(task, samples, seed):
    """The task with only `samples` of its training samples, drawn with `seed`."""
    if samples is None:
        return task
    if not 1 <= samples <= len(task.train):
        raise ValueError(f"{samples} training samples are asked for, but task {task.name!r} has {len(task.train)}")
    return Task(task.name, random.Random(f"{seed} {task.name}").sample(task.train, samples), task.validation, task.test)
