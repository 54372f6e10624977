"""Checkpoints: all that a run needs to go on as if it had never been stopped, bit for bit on one CPU.

A checkpoint is one file, checkpoints/step-000150.pt in the run folder: 64 characters of SHA-256, then what torch.save
made of a dict. It is written aside and renamed, and the one before is kept, so that a kill at any moment leaves one
that is whole. Reading one runs no code: it is loaded with weights_only=True.
"""

import hashlib
import io
import os
import pickle

import torch

from .distributed import gather, rank
from .files import write_file

KEYS = ("step", "skipped_steps", "before", "seconds", "metrics_bytes",  # what train.py puts in, and `capture`:
        "adapter", "optimizer", "schedule", "batches", "random")


def list_checkpoints(folder):
    """The checkpoint files of a run folder, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*.pt"), key=lambda path: (len(path.name), path.name))


def save_checkpoint(folder, state):
    """Write a checkpoint of `state["step"]`; keep the one before, and no other. The first process does."""
    if rank() > 0:
        return
    content = io.BytesIO()
    torch.save(state, content)
    digest = hashlib.sha256(content.getbuffer()).hexdigest().encode()
    path = folder / "checkpoints" / f"step-{state['step']:06d}.pt"
    path.parent.mkdir(exist_ok=True)
    write_file(path, digest + content.getbuffer())
    files = list_checkpoints(folder)
    at = files.index(path)
    stale = files[:max(at - 1, 0)] + files[at + 1:]  # later ones are there only if they could not be read
    for old in [*stale, *path.parent.glob("*.tmp")]:
        old.unlink()


def load_checkpoint(folder):
    """The state in the newest checkpoint of a run folder that is whole, or None; says of any other that it is not."""
    for path in reversed(list_checkpoints(folder)):
        content = path.read_bytes()
        if hashlib.sha256(content[64:]).hexdigest().encode() != content[:64]:
            print(f"{path} is not whole (its checksum is wrong), so it is passed over")
            continue
        try:
            state = torch.load(io.BytesIO(content[64:]), map_location="cpu", weights_only=True)
            if not set(KEYS) <= set(state):
                raise ValueError(f"it lacks one of {', '.join(KEYS)}")
            return state
        except (ValueError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(f"{path} is no checkpoint of a run: {str(error):.200}; take it away to do without") \
                from error
    return None


def capture(parameters, optimizer, schedule, batches):
    """What `restore` needs: the tensors that train, the optimiser, the schedule, the data position, random states.

    All but the random states is the same in every process; of those the checkpoint has each one's.
    """
    random = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state_all()
    random, *others = gather(random)
    return {"adapter": {name: parameter.detach() for name, parameter in parameters.items()},
            "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "batches": batches.state(),
            "random": random, "random_of_others": others}


@torch.no_grad()
def restore(state, parameters, optimizer, schedule, batches):
    """Put everything back where `capture` found it, in place.

    ValueError, before anything is changed, if the state is not of these parameters.
    """
    shapes = {name: tensor.shape for name, tensor in state["adapter"].items()}
    if shapes != {name: parameter.shape for name, parameter in parameters.items()}:
        raise ValueError("the checkpoint is of another run: its adapter has other layers or shapes")
    for name, parameter in parameters.items():
        parameter.copy_(state["adapter"][name])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    batches.set_state(state["batches"])
    random = [state["random"], *state.get("random_of_others", ())]
    if rank() < len(random):  # else there are more processes now
        torch.set_rng_state(random[rank()]["cpu"])
        if len(random[rank()].get("cuda", ())) == torch.cuda.device_count() > 0:  # else it goes on on other hardware
            torch.cuda.set_rng_state_all(random[rank()]["cuda"])


def open_metrics(folder, length):
    """metrics.jsonl, opened to add lines, cut to its first `length` bytes: each step comes once, however it stopped.

    The first process's; what another one writes goes nowhere. ValueError if it is shorter.
    """
    if rank() > 0:
        return open(os.devnull, "w")
    metrics = open(folder / "metrics.jsonl", "a", newline="\n")
    if metrics.tell() < length:
        metrics.close()
        raise ValueError(f"{metrics.name} has lost lines since the checkpoint was made; put it back, or start anew")
    metrics.truncate(length)
    return metrics


def synced_length(metrics):
    """The bytes in an open file so far (flushed after every line), all of them on the disk from now on."""
    if rank() > 0:
        return 0
    os.fsync(metrics.fileno())
    return os.fstat(metrics.fileno()).st_size
