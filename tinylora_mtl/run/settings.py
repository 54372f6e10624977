"""From the command line to a TrainConfig, what cannot work, and the settings of a run to go on with."""

import os
import shlex
from argparse import SUPPRESS
from dataclasses import fields, replace
from pathlib import Path

from ..config import TrainConfig
from ..data.tasks import check_labels, is_path, require_samples
from .checkpoint import check_format
from .distributed import world_size
from .files import read_json
from .methods import find_method, in_gallery

# In a resumed run: where, how fast and how safely it goes on.
MAY_DIFFER = ("device", "gradient_checkpointing", "compile", "checkpoint_every", "skip_bad_steps")
LEAST = {"inner_steps": 0, "skip_bad_steps": 0, "seed": -2 ** 63}  # of the other whole numbers 1
MOST = {"rank": 4096, "heads": 1024, "batch_size": 2 ** 20}  # beyond, a slip of the finger would fill the memory


def flag_of(name):
    """The flag of a field: batch_size is --batch-size."""
    return f"--{name.replace('_', '-')}"


def add_flags(parser):
    """Give an argparse parser a flag for every field of TrainConfig; what is parsed has only those that were given."""
    for item in fields(TrainConfig):
        flag, extra = flag_of(item.name), dict(item.metadata)
        if item.type is bool:
            parser.add_argument(flag, action="store_true", help=extra["help"], default=SUPPRESS)
            continue
        if item.type is tuple:
            extra |= {"nargs": "+", "type": str}
        if "choices" in extra:  # `check` tells a wrong one
            extra["help"] += f": {', '.join(extra.pop('choices'))}"
        if item.default is not None:
            extra["help"] += f" (default: {' '.join(item.default) if item.type is tuple else item.default})"
        # without a default here, what comes out of the parser is what was given, and --resume can tell
        parser.add_argument(flag, **{"type": item.type, "default": SUPPRESS, **extra})


def with_full_paths(config):
    """The config with the paths among its model and tasks made absolute, for a run to be gone on with from anywhere."""
    model = config.model
    if model != "mini" and Path(model).is_dir():
        model = os.path.abspath(model)
    tasks = [os.path.abspath(name) if is_path(name) else name for name in config.tasks]
    return replace(config, model=model, tasks=tasks)


def check(config):
    """ValueError, naming the flag, for a value that cannot work; values may come from a file, and be of any type."""
    find_method(config.method)
    for item in fields(config):
        value, flag, choices = getattr(config, item.name), flag_of(item.name), item.metadata.get("choices")
        if value is None and item.default is None:
            continue
        kinds = {tuple: (tuple, list), float: (float, int)}.get(item.type, item.type)
        listed = isinstance(value, (tuple, list))
        if not isinstance(value, kinds) or (isinstance(value, bool) and item.type is not bool) or (
                listed and not (value and all(isinstance(part, str) for part in value))):
            raise ValueError(f"{flag} must be {'a list of names' if item.type is tuple else item.type.__name__}, "
                             f"got {value!r:.60}")
        if choices and value not in choices:
            there = dict.fromkeys([*choices, *(in_gallery() if item.name == "method" else ())])
            mine = f"; a file of yours is --method path/to/{value}.py" if item.name == "method" else ""
            raise ValueError(f"unknown {item.name} {value!r}; there are: {', '.join(there)}{mine}")
        if item.type is int:
            low, high = LEAST.get(item.name, 1), MOST.get(item.name, 2 ** 63 - 1 if item.name == "seed" else 10 ** 9)
            if not low <= value <= high:
                bound = f"at least {low}" if value < low else f"at most {high}"
                raise ValueError(f"{flag} must be {bound}, got {str(value):.20}")
        if item.name in ("lr", "inner_lr", "clip", "alpha") and not 0 < value < 1e30:
            raise ValueError(f"{flag} must be above 0, got {value!s:.20}")
    if config.align_weight is not None and not 0 <= config.align_weight < 1e30:
        raise ValueError(f"--align-weight must be at least 0, got {config.align_weight!s:.20}")
    if not 0 <= config.warmup <= 1:
        raise ValueError(f"--warmup must be from 0 to 1, got {config.warmup}")
    if config.zero_start and config.method not in ("rlora", "mlora"):
        raise ValueError(f"--zero-start is for rlora and mlora, not for {config.method}")
    if config.compile and config.method == "align":
        raise ValueError("--compile does not go with --method align: compiled code may pass over the hooks that "
                         "collect the features")
    if config.out == "":
        raise ValueError("--out is empty; leave it out, or name a folder")


