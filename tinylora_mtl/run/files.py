"""Files that are whole or not there."""

import json
import os
from pathlib import Path


def write_file(path, content):
    """Write bytes to `path` so that a power cut or a kill leaves the old file or the new one, never a part of it.

    Raises OSError (no space, say), naming the file, with the old file as it was.
    """
    path = Path(path)
    new = path.with_name(path.name + ".tmp")
    try:
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except OSError as error:
        new.unlink(missing_ok=True)  # half a file on a full disk only takes up room
        error.filename = error.filename or str(path)  # a failing `write` does not know its file's name
        raise


def make_folder(path, exist_ok=True):
    """Make the folder that a command was told to write to. OSError, with the remedy, if it cannot be made."""
    try:
        Path(path).mkdir(parents=True, exist_ok=exist_ok)
    except OSError as error:
        raise OSError(f"the folder {path} cannot be made: {error.strerror}; name another --out") from error


def write_json(path, content):
    """`write_file`, for what `read_json` is to read."""
    write_file(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path):
    """The dict in a JSON file. ValueError, naming the file, for any other content, however it is spoiled."""
    try:
        content = json.loads(Path(path).read_bytes().decode())
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number or a nesting beyond all use
        raise ValueError(f"{path} is no file that can be read: {error or 'not JSON'}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no file that can be read: it holds a {type(content).__name__}, not an object")
    return content
