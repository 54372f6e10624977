"""What a run was trained on, in fingerprints.json: hashes by which a change of the data or of the base is noticed."""

import hashlib
from pathlib import Path

import torch

from ..adapters import adapter_parameters
from ..data.tasks import SPLIT_SIZES, prompt_key
from ..targets import unwrap
from .files import read_json, write_json

FILE = "fingerprints.json"


def of_base(model):
    """A hash of all frozen weights, rounded to bfloat16, so that it is the same for every device and `--dtype`."""
    digest, adapter = hashlib.sha256(), {id(parameter) for parameter in adapter_parameters(model).values()}
    for name, parameter in unwrap(model).named_parameters():
        if id(parameter) not in adapter:
            name = name.replace("_orig_mod.", "").replace(".base.", ".")  # as without the adapters
            digest.update(f"{name} {list(parameter.shape)}".encode())
            digest.update(parameter.detach().to("cpu", torch.bfloat16).flatten().view(torch.int16).numpy().data)
    return digest.hexdigest()


def of_prompt(prompt):
    return hashlib.sha256(prompt_key(prompt).encode()).hexdigest()[:12]


def of_split(task, split):
    """How many samples it has, and a hash of them: of the training samples in their order, which decides the batches."""
    samples = getattr(task, split)
    listed = repr(samples if split == "train" else sorted(samples))
    return {"samples": len(samples), "sha256": hashlib.sha256(listed.encode()).hexdigest()}


def of_run(model, tasks):
    """What fingerprints.json holds."""
    return {"base": of_base(model),
            "tasks": {task.name: {split: of_split(task, split) for split in SPLIT_SIZES} for task in tasks},
            "training_prompts": " ".join(sorted({of_prompt(prompt) for task in tasks for prompt, _ in task.train}))}


def write_fingerprints(folder, model, tasks):
    write_json(Path(folder) / FILE, of_run(model, tasks))


def read_fingerprints(folder):
    """What a run's fingerprints.json holds; None for a run of an older version, which has none."""
    return read_json(Path(folder) / FILE) if (Path(folder) / FILE).is_file() else None


def changes(stored, tasks, splits):
    """A line for each split of a run's tasks that holds other samples than it did."""
    lines = []
    for task in tasks:
        for split in splits if task.name in stored["tasks"] else ():
            was, now = stored["tasks"][task.name][split], of_split(task, split)
            if was != now:
                kind = "training" if split == "train" else split
                count = f"{was['samples']} then, {now['samples']} now" if was["samples"] != now["samples"] else (
                    f"{now['samples']} as before, but others")
                lines.append(f"the {kind} samples of task {task.name!r} have changed since the run began ({count})")
    return lines


def check_same(folder, model, tasks):
    """ValueError, saying what, if the data or the base are not those that the run in a folder began with."""
    stored = read_fingerprints(folder)
    if stored is None:
        raise ValueError(f"the run in {folder} is of an older version of this package and has no {FILE}, so nothing "
                         "tells whether its data are the same; start it anew")
    found = changes(stored, tasks, SPLIT_SIZES)
    if stored["base"] != of_base(model):
        found.append("the weights of the base model have changed since the run began")
    if found:
        raise ValueError(f"{'; '.join(found)}: the run in {folder} cannot go on as the same run")


def check_not_trained_on(folder, own_names, tasks, split):
    """ValueError for prompts of a split that the run in a folder was trained on, unless they were in this split then.

    Prints which splits have changed, and how many prompts another task trained on. own_names: the run's own tasks.
    """
    stored = read_fingerprints(folder)
    anyway = f"--adapter {folder}/adapter instead of --run scores them all the same"
    if stored is None:
        for task in tasks:
            if task.name in own_names:
                raise ValueError(f"the run in {folder} is of an older version of this package and has no {FILE}, so "
                                 f"{split} prompts of task {task.name!r} may have been trained on; {anyway}")
        return
    seen = set(stored["training_prompts"].split())
    for task in tasks:
        changed, samples = changes(stored, [task], [split]), getattr(task, split)
        count = sum(of_prompt(prompt) in seen for prompt, _ in samples)
        trained = f"{count} of {len(samples)} {split} prompts of task {task.name!r} were trained on"
        if count and (changed or task.name not in stored["tasks"]):
            raise ValueError(f"{'; '.join([*changed, trained])}, so their answers may be remembered; {anyway}")
        for line in [*changed, *([f"{trained}, as prompts of another task"] if count else [])]:
            print(line)