def check_sizes(config, tasks):
    """ValueError for tasks and batches that do not fit together, or that several processes cannot share equally."""
    require_samples(tasks, "train", config.split)
    check_labels(tasks, config.score)
    if config.method == "meta":
        for task in tasks:
            if len(task.train) < config.support + config.query:
                raise ValueError(f"task {task.name!r} has {len(task.train)} training samples, fewer than --support "
                                 f"{config.support} plus --query {config.query}")
        tasks_per_round = min(config.tasks_per_round, len(tasks))
        if tasks_per_round % world_size():
            raise ValueError(f"{world_size()} processes cannot share the {tasks_per_round} tasks of a round equally; "
                             "--tasks-per-round says how many there are")
        return
    each = config.batch_size // len(tasks)
    if each % world_size():
        raise ValueError(f"--batch-size {config.batch_size} has {each} samples of each of {len(tasks)} tasks, which "
                         f"{world_size()} processes cannot share equally")
    if each * len(tasks) // world_size() < config.accumulation:
        raise ValueError(f"--batch-size {config.batch_size} cannot hold {len(tasks)} tasks in {config.accumulation} "
                         "micro-batch(es); each task needs the same number of places, and each micro-batch a sample")
    if config.method == "align" and len(tasks) < 2:
        raise ValueError("align needs at least two tasks: with one there is nothing to align")


def read_config(folder, finished=False):
    """The TrainConfig of a run folder; ValueError if there is none, or (finished) if the run has no adapter yet."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not a run folder: it has no config.json")
    content = read_json(file)
    content.pop("format", None)  # an older run can be evaluated, but not gone on with
    unknown = [name for name in content if name not in TrainConfig.__dataclass_fields__]
    if unknown:
        raise ValueError(f"{file} has a setting that this version does not know: {unknown[0]!r:.60}")
    config = TrainConfig(**content)
    try:
        check(config)
    except ValueError as error:
        raise ValueError(f"{file} holds no run that could be: {error}") from error
    if finished and not (Path(folder) / "adapter").is_dir():
        raise ValueError(f"the run in {folder} is not finished, so it has no adapter; python -m tinylora_mtl.train "
                         f"--resume {shlex.quote(str(folder))} goes on with it")
    return config


def resume_config(folder, **changes):
    """The settings to go on with in a run folder: its own, and those of MAY_DIFFER that are to be others now.

    Raises ValueError, naming the flag, for a change that would make it another run.
    """
    config = replace(read_config(folder), out=str(folder), overwrite=False)
    if not (Path(folder) / "results.json").is_file():  # else nothing is left to do
        check_format(read_json(Path(folder) / "config.json"), f"the run in {folder}")
    now = with_full_paths(replace(config, **changes))
    for name in changes:
        had, value = getattr(config, name), getattr(now, name)
        value, had = [list(v) if isinstance(v, (list, tuple)) else v for v in (value, had)]
        if value != had and name not in MAY_DIFFER and not (name in ("model", "tasks") and has_moved(had)):
            raise ValueError(f"{flag_of(name)} would make it another run: {folder} has {had}, not {value}; "
                             "leave the flag out, or start a run without --resume")
    return replace(now, out=str(folder), overwrite=False)


def has_moved(paths):
    """Whether a path of a run is no longer there: it may be given anew, and the fingerprints tell if it is the same."""
    paths = [paths] if isinstance(paths, str) else paths
    return any(os.path.isabs(path) and not os.path.exists(path) for path in paths)
