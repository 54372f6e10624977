"""Methods beyond those of the core: one file each, in `gallery/` and found by name, or anywhere and given by its path.

A path is taken from whoever types it, never from a file: else a stranger's config.json could run his code.
"""

import hashlib
import importlib
import shlex
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from .. import gallery
from ..adapters import LAYERS
from ..config import METHODS, MINI_LR
from ..lora import LoRALinear
from ..multihead import MultiHeadLoRALinear

TYPED = {}  # {name: path} of the methods that are files of the user's


def find_method(name):
    """Make a method of the gallery known to the core, by the name of its file; nothing happens for any other name."""
    if name not in in_gallery() or name in METHODS:
        return
    register(name, importlib.import_module(f"{gallery.__name__}.{name}"))


def typed_method(typed):
    """The name of the method that a user typed: of a file, its own without .py, and from now on it is known by that.

    ValueError for a file that is no method, or that has the name of another one.
    """
    if not typed.endswith(".py"):
        return typed
    path, name = Path(typed), Path(typed).stem
    if not path.is_file():
        raise ValueError(f"there is no file {typed}")
    if (name in METHODS and name not in TYPED) or name in in_gallery():
        raise ValueError(f"{typed} has the name of a method of this package; call it otherwise")
    spec = spec_from_file_location(name, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    register(name, module)
    TYPED[name] = path
    return name


def typed_flag(name):
    """The flag that makes a method known to another command if it is a file of the user's, else ""."""
    return f" --method {shlex.quote(str(TYPED[name]))}" if name in TYPED else ""


def hash_of_method(name):
    """A hash of the file of a method that is the user's; "" for one of this package."""
    return hashlib.sha256(TYPED[name].read_bytes()).hexdigest() if name in TYPED else ""


def register(name, module):
    """Put what a method's file has where the core looks for it."""
    from ..train import GRADIENTS, lora_gradients  # here: the package imports this file before `python -m` runs train
    if not hasattr(module, "LR") or not (hasattr(module, "Layer") or hasattr(module, "gradients")):
        raise ValueError(f"{module.__file__} is no method: it needs LR, and a class Layer or a function gradients")
    layer, cores = getattr(module, "Layer", LoRALinear), (LoRALinear, MultiHeadLoRALinear)
    if not issubclass(layer, cores):
        raise ValueError(f"the Layer of {module.__file__} is no LoRALinear or MultiHeadLoRALinear, so it would not be "
                         "found")
    # else what merging adds would be that of another forward
    if layer.forward not in [core.forward for core in cores] and layer.delta in [core.delta for core in cores]:
        raise ValueError(f"the Layer of {module.__file__} has a forward of its own, so it needs a delta too: what "
                         "merging adds to W, or a ValueError")
    MINI_LR[name], GRADIENTS[name] = module.LR, getattr(module, "gradients", lora_gradients)
    if hasattr(module, "Layer"):
        LAYERS[name] = {"layer": layer}


def in_gallery():
    """The names of the methods in the gallery."""
    return sorted(path.stem for path in Path(gallery.__file__).parent.glob("*.py") if path.stem != "__init__")
