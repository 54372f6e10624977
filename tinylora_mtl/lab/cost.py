"""What work costs, measured side by side: time by turns in one process, and peak memory in fresh processes.

`bench` and the third claim of `compare` measure with the same functions. What is measured is a side: a function
without arguments that does the work once.
"""

import ctypes
import itertools
import multiprocessing
import re
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from ..adapters import add_adapters
from ..batching import BalancedBatches
from ..run.models import load_model, pick_length
from ..run.settings import adapter_config, fill_in
from ..data.tasks import load_tasks
from ..run.training import multitask_step

WARM_UP, STEPS = 3, 12  # steps that are not counted, and those that are
M_MMAP_THRESHOLD = -3  # of malloc.h: blocks of that many bytes or more are asked of the system one by one


# ------------------------------------------------------------------------------------------------------- measuring
def take_turns(sides, repeats, warm_up=1):
    """The seconds that each side took, [sides][repeats].

    They take turns, and the one that began last ends next, so whatever else the machine does meets all of them.
    """
    seconds = [[] for _ in sides]
    for repeat in range(warm_up + repeats):
        turns = list(zip(sides, seconds))
        for side, spent in turns if repeat % 2 == 0 else turns[::-1]:
            began = clock()
            side()
            spent.append(clock() - began)
    return [spent[warm_up:] for spent in seconds]


def peak_of(make, *arguments, repeats=1):
    """The bytes that the side made by make(*arguments) adds at its peak; true in a fresh process (`in_a_process`)."""
    side = make(*arguments)
    torch.nn.Linear(64, 64)(torch.ones(64, 64)).sum().backward()  # loads libraries, which are no side's own
    give_back_at_once()
    before = reset_peak()
    for _ in range(repeats):
        side()
    return peak_memory() - before


def give_back_at_once():
    """Have this process give a tensor's memory (of 64 KiB or more) back when it is freed, where it runs on glibc.

    Left alone, glibc keeps it for later, and the gaps in it would be counted, more of them the longer a side works: a
    round of MeTA-LoRA with k = n = 8 seemed to take a third more than one with k = n = 1.
    """
    if sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt"):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2 ** 16)


def in_a_process(function, *arguments, **options):
    """function(*arguments, **options) in a fresh process with as many threads as this one has."""
    pool = multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (torch.get_num_threads(),))
    with pool:
        return pool.apply(function, arguments, options)


def clock():
    """Seconds, after all that was asked of a GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak():
    """Forget the peak so far; returns what is in use now, in bytes."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform.startswith("linux"):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory():
    """The most bytes since `reset_peak`: allocated on the GPU if one is used, else resident in this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if sys.platform.startswith("linux"):  # not getrusage, which goes on from the peak of the process that started this
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# -------------------------------------------------------------------------------------------------- training steps
def compare_costs(configs, swapped):
    """How much less (below 0) or more a step of the second of two TrainConfigs costs, and the numbers themselves.

    time: the medians over STEPS steps of each, by turns on the same batches. memory: what training adds at its peak
    to the process with the loaded model. swapped: which of the two goes first. -> {"time" and "memory" in percent,
    "step_seconds", "peak_bytes"}.
    """
    order = configs[::-1] if swapped else configs
    seconds = in_a_process(step_seconds, list(order))
    peaks = [in_a_process(peak_of, training_step, config, repeats=WARM_UP + STEPS) for config in order]
    if swapped:
        seconds, peaks = seconds[::-1], peaks[::-1]
    return {"time": 100 * (seconds[1] / seconds[0] - 1), "memory": 100 * (peaks[1] / peaks[0] - 1),
            "step_seconds": seconds, "peak_bytes": peaks}


def step_seconds(configs):
    """The median seconds of a step of each config."""
    return [statistics.median(spent) for spent in take_turns([training_step(c) for c in configs], STEPS, WARM_UP)]


def training_step(config):
    """A side: a training step of a config, on the next of its batches."""
    config, model, batches = prepare(config)
    return step_through(model, draw(batches, config), config)


def prepare(config):
    """(config, model with adapters, its batches), as `train.main` makes them."""
    config = fill_in(config)
    tasks = load_tasks(config.tasks, config.samples, config.seed)
    model, tokenizer, _ = load_model(config.model, config.device, config.dtype)
    config = replace(config, max_length=pick_length(model, config.max_length))
    torch.manual_seed(config.seed)
    add_adapters(model, adapter_config(config))
    return config, model.train(), BalancedBatches(tasks, tokenizer, config.max_length, config.seed)


def draw(batches, config):
    """A few batches; drawn beforehand, for making them is no part of a step."""
    return [batches.balanced(config.batch_size) for _ in range(WARM_UP + STEPS)]


def step_through(model, drawn, config):
    """A side: a training step on the next of the batches, again from the first after the last."""
    turn = itertools.cycle(drawn)
    return stepper(model, lambda: multitask_step(model, next(turn), config), config)


def stepper(model, gradients, config):
    """A side: a step as in `train.train`, in which `gradients()` leaves the gradients in `.grad`."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.0)

    def step():
        optimizer.zero_grad()
        gradients()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        optimizer.step()
    return step
