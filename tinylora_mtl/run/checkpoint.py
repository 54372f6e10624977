"""Checkpoints: all that a run needs to go on as if it had never been stopped, bit for bit on one CPU.

A checkpoint is one file, checkpoints/step-000150.pt in the run folder: 64 characters of SHA-256, then what torch.save
made of a dict. It is written aside and renamed, and the one before is kept, so that a kill at any moment leaves one
that is whole; a checksum tells that a file is whole, not who wrote it. Reading one runs no code (weights_only=True).
"""

import copy
import hashlib
import io
import os
import pickle
from dataclasses import asdict, dataclass

import torch

from ..adapters import adapter_parameters
from .adapter_files import adapter_tensors
from .distributed import gather, process_rank
from .files import write_file

# Of config.json and of checkpoints. Runs of version 0.1 have none: their first step had a learning rate of 0.
FORMAT = 2


@dataclass
class Progress:
    """What a run remembers beside its TrainState."""

    before: dict  # the base model's accuracies
    skipped_steps: int = 0  # that were passed over, over all lives of the run
    metrics_bytes: int = 0  # of metrics.jsonl, when the last checkpoint was made
    seconds: float = 0.0  # that the run had taken by then


def check_format(content, what):
    """ValueError if what a config.json or a checkpoint holds is not of this version's format."""
    if content.get("format") != FORMAT:
        raise ValueError(f"{what} is of another version of this package (format {content.get('format', 1)}, here it is "
                         f"{FORMAT}), whose learning rates were others: finish the run with that one, or start it anew")


def list_checkpoints(folder):
    """The checkpoint files of a run folder, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*.pt"), key=lambda path: (len(path.name), path.name))


def save_checkpoint(folder, content):
    """Write a checkpoint of `content["step"]`; keep the one before, and no other. The first process does."""
    if process_rank() > 0:
        return
    file = io.BytesIO()
    torch.save(content, file)
    digest = hashlib.sha256(file.getbuffer()).hexdigest().encode()
    path = folder / "checkpoints" / f"step-{content['step']:06d}.pt"
    path.parent.mkdir(exist_ok=True)
    write_file(path, digest + file.getbuffer())
    files = list_checkpoints(folder)
    at = files.index(path)
    stale = files[:max(at - 1, 0)] + files[at + 1:]  # later ones are there only if they could not be read
    for old in [*stale, *path.parent.glob("*.tmp")]:
        old.unlink()


def load_checkpoint(folder):
    """What is in the newest checkpoint of a run folder that is whole, or None; says of any other that it is not."""
    for path in reversed(list_checkpoints(folder)):
        content = path.read_bytes()
        if hashlib.sha256(content[64:]).hexdigest().encode() != content[:64]:
            print(f"{path} is not whole (its checksum is wrong), so it is passed over")
            continue
        try:
            return torch.load(io.BytesIO(content[64:]), map_location="cpu", weights_only=True)
        except (ValueError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} is no checkpoint of a run: {str(error):.200}; take it away to do without") \
                from error
    return None


def capture(state, progress, model):
    """What a checkpoint of a TrainState, its Progress and the adapters' buffers in a model holds, for `restore`.

    All but the random states is the same in every process; of those the checkpoint has each one's.
    """
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state_all()
    random, *others = gather(random)
    return {"format": FORMAT, "step": state.step,
            "adapter": {name: parameter.detach() for name, parameter in state.parameters.items()},
            "buffers": adapter_buffers(model),
            "optimizer": state.optimizer.state_dict(), "schedule": state.schedule.state_dict(),
            "batches": place_of(state.batches), "random": random, "random_of_others": others} | asdict(progress)


@torch.no_grad()
def restore(content, state, model):
    """Put everything back where `capture` found it, in place; returns the Progress.

    ValueError, before anything is changed, if the checkpoint is not of these parameters.
    """
    try:
        progress = Progress(**{name: content[name] for name in Progress.__dataclass_fields__})
        shapes = {name: tensor.shape for name, tensor in content["adapter"].items()}
        buffers = {name: tensor.shape for name, tensor in content.get("buffers", {}).items()}
        random = [content["random"], *content["random_of_others"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"the newest checkpoint is no checkpoint of a run: {error} is missing") from error
    check_format(content, "the newest checkpoint")
    own_buffers = adapter_buffers(model)
    if shapes != {name: parameter.shape for name, parameter in state.parameters.items()} or buffers != {
            name: buffer.shape for name, buffer in own_buffers.items()}:
        raise ValueError("the checkpoint is of another run: its adapter has other layers or shapes")
    for name, parameter in state.parameters.items():
        parameter.copy_(content["adapter"][name])
    for name, buffer in own_buffers.items():
        buffer.copy_(content["buffers"][name])
    state.step = content["step"]
    state.optimizer.load_state_dict(content["optimizer"])
    state.schedule.load_state_dict(content["schedule"])
    put_back(state.batches, content["batches"])
    if process_rank() < len(random):  # else there are more processes now
        torch.set_rng_state(random[process_rank()]["cpu"])
        if len(random[process_rank()].get("cuda", ())) == torch.cuda.device_count() > 0:  # else on other hardware
            torch.cuda.set_rng_state_all(random[process_rank()]["cuda"])
    return progress


def place_of(batches):
    """Where the draw of BalancedBatches or Episodes stands, for `put_back`."""
    return {"rng": batches.rng.getstate(), "waiting": copy.deepcopy(batches.waiting)}


def put_back(batches, place):
    """Have batches of the same tasks go on from where `place_of` was taken."""
    batches.rng.setstate(place["rng"])
    batches.waiting = copy.deepcopy(place["waiting"])


def adapter_buffers(model):
    """{name: tensor} of what the adapters in a model keep beside their parameters; layers of the gallery do."""
    parameters = adapter_parameters(model)
    return {name: tensor for name, tensor in adapter_tensors(model).items() if name not in parameters}


def open_metrics(folder, length):
    """metrics.jsonl, opened to add lines, cut to its first `length` bytes: each step comes once, however it stopped.

    The first process's; what another one writes goes nowhere. ValueError if it is shorter.
    """
    if process_rank() > 0:
        return open(os.devnull, "w")
    metrics = open(folder / "metrics.jsonl", "a", newline="\n")
    if metrics.tell() < length:
        metrics.close()
        raise ValueError(f"{metrics.name} has lost lines since the checkpoint was made; put it back, or start anew")
    metrics.truncate(length)
    return metrics


def synced_length(metrics):
    """The bytes in an open file so far (flushed after every line), all of them on the disk from now on."""
    if process_rank() > 0:
        return 0
    os.fsync(metrics.fileno())
    return os.fstat(metrics.fileno()).st_size
