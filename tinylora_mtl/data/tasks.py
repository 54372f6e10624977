"""Tasks: named sets of (prompt, target) samples, split into train, validation and test.

    tasks = load_tasks(["mini"])              # the eight embedded tasks; "mini-multilingual" is the five languages
    tasks = load_tasks(["word_sorting", "navigate"], samples=50, seed=1)
    tasks = load_tasks(["sst2", "gsm8k"])     # from the Hugging Face Hub: hub_tasks.py has the list
    tasks = load_tasks(["my_task.jsonl", "data/reviews"])   # your own: see `local_task`

A task's splits are the same for every seed, and no training prompt is in its validation or test split. A seed chooses
only which training samples are kept when `samples` asks for fewer.
"""

import json
import os
import random
from dataclasses import dataclass, replace
from pathlib import Path

from .hub import HUB_TASKS, hub_samples
from .embedded import LANGUAGES, SKILLS, worded_sample

EMBEDDED = [*SKILLS, *LANGUAGES]
SIZES = {"train": 500, "validation": 100, "test": 100}  # of every embedded task
TASK_SETS = {"mini": list(SKILLS), "mini-multilingual": list(LANGUAGES),
             "bbh": [name for name in HUB_TASKS if name.startswith("bbh_")]}
HELD_OUT = {"validation": 200, "test": 500}  # taken from the training samples where it is missing: 10 %, at most this
MAX_LABELS = 20
SCORES = ["generate", "choose"]  # see evaluate.py; the second needs a closed set of labels


@dataclass(frozen=True)
class Task:
    """One task. Each split is a list of (prompt, target) strings; settings are chosen on validation, never on test."""

    name: str
    train: list
    validation: list
    test: list
    labels: tuple = ()  # the possible targets, if they are a closed set


def load_tasks(names, samples=None, seed=0):
    """The tasks behind a list of names (of tasks or task sets) and paths, in that order, each once.

    samples: how many training samples of each task to keep, drawn with `seed`; None keeps all.
    Raises ValueError for an unknown or repeated name, for a file or row that cannot be used (with its line number), and
    for fewer training samples than asked for. A name goes before a path: write ./sst2 for a folder called sst2.
    """
    wanted = [name for given in names for name in TASK_SETS.get(given, [given])]
    if not wanted:
        raise ValueError("no task is given")
    own_names = [task_name(name) for name in wanted]
    for name in own_names:
        if own_names.count(name) > 1:
            raise ValueError(f"task {name!r} is asked for more than once")
    return [keep_samples(load_task(name), samples, seed) for name in wanted]


def task_name(name):
    """The name a task goes by: its own, or that of its folder or file. ValueError if there is no such task."""
    if name in EMBEDDED or name in HUB_TASKS:
        return name
    if is_path(name):
        return Path(os.path.abspath(name)).name.removesuffix(".jsonl")
    from_hub = [name for name in HUB_TASKS if name not in TASK_SETS["bbh"]]
    known = ["mini", "mini-multilingual", *EMBEDDED, *from_hub, "bbh"]
    raise ValueError(f"unknown task {name!r}; there are: {', '.join(known)}; or the path of a JSON Lines file, or of a "
                     "folder with train.jsonl and test.jsonl")


def is_path(name):
    """Whether a task is meant by its path, not by its name."""
    return name not in TASK_SETS and name not in EMBEDDED and name not in HUB_TASKS and Path(name).exists()


def load_task(name):
    """One task by its name or path."""
    if name in EMBEDDED:
        return make_task(name, embedded_samples(name))
    if name not in HUB_TASKS:
        return local_task(Path(name))
    samples = hub_samples(name)
    return make_task(name, samples, hold_out=[] if "validation" in samples else ["validation"])


def local_task(path):
    """A task of your own, from rows {"prompt": ..., "target": ...} in JSON Lines: a file, or a folder of them.

    A folder has train.jsonl or test.jsonl or both, and may have validation.jsonl; without that, a tenth of the training
    samples (200 at most) becomes the validation split. Of a single file, another tenth (500 at most) becomes the test
    split. Samples with the same prompt stay together.
    """
    if path.is_file():
        return make_task(task_name(path), {"train": read_jsonl(path)}, hold_out=["test", "validation"])
    samples = {split: read_jsonl(path / f"{split}.jsonl") for split in SIZES if (path / f"{split}.jsonl").is_file()}
    if not {"train", "test"} & set(samples):
        raise ValueError(f"{path} is not a task: the folder has neither train.jsonl nor test.jsonl")
    return make_task(task_name(path), samples, hold_out=[] if "validation" in samples else ["validation"])


