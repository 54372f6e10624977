"""The settings of a training run: TrainConfig, the command line that fills it in, and what cannot work.

A run folder keeps its settings in config.json. `resume_config` reads them back and refuses to change what would make
it another run.
"""

import shlex
from argparse import SUPPRESS
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from ..adapters import METHODS as LAYER_METHODS
from ..adapters import AdapterConfig
from ..align import ALIGNMENTS
from .distributed import world
from .files import MOST_HEADS, MOST_RANK, read_json
from .models import DTYPES
from ..data.tasks import SCORES, check_labels, is_path, require_samples

METHODS = [*LAYER_METHODS, "align", "meta"]  # the last two train plain LoRA layers, each in its own way
MINI_LR = {"lora": 5e-3, "hydralora": 5e-3, "rlora": 5e-3, "mlora": 2e-3, "align": 5e-3, "meta": 5e-3}
ALIGN_WEIGHT = {"kl": 0.2, "mmd": 0.01}  # λ as in the authors' script (KL) and as reported for the paper (MMD)
KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", tuple: "a list of names"}
LIMITS = {  # smallest and largest; beyond the largest a slip of the finger would fill the memory, and teach nothing
    "rank": (1, MOST_RANK), "heads": (1, MOST_HEADS), "batch_size": (1, 2 ** 20), "inner_steps": (0, 10 ** 9),
    "skip_bad_steps": (0, 10 ** 9), "seed": (-2 ** 63, 2 ** 63 - 1)}
OTHERWISE = (1, 10 ** 9)  # for the other whole numbers
# In a resumed run: where, how fast and how safely it goes on.
MAY_DIFFER = ("device", "gradient_checkpointing", "compile", "checkpoint_every", "skip_bad_steps")


def option(default, text, **extra):
    """A field of TrainConfig that is a command-line flag too, with its help text."""
    return field(default=default, metadata={"help": text, **extra})


@dataclass
class TrainConfig:
    """Everything that decides a run. Each field is a flag of the same name: --batch-size is `batch_size`."""

    model: str = option("mini", "mini, a local folder in Hugging Face format, or a name on the Hugging Face Hub")
    tasks: tuple = option(("mini",), "tasks: mini, mini-multilingual or any of their tasks, tasks from the Hub (sst2, "
                                     "boolq, ...), JSON Lines files, folders with train.jsonl and test.jsonl")
    method: str = option("align", "how to train", choices=METHODS)
    rank: int = option(8, "r, the width of the adapters")
    alpha: float = option(16.0, "the adapters' scaling is alpha / rank, for rlora and mlora alpha / sqrt(rank)")
    dropout: float = option(None, "dropout of the adapters (default: 0; rlora and mlora 0.1)", type=float)
    heads: int = option(5, "number of heads of hydralora, rlora and mlora")
    zero_start: bool = option(False, "rlora, mlora: start the heads from zero, to see what their random start does")
    targets: tuple = option(None, "layers to adapt, by the last part of their name, or all-linear (default: all-linear "
                                  "on mini; else gate, up and down projections if there are any, as in the papers)")
    steps: int = option(300, "optimiser steps (rounds, for meta)")
    batch_size: int = option(64, "samples in a step, the same number of each task (for meta, --tasks-per-round, "
                                 "--support and --query say it)")
    accumulation: int = option(1, "compute a step in this many pieces, one after another, to save memory (not for "
                                 "meta); but for dropout and mmd's random tokens the result is the same")
    lr: float = option(None, "peak learning rate (default: chosen for each method on mini, 5e-4 on other models)",
                       type=float)
    warmup: float = option(0.03, "share of the steps in which the learning rate rises; then it falls as a cosine")
    clip: float = option(1.0, "largest norm of a step's gradient")
    max_length: int = option(None, "prompts are cut from the left to this many tokens, answer included (default: 512, "
                                   "or what the model has positions for)", type=int)
    samples: int = option(None, "training samples per task (default: all; meta 50)", type=int)
    align: str = option("kl", "the alignment loss, for --method align", choices=list(ALIGNMENTS))
    align_weight: float = option(None, "its weight, lambda (default: kl 0.2, mmd 0.01)", type=float)
    shuffle_groups: bool = option(False, "align: draw together random groups of a batch's samples instead of its "
                                         "tasks, to see whether it matters that they are tasks")
    tasks_per_round: int = option(4, "meta: tasks sampled for a round")
    support: int = option(16, "meta: samples of a task that the inner steps see")
    query: int = option(16, "meta: samples of a task that the outer gradient is taken on")
    inner_steps: int = option(3, "meta: steps of plain gradient descent on the support set")
    inner_lr: float = option(0.005, "meta: their learning rate")
    seed: int = option(0, "seeds the adapters' start, the batches, the dropout and which samples are kept")
    device: str = option("auto", "auto, cpu, cuda or mps")
    dtype: str = option("auto", "of the frozen weights; adapters are float32. auto: bfloat16 for a model saved in half "
                                "precision on a GPU that has it, else float32", choices=["auto", *DTYPES])
    gradient_checkpointing: bool = option(False, "compute each layer anew in the backward pass instead of keeping what "
                                                 "it computed: less memory, about half as much time again, the "
                                                 "same result")
    compile: bool = option(False, "have torch compile the model for training (not for align); worth it for long runs")
    split: str = option("test", "the samples that accuracy is measured on; choose settings on validation",
                        choices=["test", "validation"])
    score: str = option("generate", "write the answer, or choose the likeliest of a task's labels", choices=SCORES)
    log_every: int = option(10, "steps between two lines of metrics.jsonl")
    checkpoint_every: int = option(50, "steps between two checkpoints, from which --resume goes on")
    skip_bad_steps: int = option(0, "pass over up to this many steps whose loss or gradient is not finite")
    out: str = option(None, "the run folder (default: the first free of runs/METHOD-TASKS-seedN)", type=str)
    overwrite: bool = option(False, "replace a run that is already in --out")


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


