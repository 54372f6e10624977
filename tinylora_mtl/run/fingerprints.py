"""What a run was trained on, in fingerprints.json: hashes by which a change of the data or of the base is noticed."""

import hashlib
import json
from pathlib import Path

import torch

from ..adapters import adapter_parameters
from ..data.tasks import SPLIT_SIZES, prompt_key
from ..targets import unwrap
from .files import read_json
from .methods import hash_of_method

FILE = "fingerprints.json"
# Of a model's configuration: where it is from, and what only its loading or its generation settings are about.
NO_MATTER = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache",
             "architectures", "bos_token_id", "eos_token_id", "pad_token_id")


def of_base(model):
    """A hash of all frozen weights, rounded to bfloat16: the same on every device, in float32 and in bfloat16."""
    digest, adapter = hashlib.sha256(), {id(parameter) for parameter in adapter_parameters(model).values()}
    for name, parameter in unwrap(model).named_parameters():
        if id(parameter) not in adapter:
            name = plain_name(name).replace(".base.", ".")  # as without the adapters
            digest.update(f"{name} {list(parameter.shape)}".encode())
            digest.update(parameter.detach().to("cpu", torch.bfloat16).flatten().view(torch.int16).numpy().data)
    return digest.hexdigest()


def plain_name(name):
    """The name of a layer or parameter, also if a part of the model is compiled."""
    return name.replace("_orig_mod.", "").removesuffix("._orig_mod")


def of_prompt(prompt):
    return hashlib.sha256(prompt_key(prompt).encode()).hexdigest()[:12]


def of_split(task, split):
    """How many samples it has, and a hash of them: of training samples in their order, which decides the batches."""
    samples = getattr(task, split)
    listed = repr(samples if split == "train" else sorted(samples))
    return {"samples": len(samples), "sha256": hashlib.sha256(listed.encode()).hexdigest()}


def of_setting(model, tokenizer):
    """A hash of the model's configuration where it differs from its kind's defaults, and of the tokenizer."""
    def that_matters(value):  # also in a configuration within the configuration
        return {name: that_matters(inner) for name, inner in value.items() if name not in NO_MATTER} if isinstance(
            value, dict) else value

    config, tokens = unwrap(model).config.to_diff_dict(), sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps([that_matters(config), tokens], sort_keys=True, default=str).encode()).hexdigest()


def of_run(model, tokenizer, tasks, method):
    """What fingerprints.json holds."""
    return {"base": of_base(model), "configuration_and_tokenizer": of_setting(model, tokenizer),
            "method": hash_of_method(method),
            "tasks": {task.name: {split: of_split(task, split) for split in SPLIT_SIZES} | {"labels": list(task.labels)}
                      for task in tasks},
            "training_prompts": " ".join(sorted({of_prompt(prompt) for task in tasks for prompt, _ in task.train}))}


def read_fingerprints(folder):
    """What a run's fingerprints.json holds; None for a run of an older version, which has none."""
    file = Path(folder) / FILE
    if not file.is_file():
        return None
    content = read_json(file)
    kinds = {"base": str, "configuration_and_tokenizer": str, "tasks": dict, "training_prompts": str}
    if any(not isinstance(content.get(name), kind) for name, kind in kinds.items()) or any(
            not isinstance(splits, dict) or any(not isinstance(splits.get(split, {}), dict) for split in SPLIT_SIZES)
            for splits in content["tasks"].values()):
        raise ValueError(f"{file} is no file that can be read: it does not hold the fingerprints of a run")
    return content


def changes(stored, tasks, splits):
    """A line for each split of a run's tasks that holds other samples than it did."""
    lines = []
    for task in tasks:
        for split in splits if task.name in stored["tasks"] else ():
            was, now = stored["tasks"][task.name].get(split, {}), of_split(task, split)
            if was != now:
                kind = "training" if split == "train" else split
                count = f"{was.get('samples')} then, {now['samples']} now"
                if was.get("samples") == now["samples"]:
                    count = f"{now['samples']} as before, but others"
                lines.append(f"the {kind} samples of task {task.name!r} have changed since the run began ({count})")
    return lines


def base_changes(stored, model, tokenizer, method, weights=True):
    """A line for what has changed of the base model and the method's file; weights: whether they are looked at too."""
    lines = []
    if weights and stored["base"] != of_base(model):
        lines.append("the weights of the base model have changed since the run began")
    if stored["configuration_and_tokenizer"] != of_setting(model, tokenizer):
        lines.append("the configuration or the tokenizer of the base model has changed since the run began")
    if stored.get("method", hash_of_method(method)) != hash_of_method(method):
        lines.append("the file of the method has changed since the run began")
    return lines


def check_same(folder, model, tokenizer, tasks, method):
    """ValueError, saying what, if the data or the base are not those that the run in a folder began with."""
    stored = read_fingerprints(folder)
    if stored is None:
        raise ValueError(f"the run in {folder} is of an older version of this package and has no {FILE}, so nothing "
                         "tells whether its data are the same; start it anew")
    found = [f"task {task.name!r} is not in {FILE}" for task in tasks if task.name not in stored["tasks"]]
    found += changes(stored, tasks, SPLIT_SIZES) + base_changes(stored, model, tokenizer, method)
    if found:
        raise ValueError(f"{'; '.join(found)}: the run in {folder} cannot go on as the same run")


def check_not_trained_on(folder, own_names, tasks, split):
    """ValueError for prompts of a split that the run in a folder was trained on, unless they were in this split then.

    Prints which splits have changed, and how many prompts another task trained on. own_names: the run's own tasks.
    """
    stored = read_fingerprints(folder)
    anyway = f"--adapter {folder}/adapter instead of --run scores them all the same"
    if stored is None:
        old = f"the run in {folder} is of an older version of this package and has no {FILE}, so {split} prompts"
        for task in tasks:
            if task.name in own_names:
                raise ValueError(f"{old} of task {task.name!r} may have been trained on; {anyway}")
        print(f"{old} may have been trained on as another task's")
        return
    seen = set(stored["training_prompts"].split())
    for task in tasks:
        changed, samples = changes(stored, [task], [split]), getattr(task, split)
        if task.name in own_names and task.name not in stored["tasks"]:
            raise ValueError(f"task {task.name!r} of the run in {folder} is not in its {FILE}, so its {split} prompts "
                             f"may have been trained on; {anyway}")
        if stored["tasks"].get(task.name, {}).get("labels", list(task.labels)) != list(task.labels):
            changed.append(f"the labels of task {task.name!r} have changed since the run began")
        count = sum(of_prompt(prompt) in seen for prompt, _ in samples)
        trained = f"{count} of {len(samples)} {split} prompts of task {task.name!r} were trained on"
        if count and (changed or task.name not in stored["tasks"]):
            raise ValueError(f"{'; '.join([*changed, trained])}, so their answers may be remembered; {anyway}")
        for line in [*changed, *([f"{trained}, as prompts of another task"] if count else [])]:
            print(line)
