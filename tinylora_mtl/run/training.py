"""A run from its settings to its results: the command behind python -m tinylora_mtl.train

    from tinylora_mtl.run.training import run
    results = run(TrainConfig(method="rlora", steps=100, out="runs/mine"))
"""

import json
import re
import sys
import textwrap
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import torch

from ..adapters import adapter_parameters, add_adapters, find_adapters
from ..batching import BalancedBatches, Episodes, collate
from ..config import META_SAMPLES, TrainConfig, adapter_config, resolve
from ..data.tasks import load_tasks, scored_samples
from ..meta import adapted_to
from ..targets import linear_layers
from ..train import TrainState
from ..train import __doc__ as description
from .adapter_files import save_adapter
from .checkpoint import Progress, load_checkpoint, restore
from .cli import Parser, StopSignals, run_command
from .distributed import gather, merge, process_group, process_rank, world_size
from .files import read_json, write_json
from .folder import open_run
from .loop import run_steps
from .methods import typed_method
from .models import load_model, pick_length
from .recipes import RECIPES, recipe
from .samples import check_samples
from .scoring import (WHAT_COMMONEST_IS, accuracies, average, average_interval, commonest, say_part, table,
                      task_accuracy)
from .settings import add_flags, check, check_sizes, resume_config, with_full_paths


def run(config, resuming=False, stop=None, before=None):
    """Train one adapter, measure before and after, write the run folder; returns what results.json holds.

    resuming: go on with the run in config.out instead of starting one (`resume` does that). stop: a StopSignals, if
    signals are to end the run between two steps. before: the base model's accuracies, if they are known. Raises
    ValueError for settings that cannot work (before anything is written), FileExistsError for a folder that already
    holds a run, FloatingPointError for numbers that are not finite.
    """
    began = time.perf_counter()
    if resuming and (Path(config.out) / "results.json").is_file():
        print(f"the run in {config.out} is finished: nothing is left to do")
        return read_json(Path(config.out) / "results.json")
    config, tasks, model, tokenizer, device = set_up(config)
    scored = scored_samples(tasks, config.split, config.score_samples)
    check_samples(model, tokenizer, scored, config.split, config.max_length, config.score, training=True)
    state = prepare(config, model, tokenizer, tasks)
    with open_run(config, resuming, model, tokenizer, tasks) as folder:
        counts = {task.name: len(getattr(task, config.split)) for task in scored}
        scoring, common = (config.split, config.max_length, config.score), commonest(scored, config.split)
        results = {"method": config.method, "seed": config.seed, "split": config.split, "score": config.score,
                   "samples": counts} | describe(config, model, tasks, device)
        content = load_checkpoint(folder) if resuming else None
        if content:
            progress = restore(content, state, model)
        else:
            progress = Progress(before or accuracies(model, tokenizer, scored, *scoring))
        if resuming:
            print(f"resumed after step {state.step}" if content else "no checkpoint yet: from the first step")
        began -= progress.seconds  # as if the run had never been stopped
        run_steps(model, state, config, tasks, folder, progress, began, stop or StopSignals())
        say_idle(state.parameters)
        columns = {"before": progress.before, "after": accuracies(model, tokenizer, scored, *scoring)}
        if config.method == "meta":  # "after" is the shared adapter as it is; this is each task's own θ_i
            columns["after_adapting"] = accuracies_after_adapting(model, tokenizer, scored, state.batches, config)
        results |= columns | {f"average_{name}": average(column) for name, column in columns.items()}
        results |= {f"average_{name}_interval": average_interval(columns[name], counts) for name in columns}
        results |= {"commonest": common, "skipped_steps": progress.skipped_steps}
        results["seconds"] = round(time.perf_counter() - began, 1)
        if process_rank() == 0:
            save_adapter(model, folder / "adapter")
            write_json(folder / "results.json", results)  # the last file: with it, the run is finished
    print(table({name.replace("_", " "): column for name, column in columns.items()}, counts, common))
    print(f"{config.split} accuracy in percent, with its 95 % interval over the n samples\n{WHAT_COMMONEST_IS}")
    say_part(tasks, scored, config.split)
    print(f"{results['seconds']:.0f} s in all; the run is in\n{folder}")
    return results


