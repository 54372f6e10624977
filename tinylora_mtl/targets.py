"""Which layers of a model get an adapter, by their names."""

import inspect
import re
from functools import cache

import torch
from torch import nn

from .lora import is_linear

PAPER_TARGETS = ("gate_proj", "up_proj", "down_proj")


def unwrap(model):
    """The model itself, without the wrapper of torch.compile or of a data-parallel one: its layers' own names."""
    while hasattr(model, "_orig_mod") or isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = getattr(model, "_orig_mod", None) or model.module
    return model


def target_names(model, targets):
    """The names of the linear layers that `targets` (see AdapterConfig) stands for, in the model's order.

    Those that cannot take an adapter (`linear_layers`) are left out. ValueError for a target of which none is left.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    layers, left_out = linear_layers(model)

    def matching(target, names=layers):
        return [name for name in names if name == target or name.endswith(f".{target}")]

    targets = (targets,) if isinstance(targets, str) else targets
    if targets is None and all(map(matching, PAPER_TARGETS)):
        targets = PAPER_TARGETS
    if targets is None or tuple(targets) == ("all-linear",):
        found = {"all-linear": [name for name, layer in layers.items() if layer is not head]}
    else:
        found = {target: matching(target) for target in targets}
    for target, names in found.items():
        if not names:
            kinds = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in layers}))
            why = "".join(f" ({name}: {left_out[name]})" for name in matching(target, left_out)[:1])
            raise ValueError(f"no linear layer matches the target {target!r}{why}; the model has: {kinds}")
    return [name for name in layers if any(name in names for names in found.values())]


def linear_layers(model):
    """({name: layer} of the linear layers that can take an adapter, {name: the reason} of those that cannot).

    An adapter acts where its layer is called: `nn.MultiheadAttention` and Mamba use the weight of some layers without
    that. And some subclasses of `nn.Linear`, such as the routers of mixtures of experts, do not return W x + b.
    """
    layers, left_out = {}, {}
    for path, layer in model.named_modules():
        if path and is_linear(layer):
            parts = path.split(".")
            owners = {type(model.get_submodule(".".join(parts[:i]))) for i in range(len(parts))}  # all around it
            if any(parts[-1] in weights_used_by(owner) for owner in owners):
                left_out[path] = "its weight is used without calling it"
            elif type(layer).forward is not nn.Linear.forward and not returns_y(layer):
                left_out[path] = "it does not return x times its weight"
            else:
                layers[path] = layer
    return layers, left_out


@cache
def weights_used_by(kind):
    """The layers whose weight or bias the code of a class takes, for more than its type, shape or a part (Bloom)."""
    try:
        return set(re.findall(r"\.(\w+)\.(?:weight|bias)\b(?!\.dtype|\.device|\.shape|\[)", inspect.getsource(kind)))
    except (OSError, TypeError):  # there is no source, as in a notebook
        return set()


def returns_y(layer):
    """Whether a layer gives W x + b, as subclasses of `nn.Linear` need not."""
    W, b = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T, layer.bias  # W [d_out, d_in]
    x = torch.linspace(-1, 1, W.shape[1], dtype=W.dtype, device=W.device)[None]  # [1, d_in]
    try:
        y, expected = layer(x), nn.functional.linear(x, W, b)  # [1, d_out]
        return y.shape == expected.shape and (W.is_meta or torch.allclose(y, expected, 0.05, 0.05))
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return False
