"""What work costs, measured side by side: time by turns in one process, and peak memory in fresh processes.

`bench` and the third claim of `compare` measure with the same functions. What is measured is a side: a function
without arguments that does the work once. The sides that are compared come from one function, which makes them all.
"""

import ctypes
import itertools
import multiprocessing
import re
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..config import resolve
from ..data.tasks import load_tasks
from ..run import models, training
from ..run.methods import TYPED, find_method, typed_method
from ..train import TrainState, train

WARM_UP, STEPS = 3, 12  # training steps that are not counted, and those that are
MEMORY_REPEATS = 5  # at most: each needs two processes
M_MMAP_THRESHOLD = -3  # of malloc.h: blocks of that many bytes or more are asked of the system one by one


def take_turns(make, arguments, repeats, warm_up=1):
    """The seconds that each of the sides make(*arguments) took, [sides][repeats].

    They take turns, and the one that began last ends next, so whatever else the machine does meets all of them.
    """
    sides = make(*arguments)
    seconds = [[] for _ in sides]
    for repeat in range(warm_up + repeats):
        turns = list(zip(sides, seconds))
        for side, spent in turns if repeat % 2 == 0 else turns[::-1]:
            began = clock()
            side()
            spent.append(clock() - began)
    return [spent[warm_up:] for spent in seconds]


def clock():
    """Seconds, after all that was asked of a GPU is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_a_process(function, *arguments):
    """function(*arguments) in a fresh process with as many threads as this one has, and the user's methods known."""
    known = torch.get_num_threads(), list(map(str, TYPED.values()))
    with multiprocessing.get_context("spawn").Pool(1, as_here, known) as pool:
        return pool.apply(function, arguments)


def as_here(threads, typed):
    """What a fresh process needs to know of the one that started it."""
    torch.set_num_threads(threads)
    for path in typed:
        typed_method(path)


def peaks(make, arguments, repeats, uses=2):
    """The bytes that each of two sides make(*arguments) adds at its peak, used that often, [sides][repeats]."""
    times = 1 if torch.cuda.is_initialized() else min(repeats, MEMORY_REPEATS)  # the GPU's allocator counts exactly
    return [[in_a_process(peak_of, make, arguments, which, uses) for _ in range(times)] for which in (0, 1)]


def peak_of(make, arguments, which, repeats):
    """The bytes that side `which` of make(*arguments) adds at its peak; true in a fresh process."""
    side = make(*arguments)[which]
    torch.nn.Linear(64, 64)(torch.ones(64, 64)).sum().backward()  # loads libraries, which are no side's own
    if sys.platform.startswith("linux") and hasattr(ctypes.CDLL(None), "mallopt"):
        # glibc would keep a freed tensor's memory for later, and the gaps in it would be counted, more of them the
        # longer a side works: a round of MeTA-LoRA with k = n = 8 seemed to take a third more than with k = n = 1.
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2 ** 16)
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform.startswith("linux"):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = peak_memory()
    for _ in range(repeats):
        side()
    return peak_memory() - before


def peak_memory():
    """The most bytes so far: allocated on the GPU if one is used, else resident in this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    if sys.platform.startswith("linux"):  # not getrusage, which goes on from the peak of the process that started this
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def paired_ratio(ours, theirs, quantity, target):
    """The median and the quartiles of the paired ratios, and whether the median reaches the target (at least, at most).

    ours, theirs: seconds or bytes; "speed" is work in a time, so its ratio is that of the seconds the other way round.
    """
    ratios = [b / a if quantity == "speed" else a / b for a, b in zip(ours, theirs)]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    least, most = target
    return {"ratio": ratio, "quartiles": [low, high], "ours": ours, "theirs": theirs,
            "reached": (least is None or ratio >= least) and (most is None or ratio <= most)}


def begin_run(config):
    """(config, model with adapters, its batches) at the start of a run of `train`."""
    find_method(config.method)
    config = resolve(config)
    tasks = load_tasks(config.tasks, config.samples, config.seed)
    model, tokenizer, _ = models.load_model(config.model, config.device, config.dtype)
    config = replace(config, max_length=models.pick_length(model, config.max_length))
    return config, model, training.prepare(config, model, tokenizer, tasks).batches


def some_batches(batches):
    """A list of a few batches, made before anything is measured: making them is no part of a step."""
    return list(itertools.islice(batches, WARM_UP + STEPS))


def stepper(model, config, batches):
    """A side: a step of `train` on the next of a list of batches, again from the first after the last."""
    config = replace(config, steps=10 ** 6, warmup=0.0)  # so that it never ends, and stays at its peak learning rate
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return partial(next, train(model, TrainState(model, itertools.cycle(batches), config, trainable), config))


def training_steps(*configs):
    """For each config a side: a training step."""
    return [stepper(model, config, some_batches(batches)) for config, model, batches in map(begin_run, configs)]


def compare_costs(configs, swapped):
    """How much less (below 0) or more a step of the second of two TrainConfigs costs, and the numbers themselves.

    time: the medians over STEPS steps of each, by turns on the same batches; swapped: the second goes first. memory:
    what training adds at its peak to a process with the loaded models.
    -> {"time" and "memory" in percent, "step_seconds", "peak_bytes", "seconds" of the measuring}.
    """
    began, order = time.perf_counter(), slice(None, None, -1 if swapped else 1)
    turns = in_a_process(take_turns, training_steps, configs[order], STEPS, WARM_UP)[order]
    seconds = [statistics.median(spent) for spent in turns]
    bytes_ = [peak for peak, in peaks(training_steps, configs, 1, WARM_UP + STEPS)]
    return {"time": 100 * (seconds[1] / seconds[0] - 1), "memory": 100 * (bytes_[1] / bytes_[0] - 1),
            "step_seconds": seconds, "peak_bytes": bytes_, "seconds": round(time.perf_counter() - began, 1)}