def adapter_config(config):
    """The adapters of a run: Align-LoRA and MeTA-LoRA have plain LoRA layers."""
    method = config.method if config.method in LAYER_METHODS else "lora"
    return AdapterConfig(method, config.rank, config.alpha, config.dropout, config.heads, config.targets,
                         random_init=False if config.zero_start else None)


def fill_in(config):
    """The config with every default that depends on the method or the model in its place, and paths made absolute."""
    mini = config.model == "mini"
    model = config.model if mini or not Path(config.model).is_dir() else str(Path(config.model).absolute())
    tasks = [str(Path(name).absolute()) if is_path(name) else name for name in config.tasks]
    defaults = {"lr": MINI_LR[config.method] if mini else 5e-4, "align_weight": ALIGN_WEIGHT[config.align],
                "samples": 50 if config.method == "meta" else None, "targets": ("all-linear",) if mini else None}
    return replace(config, model=model, tasks=tasks,
                   **{name: value for name, value in defaults.items() if getattr(config, name) is None})


def check(config):
    """ValueError, naming the flag, for a value that cannot work."""
    for item in fields(config):
        value, flag, choices = getattr(config, item.name), flag_of(item.name), item.metadata.get("choices")
        if value is None and item.default is None:
            continue
        if not is_a(value, item.type):
            raise ValueError(f"{flag} must be {KINDS[item.type]}, got {value!r:.60}")
        if choices and value not in choices:
            raise ValueError(f"unknown {item.name} {value!r}; there are: {', '.join(choices)}")
        if item.type is int:
            low, high = LIMITS.get(item.name, OTHERWISE)
            if not low <= value <= high:
                bound = f"at least {low}" if value < low else f"at most {high}"
                raise ValueError(f"{flag} must be {bound}, got {str(value):.20}")
        if item.name in ("lr", "inner_lr", "clip", "alpha") and not 0 < value < float("inf"):
            raise ValueError(f"{flag} must be above 0, got {value}")
        if item.name == "align_weight" and not 0 <= value < float("inf"):
            raise ValueError(f"{flag} must be at least 0, got {value}")
    if not 0 <= config.warmup <= 1:
        raise ValueError(f"--warmup must be from 0 to 1, got {config.warmup}")
    if config.compile and config.method == "align":
        raise ValueError("--compile does not go with --method align: compiled code may pass over the hooks that "
                         "collect the features")
    if config.out == "":
        raise ValueError("--out is empty; leave it out, or name a folder")


def is_a(value, kind):
    """Whether a value, which may come from a file, is of a field's type: an int will do for a float, a bool never."""
    if kind is tuple:
        return isinstance(value, (tuple, list)) and len(value) > 0 and all(isinstance(part, str) for part in value)
    if kind is float:
        return isinstance(value, float) or (type(value) is int and abs(value) < 2 ** 63)
    return type(value) is kind


def flag_of(name):
    """The flag of a field: batch_size is --batch-size."""
    return f"--{name.replace('_', '-')}"


def check_sizes(config, tasks):
    """ValueError if a batch cannot hold every task, or a task has too few samples, or no labels to choose from, or if
    several processes cannot share the work equally."""
    require_samples(tasks, "train", config.split)
    check_labels(tasks, config.score)
    if config.method == "meta":
        for task in tasks:
            if len(task.train) < config.support + config.query:
                raise ValueError(f"task {task.name!r} has {len(task.train)} training samples, fewer than --support "
                                 f"{config.support} plus --query {config.query}")
        tasks_per_round = min(config.tasks_per_round, len(tasks))
        if tasks_per_round % world():
            raise ValueError(f"{world()} processes cannot share the {tasks_per_round} tasks of a round equally; "
                             "--tasks-per-round says how many there are")
        return
    each = config.batch_size // len(tasks)
    if each % world():
        raise ValueError(f"--batch-size {config.batch_size} has {each} samples of each of {len(tasks)} tasks, which "
                         f"{world()} processes cannot share equally")
    if each * len(tasks) // world() < config.accumulation:
        raise ValueError(f"--batch-size {config.batch_size} cannot hold {len(tasks)} tasks in {config.accumulation} "
                         "piece(s); each task needs the same number of places, and each piece a sample")
    if config.method == "align" and len(tasks) < 2:
        raise ValueError("align needs at least two tasks: with one there is nothing to align")


def read_config(folder, finished=False):
    """The TrainConfig of a run folder. ValueError, naming the file, if there is none or it cannot be one's.

    finished: also if the run has not come to its end, and so has no adapter."""
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not a run folder: it has no config.json")
    content = read_json(file)
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
    for name, value in changes.items():
        had = getattr(config, name)
        value, had = [list(v) if isinstance(v, (list, tuple)) else v for v in (value, had)]
        if value != had and name not in MAY_DIFFER:
            raise ValueError(f"{flag_of(name)} would make it another run: {folder} has {had}, not {value}; "
                             "leave the flag out, or start a run without --resume")
    return replace(config, **{name: value for name, value in changes.items() if name in MAY_DIFFER})
