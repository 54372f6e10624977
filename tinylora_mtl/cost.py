"""What a training step costs, measured fairly: two methods side by side, and memory in processes of their own."""

import multiprocessing
import re
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from .adapters import adapter_parameters, add_adapters
from .batching import BalancedBatches
from .models import load_model, pick_length
from .settings import adapter_config, fill_in
from .tasks import load_tasks
from .train import multitask_step

WARM_UP, STEPS = 3, 12  # steps that are not counted, and those that are


def compare_costs(configs, swapped):
    """How much less (below 0) or more a step of the second of two TrainConfigs costs, and the numbers themselves.

    time: the medians over STEPS steps in one process, in which the two take turns step by step on the same batches, so
    that whatever else the machine does meets both. memory: what training adds at its peak to the process with the
    loaded model, each in a fresh process. swapped: which of the two goes first. -> {"time" and "memory" in percent,
    "step_seconds", "peak_bytes"}.
    """
    order = configs[::-1] if swapped else configs
    seconds, _ = in_a_process(list(order))
    peaks = [in_a_process([config])[1] for config in order]
    if swapped:
        seconds, peaks = seconds[::-1], peaks[::-1]
    return {"time": 100 * (seconds[1] / seconds[0] - 1), "memory": 100 * (peaks[1] / peaks[0] - 1),
            "step_seconds": seconds, "peak_bytes": peaks}


def in_a_process(configs):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(step_costs, (configs, torch.get_num_threads()))


def step_costs(configs, threads):
    """(median seconds of a step of each config, the bytes that training added at its peak), in this process."""
    torch.set_num_threads(threads)
    parts = [prepare(fill_in(config)) for config in configs]
    before = reset_peak()
    seconds = [[] for _ in configs]
    for step in range(WARM_UP + STEPS):
        for (config, model, batches, optimizer), spent in zip(parts, seconds):
            batch = batches.balanced(config.batch_size)
            began = clock()
            optimizer.zero_grad()
            multitask_step(model, batch, config)
            torch.nn.utils.clip_grad_norm_(adapter_parameters(model).values(), config.clip)
            optimizer.step()
            spent.append(clock() - began)
    return [statistics.median(spent[WARM_UP:]) for spent in seconds], peak_memory() - before


def prepare(config):
    """A model with adapters, its batches and its optimiser, as `train.main` makes them."""
    tasks = load_tasks(config.tasks, config.samples, config.seed)
    model, tokenizer, _ = load_model(config.model, config.device, config.dtype)
    config = replace(config, max_length=pick_length(model, config.max_length))
    torch.manual_seed(config.seed)
    add_adapters(model, adapter_config(config))
    batches = BalancedBatches(tasks, tokenizer, config.max_length, config.seed)
    return config, model.train(), batches, torch.optim.AdamW(adapter_parameters(model).values(), lr=config.lr)


def clock():
    """Seconds, after all that was asked of a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak():
    """Forget the peak so far; returns what is in use now, in bytes."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform.startswith("linux"):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def peak_memory():
    """The most bytes since `reset_peak`: allocated on the GPU if there is one, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform.startswith("linux"):  # not getrusage, which goes on from the peak of the process that started this
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
