"""Files that are whole or not there, and files from strangers that are looked at before they are believed."""

import json
import os
import re
from pathlib import Path

MOST_JSON = 1_000_000  # bytes: far above any settings file of a run, an adapter or PEFT
NAME = re.compile(r"[\w-]+(\.[\w-]+)*")  # of a layer, a class or a module: no path, no `..`
MOST_RANK, MOST_HEADS = 4096, 1024  # far above any use, and small enough not to fill the memory by a slip
UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "use_qalora",
               "alora_invocation_tokens", "lora_bias")  # options of PEFT's that change what a LoRA computes


def write_file(path, content):
    """Write bytes to `path` so that a power cut or a kill leaves the old file or the new one, never a part of it.

    The bytes go to a new file beside it, are on the disk before that takes the name, and the name is on the disk
    before this returns. Raises OSError (no space, say) with the old file as it was.
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
    if os.name == "posix":  # elsewhere a folder cannot be opened, and need not be
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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
    path = Path(path)
    if path.stat().st_size > MOST_JSON:
        raise ValueError(f"{path} is no file that can be read: it has over {MOST_JSON:,} bytes, more than any needs")
    try:
        content = json.loads(path.read_bytes().decode())
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number or a nesting beyond all use
        raise ValueError(f"{path} is no file that can be read: {error or 'not JSON'}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no file that can be read: it holds a {type(content).__name__}, not an object")
    return content


def read_description(description):
    """{field of AdapterConfig: value} in the dict of an adapter_config.json that may come from a stranger.

    ValueError, with the reason, for another kind of adapter, for values of a wrong type or size, and for names that
    are paths or code. What is not read here is not used.
    """
    def get(name, kinds, default=None):
        value = description.get(name)
        value = default if value is None else value
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"its {name} is {value!r:.60}, not a {' or '.join(kind.__name__ for kind in kinds)}")
        return value

    kind = get("peft_type", (str,))
    if kind not in ("LORA", "TINYLORA_MTL_MULTIHEAD"):
        raise ValueError(f"its type is {kind[:60]}, not LoRA or a multi-head adapter of this package")
    unsupported = [key for key in UNSUPPORTED if description.get(key)]
    if description.get("init_lora_weights") not in (None, True, False, "gaussian"):
        unsupported += ["init_lora_weights"]  # PiSSA and its kin change the base weights
    if unsupported:
        raise ValueError(f"it uses {', '.join(unsupported)}, which this package does not have")
    refuse_tricks(description)
    rank, alpha = get("r", (int,)), get("lora_alpha", (int, float))
    dropout, heads = get("lora_dropout", (int, float), 0.0), get("heads", (int,), 1)
    for name, value, low, high in (("r", rank, 1, MOST_RANK), ("heads", heads, 1, MOST_HEADS),
                                   ("lora_alpha", alpha, 0, 10 ** 6), ("lora_dropout", dropout, 0, 0.999)):
        if not low <= value <= high:
            raise ValueError(f"its {name} is {str(value):.20}, not from {low} to {high}")
    return {"method": "lora" if kind == "LORA" else get("method", (str,)), "rank": rank, "alpha": alpha,
            "dropout": dropout, "heads": heads, "rank_stabilized": get("use_rslora", (bool,), False)}


def refuse_tricks(description):
    """ValueError if an adapter's description names files or code where PEFT writes the name of a layer or a model.

    `base_model_name_or_path` may be a path, as PEFT writes it, but none with `..`; it is never opened here.
    """
    base, layers = description.get("base_model_name_or_path"), description.get("target_modules")
    if base is not None and (not isinstance(base, str) or ".." in re.split(r"[/\\]", base) or "\0" in base):
        raise ValueError(f"its base_model_name_or_path is {base!r:.60}, not the name of a model")
    for name in layers if isinstance(layers, list) else []:  # a text is a pattern of PEFT's, and not used here
        if not isinstance(name, str) or not (name == "all-linear" or NAME.fullmatch(name)):
            raise ValueError(f"its target_modules has {name!r:.60}, not the name of a layer")
    if not isinstance(layers, (list, str, type(None))):
        raise ValueError(f"its target_modules is {layers!r:.60}, not a list of layers")
    code = description.get("auto_mapping")  # the model's class, which PEFT writes if it is not told a task_type
    names = list(code.values()) if isinstance(code, dict) else []
    plain = all(isinstance(name, str) and NAME.fullmatch(name) for name in names)
    if code is not None and not (names and plain and code.get("parent_library", "").startswith("transformers.")):
        raise ValueError("its auto_mapping names code that is not transformers' own")
