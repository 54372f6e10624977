"""Data-parallel training on torch.distributed: several processes, one for each GPU, by torchrun (see README.md).

Every process has the whole model and draws the same global batches. It computes its own share of the samples of every
task (or, for `meta`, of the tasks of a round), and what must be of the whole batch is exchanged: gradients, the
features that are aligned, the metrics. A process without torchrun goes through the same code, and nothing here does
anything.
"""

import os
import sys
import time
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters


@contextmanager
def process_group():
    """Within the block the processes that torchrun started are a group, of which only the first prints.

    torchrun ends all processes when one has failed. So that an error is told once, the others wait before they tell an
    error that the first may tell too, and the first waits before it tells that another one is gone.
    """
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        yield
        return
    # gloo for tensors on the CPU, NCCL for those on GPUs. A day: one process may have far more to score than another.
    dist.init_process_group(timeout=timedelta(days=1))
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if process_rank() > 0 else nullcontext():
            yield
    except Exception as error:
        if process_rank() > 0:
            time.sleep(5)
            print(file=sys.stderr)  # the first process's bar is on this line
        elif isinstance(error, RuntimeError):
            time.sleep(2)
        raise
    # No process is to end right after an exchange: one whose gloo threads still hold its tensors may abort (PyTorch's
    # issue 190489). So all wait for the first, which writes. Not so after an error: the others may not get there.
    dist.barrier()
    dist.destroy_process_group()


def process_rank():
    """The number of this process. The first, 0, is the one that prints and writes."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(batch):
    """This process's samples of a batch, of every task as many as any other's; or its episodes of a round."""
    mine = slice(process_rank(), None, world_size())
    if isinstance(batch, list):
        return batch[mine]
    return {key: tensor[mine] if tensor.dim() else tensor for key, tensor in batch.items()}


def sum_over_processes(tensors):
    """Each of some tensors becomes its sum over all processes, in place and in one exchange."""
    if world_size() > 1:
        vector = parameters_to_vector(tensors)
        dist.all_reduce(vector)
        vector_to_parameters(vector, tensors)


def gather(value):
    """What every process passes in, a list by rank: small things, such as scores."""
    values = [value]
    if world_size() > 1:
        values = [None] * world_size()
        dist.all_gather_object(values, value)
    return values


def merge(scores):
    """One dict of the dicts of all processes."""
    return {name: score for part in gather(scores) for name, score in part.items()}


def gather_features(z, owner):
    """z [n, layers, r] and owner [n] of this process -> those of all processes, one process after the other.

    No gradient goes from process to process: it would be the same numbers twice. The rows of this process carry theirs,
    those of the others are numbers, and the sum of all processes' gradients is the gradient of the whole.
    """
    if world_size() == 1:
        return z, owner
    owners = gather(owner)
    padded = F.pad(z.detach(), (0, 0, 0, 0, 0, max(map(len, owners)) - len(z)))  # n differs, and must not
    parts = [torch.empty_like(padded) for _ in owners]
    dist.all_gather(parts, padded)
    parts = [part[:len(theirs)] for part, theirs in zip(parts, owners)]
    parts[process_rank()] = z
    return torch.cat(parts), torch.cat(owners)


@contextmanager
def same_random_numbers(device):
    """Within the block all processes draw the same random numbers, on the CPU and on `device`."""
    if world_size() == 1:
        yield
        return
    seed = gather(int(torch.randint(2 ** 62, ())))[0]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
