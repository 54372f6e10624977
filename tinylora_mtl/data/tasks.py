"""Tasks: named sets of (prompt, target) samples, split into train, validation and test.

    tasks = load_tasks(["mini"])              # the eight embedded tasks; "mini-multilingual" is the five languages
    tasks = load_tasks(["word_sorting", "navigate"], samples=50, seed=1)
    tasks = load_tasks(["sst2", "gsm8k"])     # from the Hugging Face Hub: hub.py has the list
    tasks = load_tasks(["my_task.jsonl", "data/reviews"])   # your own: see `local_task`

A task's splits are the same for every seed, and no training prompt is in its validation or test split. Where a split
is made here, a hash of the prompt says which one a sample is in: it stays there when the file grows or is renamed.
"""

import hashlib
import json
import os
import random
import unicodedata
from dataclasses import dataclass, replace
from pathlib import Path

from .embedded import ANSWERS, LANGUAGES, SKILLS, sizes_of, worded_sample
from .hub import HUB_TASKS, hub_samples

EMBEDDED = [*SKILLS, *LANGUAGES]
SPLIT_SIZES = {"train": 500, "validation": 500, "test": 1000}  # of every embedded task
TASK_SETS = {"mini": list(SKILLS), "mini-multilingual": list(LANGUAGES),
             "bbh": [name for name in HUB_TASKS if name.startswith("bbh_")]}
HELD_OUT = {"test": (0.0, 0.1, 500), "validation": (0.1, 0.2, 200)}  # a split that is missing: a tenth, at most so many
MAX_LABELS = 20


@dataclass(frozen=True)
class Task:
    """One task. Each split is a list of (prompt, target) strings; settings are chosen on validation, never on test."""

    name: str
    train: list
    validation: list
    test: list
    labels: tuple = ()  # the possible targets, if they are a closed set


def load_tasks(names, samples=None, seed=0, at_most=None):
    """The tasks behind a list of names (of tasks or task sets) and paths, in that order, each once.

    samples: how many training samples of each task to keep, drawn with `seed`; None keeps all, or `at_most` so many.
    Raises ValueError for an unknown or repeated name, for a file or row that cannot be used (with its line number), and
    for fewer training samples than asked for. A name goes before a path: write ./sst2 for a folder called sst2.
    """
    wanted = [name for given in names for name in TASK_SETS.get(given, [given])]
    if not wanted:
        raise ValueError("no task is given")
    own_names = [own_name(name) for name in wanted]
    for name, its_own in zip(wanted, own_names):
        if name not in [*EMBEDDED, *HUB_TASKS] and not is_path(name):
            known = ["mini", "mini-multilingual", *EMBEDDED, *HUB_TASKS, "bbh"]
            listed = ", ".join(name for name in known if not name.startswith("bbh_"))
            raise ValueError(f"unknown task {name!r}; there are: {listed}; or the path of a JSON Lines file, or of a "
                             "folder with train.jsonl and test.jsonl")
        if own_names.count(its_own) > 1:
            raise ValueError(f"task {its_own!r} is asked for more than once")
    return [load_task(name, samples, seed, at_most) for name in wanted]


def is_path(name):
    """Whether a task is meant by its path, not by its name."""
    return name not in [*TASK_SETS, *EMBEDDED, *HUB_TASKS] and Path(name).exists()


def own_name(name):
    """The name that a task goes by: that of its folder or file, if it is given by its path."""
    return Path(os.path.abspath(name)).name.removesuffix(".jsonl") if is_path(name) else name


def load_task(name, samples, seed, at_most):
    """One task by its name or path, with all, `samples` or `at_most` so many of its training samples."""
    if name in EMBEDDED:
        task = make_task(name, embedded_samples(name))
    elif name in HUB_TASKS:
        task = make_task(name, hub_samples(name))
    else:
        task = local_task(Path(name))
    samples = samples if at_most is None or samples is not None else min(at_most, len(task.train))
    if samples is None:
        return task
    if not 1 <= samples <= len(task.train):
        raise ValueError(f"{samples} training samples are asked for, but task {task.name!r} has {len(task.train)}")
    return replace(task, train=random.Random(f"{seed} {task.name}").sample(task.train, samples))


def embedded_samples(name, seed=None):
    """{split: samples} of the embedded task of that name; no prompt comes twice. With a seed other ones.

    Each split has as many samples of each problem size and, where there are two answers, of each: else the rarer kind
    would be used up by the split that is drawn first.
    """
    rng, seen, splits = random.Random(name if seed is None else f"{name} {seed}"), set(), {}
    kinds = [(size, answer) for size in sizes_of(name) for answer in ANSWERS.get(name, [None])]
    for split, count in SPLIT_SIZES.items():
        samples = splits[split] = []
        while len(samples) < count:
            size, answer = kinds[len(samples) % len(kinds)]
            sample = worded_sample(name, rng, size)
            if sample[0] not in seen and answer in (None, sample[1]):
                seen.add(sample[0])
                samples.append(sample)
        rng.shuffle(samples)
    return splits


def local_task(path):
    """A task of your own, from rows {"prompt": ..., "target": ...} in JSON Lines: a file, or a folder of them.

    A folder has train.jsonl or test.jsonl or both. Without validation.jsonl about a tenth of the training samples
    becomes the validation split; of a single file another tenth the test split (`make_task`).
    """
    if path.is_file():
        return make_task(own_name(path), {"train": read_jsonl(path)}, hold_out=["test", "validation"])
    files = {split: path / f"{split}.jsonl" for split in SPLIT_SIZES}
    samples = {split: read_jsonl(file) for split, file in files.items() if file.is_file()}
    if not {"train", "test"} & set(samples):
        raise ValueError(f"{path} is not a task: the folder has neither train.jsonl nor test.jsonl")
    return make_task(own_name(path), samples)