def set_up(config):
    """(config with every default filled in, tasks, model, tokenizer, device) of a run; ValueError as `run`."""
    check(config)
    config = with_full_paths(resolve(config))
    tasks = load_tasks(config.tasks, config.samples, config.seed, META_SAMPLES if config.method == "meta" else None)
    check_sizes(config, tasks)
    model, tokenizer, device = load_model(config.model, config.device, config.dtype)
    return replace(config, max_length=pick_length(model, config.max_length)), tasks, model, tokenizer, device


def resume(folder):
    """Go on with the run in a folder from its last checkpoint, with its own settings; returns as `run` does."""
    return run(resume_config(folder), resuming=True)


def prepare(config, model, tokenizer, tasks):
    """Put a run's adapters into its model; returns the TrainState at the first step."""
    torch.manual_seed(config.seed)
    add_adapters(model, replace(adapter_config(config), tasks=tuple(task.name for task in tasks)))
    if process_rank() > 0:  # from the same start, every process has dropout masks of its own
        torch.manual_seed(config.seed + process_rank())
    if config.gradient_checkpointing:
        # Not reentrant: with that kind the features would have no gradient (Align-LoRA), and `autograd.grad`
        # (MeTA-LoRA) would not work. The layers see the same dropout masks when they are computed anew.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # a newer name
        enable({"use_reentrant": False})
    if config.method == "meta":
        batches = Episodes(tasks, tokenizer, config.tasks_per_round, config.support, config.query, config.max_length,
                           config.seed)
    else:
        batches = BalancedBatches(tasks, tokenizer, config.batch_size, config.max_length, config.seed)
    return TrainState(model, batches, config)


def describe(config, model, tasks, device):
    """Print what is going to happen; returns the numbers of parameters, for the results."""
    parameters = adapter_parameters(model)
    trainable = sum(parameter.numel() for parameter in parameters.values())
    routers = sum(parameter.numel() for name, parameter in parameters.items() if name.endswith("router.weight"))
    total = sum(parameter.numel() for parameter in model.parameters())
    sizes = [len(task.train) for task in tasks]
    span = f"{min(sizes)}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
    where = device if world_size() == 1 else f"{device}, in {world_size()} processes"
    of_routers = f", {routers:,} of them in routers" if routers else ""
    print(f"{config.method} on {Path(config.model).name}: {len(tasks)} tasks of {span} training samples\n"
          f"{config.steps} steps at a learning rate of {config.lr:g}, on {where}\n"
          f"{trainable:,} of {total:,} parameters train ({100 * trainable / total:.1f} %){of_routers}")
    for line in coverage(model):
        print(textwrap.fill(line, 80))
    return {"trainable_parameters": trainable, "router_parameters": routers, "total_parameters": total}


def coverage(model):
    """Lines on which layers have adapters, what share of the body's weights they are, and what cannot have any.

    The body is all of the base but embeddings and output head.
    """
    adapters, head = find_adapters(model), model.get_output_embeddings()
    outside = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)] + [getattr(head, "base", head)]
    outside = {id(m.weight) for m in outside if m is not None}
    outside |= {id(parameter) for parameter in adapter_parameters(model).values()}
    body = {name: p for name, p in model.named_parameters() if id(p) not in outside}
    size = sum(parameter.numel() for parameter in body.values())
    under = {id(adapter.base.weight) for adapter in adapters.values()}  # a weight may be that of several layers
    covered = sum(parameter.numel() for parameter in body.values() if id(parameter) in under)
    kinds = dict.fromkeys(name.rsplit(".", 1)[-1] for name in adapters)
    yield f"adapters on {', '.join(kinds)}: {100 * covered / max(size, 1):.0f} % of the body's weights"
    reasons = {}  # why not: on what
    for name, why in linear_layers(model)[1].items():
        if not name.startswith(tuple(f"{adapter}." for adapter in adapters)):
            reasons.setdefault(why, {})[name.rsplit(".", 1)[-1]] = None
    fused = Counter()  # the weights of several experts in one parameter
    for name, parameter in body.items():
        fused[re.sub(r".*\.\d+\.", "", name)] += parameter.numel() if parameter.dim() > 2 else 0
    for name, count in fused.items():
        if count > 0.05 * size:
            reasons.setdefault("not of a linear layer", {})[f"{name}, {100 * count / size:.0f} %"] = None
    for why, names in reasons.items():
        yield f"no adapter can be on {', '.join(names)} ({why})"


