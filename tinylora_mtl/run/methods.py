"""Methods beyond those of the core: one file each in `gallery/`, found by name."""

import importlib
from pathlib import Path

from .. import gallery
from ..adapters import LAYERS
from ..config import METHODS, MINI_LR
from ..train import GRADIENTS, lora_gradients


def find_method(name):
    """Make a method of the gallery known to the core, by the name of its file; nothing happens for any other name."""
    if name not in in_gallery() or name in METHODS:
        return
    module = importlib.import_module(f"{gallery.__name__}.{name}")
    MINI_LR[name], GRADIENTS[name] = module.LR, getattr(module, "gradients", lora_gradients)
    if hasattr(module, "Layer"):
        LAYERS[name] = {"layer": module.Layer}


def in_gallery():
    """The names of the methods in the gallery."""
    return sorted(path.stem for path in Path(gallery.__file__).parent.glob("*.py") if path.stem != "__init__")