def make_task(name, samples, hold_out=("validation",)):
    """A Task from {split: samples}; a split in `hold_out` that is missing is taken from the training samples.

    A prompt that is in the test split too is dropped from the others, one in the validation split from training. A
    sample is held out if the hash of its prompt is in the split's tenth; of more than HELD_OUT of them those with the
    smallest are taken, and the rest belongs to no split, for it may have been measured on before the file grew.
    """
    splits = {split: samples.get(split, []) for split in SPLIT_SIZES}
    for ahead, behind in (("test", "validation"), ("test", "train"), ("validation", "train")):
        taken = {prompt_key(prompt) for prompt, _ in splits[ahead]}
        splits[behind] = [sample for sample in splits[behind] if prompt_key(sample[0]) not in taken]
    for split in [split for split in hold_out if split not in samples]:
        low, high, most = HELD_OUT[split]
        place = {sample: place_of(sample[0]) for sample in splits["train"]}
        held = set(sorted({value for value in place.values() if low <= value < high})[:most])
        splits[split] = [sample for sample in splits["train"] if place[sample] in held]
        splits["train"] = [sample for sample in splits["train"] if not low <= place[sample] < high]
    targets = [target for _, target in splits["train"] or splits["test"]]
    labels = set(targets)
    closed = len(labels) <= MAX_LABELS and 5 * len(labels) <= len(targets)  # few answers, each given again and again
    return Task(name, **splits, labels=tuple(sorted(labels)) if closed else ())


def prompt_key(prompt):
    """What makes two prompts the same one: the text, but for white space and how a character is composed."""
    return unicodedata.normalize("NFC", " ".join(prompt.split()))


def place_of(prompt):
    """A number from 0 to 1 that depends on the prompt alone."""
    return int.from_bytes(hashlib.sha256(prompt_key(prompt).encode()).digest()[:8], "big") / 2 ** 64


def read_jsonl(path):
    """[(prompt, target), ...] from a JSON Lines file in UTF-8; ValueError with the line number for a bad row."""
    samples = []
    with open(path, "rb") as file:  # lines end in \n only: a text may hold other characters that some call line breaks
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    samples.append(read_row(json.loads(line)))
            except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or not a sample
                raise ValueError(f"{path}, line {number}: {error}") from error
    if not samples:
        raise ValueError(f"{path} holds no sample; a line is {{\"prompt\": \"...\", \"target\": \"...\"}}")
    return samples


def read_row(row):
    """(prompt, target) of a row; ValueError for what the model could never be taught or never get right."""
    if not isinstance(row, dict):
        raise ValueError("the row is not an object with a prompt and a target")
    for key in ("prompt", "target"):
        if key not in row:
            raise ValueError(f"the row has no {key!r}; it has: {', '.join(row) or 'nothing'}")
        if not isinstance(row[key], str) or not row[key].strip():
            raise ValueError(f"{key!r} must be a text that is not empty, got {json.dumps(row[key])[:60]}")
        row[key].encode()  # UnicodeEncodeError, a ValueError, for half a character
    if "\n" in row["target"].strip():
        raise ValueError("'target' has a line break, and an answer ends with its line")
    return row["prompt"], row["target"].strip()


def require_samples(tasks, *splits):
    """ValueError for a task without a single sample in one of these splits."""
    for task in tasks:
        there = [f"{len(getattr(task, split))} {split}" for split in SPLIT_SIZES if getattr(task, split)]
        for split in splits:
            if not getattr(task, split):
                hint = "; --split validation measures on those" if split == "test" and task.validation else (
                    "; of a file about a tenth becomes the validation split and a tenth the test split, by a hash of "
                    "each prompt: give more rows, or a folder with train.jsonl and test.jsonl")
                raise ValueError(f"task {task.name!r} has no {split} samples; "
                                 f"it has: {', '.join(there) or 'none'}{hint}")


def check_labels(tasks, score):
    """ValueError if answers are to be chosen from a task's labels, and they are not a closed set."""
    for task in tasks:
        if score == "choose" and not task.labels:
            raise ValueError(f"task {task.name!r} has no closed set of labels to choose from; use --score generate")


def scored_samples(tasks, split, count):
    """The tasks with `count` samples of a split, or with all if it has no more or count is None: always the same ones.

    They are drawn, not the first ones, for files are often sorted by their labels.
    """
    def drawn(name, samples):
        if count is None or count >= len(samples):
            return samples
        return random.Random(f"score {name}").sample(samples, count)

    return [replace(task, **{split: drawn(task.name, getattr(task, split))}) for task in tasks]


def with_shots(task, split, shots):
    """The task with the same `shots` solved samples before every prompt of a split; ValueError if it has too few.

    They are training samples; where there are none (Big-Bench Hard), they are taken from the split, and not scored.
    """
    pool = {prompt_key(sample[0]): sample for sample in task.train or getattr(task, split)}  # none is shown twice
    if len(pool) < shots + (not task.train):
        raise ValueError(f"task {task.name!r} has {len(pool)} samples, too few for {shots} shots")
    shown = dict(random.Random(f"shots {task.name}").sample(list(pool.items()), shots))
    before = "".join(f"{prompt} {target}\n\n" for prompt, target in shown.values())
    return replace(task, **{split: [(before + prompt, target) for prompt, target in getattr(task, split)
                                    if prompt_key(prompt) not in shown]})
