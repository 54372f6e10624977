"""Data-parallel training on torch.distributed: several processes, one for each GPU, started by torchrun.

    torchrun --nproc-per-node=8 -m tinylora_mtl.train ...

Every process has the whole model and draws the same global batches. It computes its own share of the samples of every
task, and what must be of the whole batch is exchanged: gradients, the features that are aligned, the numbers to log.
So the training is that of one process, to rounding and but for what is drawn at random in a step: dropout, the tokens
that MMD takes, shuffled groups. A process without torchrun goes through the same code, and nothing here does anything.
"""

import os
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
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
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere) if rank() > 0 else nullcontext():
            yield
    except Exception as error:
        if rank() > 0:
            time.sleep(5)
            print(file=sys.stderr)  # the first process's bar is on this line
        elif isinstance(error, RuntimeError):
            time.sleep(2)
        raise
    dist.destroy_process_group()  # not after an error: the others may not get there


def rank():
    """The number of this process. The first, 0, is the one that prints and writes."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world():
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def share(batch):
    """This process's samples of a batch; of every task, whose samples lie side by side, as many as any other's."""
    return {key: tensor[rank()::world()] for key, tensor in batch.items()}


def data_parallel(model):
    """The model, to be called in its place: after `backward` its gradients are the mean over all processes."""
    if world() == 1:
        return model
    with warnings.catch_warnings():  # the newest torch has another name for broadcast_buffers, which older ones lack
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def keep_to_itself(model):
    """Within the block (forward and backward) a `data_parallel` model adds gradients up without exchanging them."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def sum_over_processes(tensor):
    """The sum of a tensor over all processes, in its place."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def average_over_processes(tensors):
    """Each of some tensors becomes its mean over all processes, in place and in one exchange."""
    if world() > 1:
        tensors = list(tensors)
        vector_to_parameters(sum_over_processes(parameters_to_vector(tensors)) / world(), tensors)


def gather(value):
    """What every process passes in, a list by rank: small things, such as scores."""
    values = [value]
    if world() > 1:
        values = [None] * world()
        dist.all_gather_object(values, value)
    return values


def merge(scores):
    """One dict of the dicts of all processes."""
    return {name: score for part in gather(scores) for name, score in part.items()}


def gather_features(features, owner):
    """{layer: z [n, r]} and owner [n] of this process -> those of all processes, one process after the other.

    No gradient goes from process to process: it would be the same numbers twice. The rows of this process carry theirs,
    those of the others are numbers, and the sum of all processes' gradients is the gradient of the whole.
    """
    if world() == 1:
        return features, owner
    owners = gather(owner)
    own = torch.stack(list(features.values()), dim=1)  # [n, layers, r]: all layers in one exchange
    padded = F.pad(own.detach(), (0, 0, 0, 0, 0, max(map(len, owners)) - len(own)))  # n differs, and must not
    parts = [torch.empty_like(padded) for _ in owners]
    dist.all_gather(parts, padded)
    parts = [part[:len(theirs)] for part, theirs in zip(parts, owners)]
    parts[rank()] = own
    return dict(zip(features, torch.cat(parts).unbind(1))), torch.cat(owners)


@contextmanager
def same_random_numbers(device):
    """Within the block all processes draw the same random numbers, on the CPU and on `device`."""
    if world() == 1:
        yield
        return
    seed = gather(int(torch.randint(2 ** 62, ())))[0]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
