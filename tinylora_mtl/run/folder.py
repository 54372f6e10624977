"""The folder of a run: made or gone on with, held by one process at a time, and named when it has to be left early."""

import errno
import shlex
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock, Timeout  # comes with torch and with huggingface_hub

from .checkpoint import FORMAT, list_checkpoints
from .cli import Stopped
from .distributed import gather, process_rank
from .files import make_folder, write_json
from .fingerprints import FILE, check_same, of_run
from .methods import typed_flag
from .settings import MAY_DIFFER, read_config

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP)  # of a network disk: better unguarded than not at all
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # full disk, quota, or a limit on the size of a file


@contextmanager
def open_run(config, resuming, model, tokenizer, tasks):
    """Within the block, the run folder (yielded) is this process's alone; a new run's has its config.json.

    It has the fingerprints of the base and the tasks too; ValueError to go on with others. Raises FileExistsError for a
    folder that already holds a run (unless --overwrite), BlockingIOError for one that another process is using, OSError
    for one that cannot be made. A full disk and a signal leave the block with a message that says how to go on. Of
    several processes the first does all that, for all.
    """
    if process_rank() > 0:
        yield gather(None)[0]
        return
    folder = Path(config.out) if config.out is not None else free_folder(config)
    if not resuming:
        if (folder / "config.json").exists() and not config.overwrite:
            raise FileExistsError(f"{folder} already holds a run; name another --out, or add --overwrite "
                                  "(or --resume, without other flags, to go on with it)")
        make_folder(folder, exist_ok=config.out is not None)
    with locked(folder):
        try:
            if not resuming:
                clear(folder)
                prints = of_run(model, tokenizer, tasks, config.method)
                write_json(folder / FILE, prints)  # before what makes the folder a run
            else:
                check_same(folder, model, tokenizer, tasks, config.method)
            may_differ = (*MAY_DIFFER, "model", "tasks")  # the last two if their files have moved
            if not resuming or any(getattr(config, name) != getattr(read_config(folder), name) for name in may_differ):
                write_json(folder / "config.json", {"format": FORMAT} | asdict(config))
            gather(folder)
            yield folder
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            again = how_to_go_on(folder, config.method)
            raise OSError(f"no space left to write in {folder}: make room, then {again}") from error
        except Stopped as stop:
            raise Stopped(stop.number, how_to_go_on(folder, config.method)) from stop


def how_to_go_on(folder, method):
    return f"to go on: python -m tinylora_mtl.train --resume {shlex.quote(str(folder))}{typed_flag(method)}"


def free_folder(config):
    """The first free of runs/METHOD-TASKS-seedN, -2, -3, …"""
    names = "-".join(Path(name).name for name in config.tasks)
    name = f"{config.method}-{names[:40]}-seed{config.seed}"
    folder, number = Path("runs") / name, 2
    while folder.exists():
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return folder


def clear(folder):
    """Take an old run out of a folder: never an old result or checkpoint beside a new config."""
    for old in ("config.json", FILE, "results.json", "metrics.jsonl", "heads.json", "heads.png", "heads.svg",
                "head_cosines.png", "head_cosines.svg", "adapter/adapter_config.json",
                "adapter/adapter_model.safetensors"):
        (folder / old).unlink(missing_ok=True)
    for old in list_checkpoints(folder):
        old.unlink()


@contextmanager
def locked(folder):
    """Within the block no other process can enter one for the same folder; however this one ends, the lock goes too.

    Raises BlockingIOError if another process is in, OSError for a folder that cannot be written to.
    """
    lock = FileLock(Path(folder) / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise BlockingIOError(f"another process is using {folder}; wait until it has ended, or stop it") from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise OSError(f"{folder} cannot be written to: {error.strerror}; it needs a disk that can") from error
    try:
        yield
    finally:
        lock.release()