def make_task(name, samples, hold_out=()):
    """A Task from {split: samples}; the splits in `hold_out` are taken from the training samples, by prompt.

    A prompt that is in the test split too is dropped from the others, one in the validation split from training.
    """
    splits = {split: list(samples.get(split, [])) for split in SIZES}
    for ahead, behind in (("test", "validation"), ("test", "train"), ("validation", "train")):
        taken = {prompt for prompt, _ in splits[ahead]}
        splits[behind] = [sample for sample in splits[behind] if sample[0] not in taken]
    for split in hold_out:
        prompts = sorted({prompt for prompt, _ in splits["train"]})
        held = set(random.Random(f"{name} {split}").sample(prompts, min(HELD_OUT[split], (len(prompts) + 9) // 10)))
        splits[split] = [sample for sample in splits["train"] if sample[0] in held]
        splits["train"] = [sample for sample in splits["train"] if sample[0] not in held]
    targets = [target for _, target in splits["train"] or splits["test"]]
    labels = set(targets)
    closed = len(labels) <= MAX_LABELS and 5 * len(labels) <= len(targets)  # few answers, each given again and again
    return Task(name, **splits, labels=tuple(sorted(labels)) if closed else ())


def read_jsonl(path):
    """[(prompt, target), ...] from a JSON Lines file in UTF-8; ValueError with the line number for a bad row."""
    samples = []
    with open(path, "rb") as file:  # lines end in \n only: a text may hold other characters that some call line breaks
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if text:
                    samples.append(read_row(json.loads(text)))
            except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or not a sample
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
        row[key].encode()  # half a surrogate pair is no text: UnicodeEncodeError, a ValueError
    if "\n" in row["target"].strip():
        raise ValueError("'target' has a line break, and an answer ends with its line")
    return row["prompt"], row["target"].strip()


def embedded_samples(name):
    """{split: samples} of the embedded task of that name, always the same; no prompt comes twice."""
    rng, seen, samples = random.Random(name), set(), []
    while len(samples) < sum(SIZES.values()):
        sample = worded_sample(name, rng)
        if sample[0] not in seen:
            seen.add(sample[0])
            samples.append(sample)
    test, rest = samples[:SIZES["test"]], samples[SIZES["test"]:]
    return {"train": rest[SIZES["validation"]:], "validation": rest[:SIZES["validation"]], "test": test}


def keep_samples(task, samples, seed):
    """The task with only `samples` of its training samples, drawn with `seed`."""
    if samples is None:
        return task
    if not 1 <= samples <= len(task.train):
        raise ValueError(f"{samples} training samples are asked for, but task {task.name!r} has {len(task.train)}")
    return replace(task, train=random.Random(f"{seed} {task.name}").sample(task.train, samples))


def require_samples(tasks, *splits):
    """ValueError for a task without a single sample in one of these splits."""
    for task in tasks:
        for split in splits:
            if not getattr(task, split):
                there = [f"{len(getattr(task, name))} {name}" for name in SIZES if getattr(task, name)]
                hint = "; --split validation measures on those" if split == "test" and task.validation else ""
                raise ValueError(f"task {task.name!r} has no {split} samples; it has: "
                                 f"{', '.join(there) or 'none'}{hint}")


def check_labels(tasks, score):
    """ValueError if answers are to be chosen from a task's labels, and they are not a closed set."""
    for task in tasks:
        if score == "choose" and not task.labels:
            raise ValueError(f"task {task.name!r} has no closed set of labels to choose from; use --score generate")


def with_shots(task, split, shots):
    """The task with the same `shots` solved samples before every prompt of a split.

    They are training samples; where there are none (Big-Bench Hard), they are taken from the split, and not scored.
    Raises ValueError if there are too few samples for that.
    """
    pool = dict(task.train or getattr(task, split))  # prompt -> target: no prompt is shown twice
    if len(pool) < shots + (not task.train):
        raise ValueError(f"task {task.name!r} has {len(pool)} samples, too few for {shots} shots")
    shown = dict(random.Random(f"shots {task.name}").sample(list(pool.items()), shots))
    before = "".join(f"{prompt} {target}\n\n" for prompt, target in shown.items())
    return replace(task, **{split: [(before + prompt, target) for prompt, target in getattr(task, split)
                                    if prompt not in shown]})
