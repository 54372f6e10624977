"""Put adapters into a model, take them out, merge them.

    add_adapters(model, AdapterConfig(method="rlora", rank=4))      # in place; then train adapter_parameters(model)
    remove_adapters(model)                                          # the base model again, bit for bit
    merge_adapters(model)                                           # or plain nn.Linear, where the method allows it

A model is any `torch.nn.Module` that holds linear layers and calls them (`targets.py` finds them), also compiled. Give
it its dtype before the adapters go in: they are float32.
"""

import warnings
from dataclasses import dataclass
from types import MethodType

import torch

from .lora import LoRALinear
from .multihead import MultiHeadLoRALinear
from .targets import target_names, unwrap

# What sets the layers apart (`multihead.py` has the table). "dropout": of z = A x for rlora and mlora, else of x.
LAYERS = {
    "lora": {"rank_stabilized": False, "dropout": 0.0},
    "hydralora": {"rank_stabilized": False, "dropout": 0.0, "random_init": False, "routed": True},
    "rlora": {"rank_stabilized": True, "dropout": 0.1, "random_init": True, "routed": True},
    "mlora": {"rank_stabilized": True, "dropout": 0.1, "random_init": True, "routed": False},
}


@dataclass
class AdapterConfig:
    """Which adapters to add, and where: A is [r, d_in], B and each head B_i [d_out, r].

    "lora" is `LoRALinear`, the others are `MultiHeadLoRALinear`. Align-LoRA and MeTA-LoRA train plain "lora" adapters,
    with another loss and another loop. `add_adapters` raises ValueError for what cannot be.
    """

    method: str = "lora"  # one of LAYERS: lora, hydralora, rlora, mlora
    rank: int = 8  # r, the width of the low-rank branch
    alpha: float = 16  # numerator of the scaling: s = alpha / r, or alpha / sqrt(r) when rank-stabilised
    dropout: float | None = None  # on x (lora, hydralora) or on A x, a mask per head (rlora, mlora); None: the method's
    heads: int = 5  # N, the number of heads of a multi-head method
    targets: tuple | str | None = None  # layer names or their last parts, "all-linear", or None: as `target_names` says
    tasks: tuple = ()  # their names, for layers of the gallery that have something of their own for each
    rank_stabilized: bool | None = None  # None: as the method's paper has it
    random_init: bool | None = None  # heads random at the start, or zero; None: as the method's paper has it


def add_adapters(model, config):
    """Replace the targeted linear layers of a model, in place, by layers with an adapter; freeze all the rest.

    In evaluation mode the outputs do not change until the first training step; in training mode, dropout on R-LoRA's
    random heads shows at once. Returns {layer name: adapter}. ValueError, with the model as it was, for what cannot be.
    """
    model = unwrap(model)
    if config.method not in LAYERS:
        raise ValueError(f"unknown method {config.method!r}; there are: {', '.join(LAYERS)}")
    if find_adapters(model):
        raise ValueError("the model already has adapters; remove_adapters(model) takes them out")
    adapters = {name: make_adapter(model.get_submodule(name), config) for name in target_names(model, config.targets)}
    model.requires_grad_(False)
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter.train(adapter.base.training))
    model.adapter_config = config
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = MethodType(save_with_warning, model)
    return adapters


def save_with_warning(model, *args, **options):
    """What `model.save_pretrained` is while there are adapters: nothing can load a model that was saved with them."""
    warnings.warn("the model has adapters, so what save_pretrained writes cannot be loaded; save_adapter saves them, "
                  "and merge_adapters or remove_adapters leaves a plain model to save", stacklevel=2)
    return type(model).save_pretrained(model, *args, **options)


def make_adapter(base, config):
    """The adapter that a config asks for, around one linear layer."""
    method = LAYERS[config.method]
    if not 0 <= (config.dropout or 0) < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {config.dropout}")
    if "layer" in method:  # of the gallery: a class that takes its settings from the config itself
        return method["layer"](base, config)
    dropout = method["dropout"] if config.dropout is None else config.dropout
    stabilized = method["rank_stabilized"] if config.rank_stabilized is None else config.rank_stabilized
    if config.method == "lora":
        return LoRALinear(base, config.rank, config.alpha, dropout, stabilized)
    on_x, on_z = (0.0, dropout) if config.method in ("rlora", "mlora") else (dropout, 0.0)
    random_init = method["random_init"] if config.random_init is None else config.random_init
    return MultiHeadLoRALinear(base, config.rank, config.alpha, config.heads, on_x, on_z, random_init,
                               method["routed"], stabilized)


def find_adapters(model):
    """{layer name: adapter} of all adapters in a model."""
    return {name: m for name, m in unwrap(model).named_modules() if isinstance(m, (LoRALinear, MultiHeadLoRALinear))}


def adapter_parameters(model):
    """{name: Parameter} of everything that trains, but never the base; {} of a model without adapters.

    For each layer `lora_A.weight` [r, d_in] and `lora_B.weight` [d_out, r] (LoRA), or `heads` [N, d_out, r] instead of
    B and, if routed, `router.weight` [N, d_in].
    """
    return {f"{layer}.{name}": parameter for layer, adapter in find_adapters(model).items()
            for name, parameter in adapter.named_parameters() if not name.startswith("base.")}


def remove_adapters(model):
    """Put the base layers back, in place. The base was never changed, so the model is what it was, bit for bit.

    Not so in arXiv 2502.15455, where the start of the heads is subtracted from W [d_out, d_in]. All can train again.
    """
    model = unwrap(model)
    for name, adapter in find_adapters(model).items():
        model.set_submodule(name, adapter.base)
    vars(model).pop("save_pretrained", None)  # the class's own one again
    if vars(model).pop("adapter_config", None):
        model.requires_grad_(True)


@torch.no_grad()
def merge_adapters(model):
    """Add each adapter's ΔW [d_out, d_in] to its layer's weight and leave plain layers, in place: W + s · B A.

    For M-LoRA it is W + s · Σ_i B_i A. Computed in float32 and rounded once to the base's type. Raises ValueError,
    before anything is changed, for routed adapters (HydraLoRA, R-LoRA) and for a weight that the model uses in a second
    place (a head tied to the embedding): it would change too. Source: arXiv 2106.09685, section 4.1, and 2508.05078.
    """
    adapters = find_adapters(model)
    places = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    for name, adapter in adapters.items():
        if places.count(id(adapter.base.weight)) > 1:
            raise ValueError(f"the weight of {name} is used in a second place of the model, which would change too")
        if change_of(adapter).shape != adapter.base.weight.shape:  # ValueError too where there is no single ΔW
            raise ValueError(f"the ΔW of {name} has another shape than its weight")
    for adapter in adapters.values():
        adapter.base.weight.copy_(adapter.base.weight.float() + change_of(adapter))
    remove_adapters(model)


def change_of(adapter):
    """ΔW as the base's weight lies: [d_out, d_in], or in a Conv1D [d_in, d_out]."""
    return adapter.delta() if isinstance(adapter.base, torch.nn.Linear) else adapter.delta().T