def say_idle(parameters):
    """Warn of tensors of the adapter that are all zero after training, so that they do nothing."""
    zero = [name for name, parameter in parameters.items() if not parameter.any()]
    if zero and process_rank() == 0:
        print(f"warning: {len(zero)} of the adapter's tensors are still zero, so they do nothing: "
              f"{', '.join(zero[:3])}{', …' if zero[3:] else ''}", file=sys.stderr)


def accuracies_after_adapting(model, tokenizer, tasks, batches, config):
    """{task: accuracy} with stage 1 run once more for each task, on support + query of its own training samples."""
    scores = {}
    for task_id, task in enumerate(tasks):
        rows = batches.draw(task_id, config.support + config.query)
        if task_id % world_size() == process_rank():  # all draw for every task, so each gets the samples it always gets
            support = collate(rows, [task_id] * len(rows), tokenizer.pad_token_id)
            with adapted_to(model, support, config.inner_lr, config.inner_steps):
                scores[task.name] = task_accuracy(model, tokenizer, task, config.split, config.max_length, config.score)
    scores = merge(scores)
    return {task.name: scores[task.name] for task in tasks}


def parse(argv=None):
    """Command line -> (TrainConfig, whether it is a run to go on with, whether its settings are only to be printed).

    argparse itself answers unknown flags and values, with exit status 2; ValueError as in `resume_config`.
    """
    parser = Parser("train", description)
    parser.add_argument("--resume", metavar="FOLDER", help="go on with the run in this folder, which has its settings; "
                        "auto: go on with the run in --out if there is one, otherwise start it")
    parser.add_argument("--recipe", metavar="NAME", help="the settings of a paper's own script, each of which another "
                        f"flag overrides: {', '.join(RECIPES)}")
    parser.add_argument("--print-config", action="store_true", help="print all settings in force, and end")
    add_flags(parser)
    given = vars(parser.parse_args(argv))
    if "method" in given:
        given["method"] = typed_method(given["method"])
    folder, only_print, name = given.pop("resume"), given.pop("print_config"), given.pop("recipe")
    if name:
        if folder not in (None, "auto"):
            raise ValueError("--resume goes on with the settings that the run has; leave --recipe out")
        given = recipe(name) | given
    if folder == "auto":
        if not given.get("out"):
            raise ValueError("--resume auto needs --out, the folder to look in")
        begun, = gather((Path(given["out"]) / "config.json").is_file())[:1]  # the first process says it for all
        folder = given["out"] if begun else None
    config, resuming = (TrainConfig(**given), False) if folder is None else (resume_config(folder, **given), True)
    if name and not resuming and not only_print:
        print(json.dumps(asdict(resolve(config)), indent=2))
    return config, resuming, only_print


def command(argv=None):
    """The command: a signal ends it between two steps, with a checkpoint."""
    with process_group():
        config, resuming, only_print = parse(argv)
        if only_print:
            print(json.dumps(asdict(set_up(config)[0]), indent=2))
            return
        with StopSignals() as stop:
            run(config, resuming, stop)


def main():
    """python -m tinylora_mtl.train"""
    run_command(command)
