"""Put adapters into a model, take them out, merge them, save them, load them.

    config = AdapterConfig(method="rlora", rank=4)
    add_adapters(model, config)                # in place: the base is frozen, only the adapters train
    ...                                        # train with any optimiser on adapter_parameters(model)
    save_adapter(model, "folder")
    remove_adapters(model)                     # the base model again, bit for bit
    load_adapter(model, "folder")              # the same outputs as before
    merge_adapters(model)                      # plain nn.Linear, where the method allows it

A model is any `torch.nn.Module` that holds linear layers and calls them (`nn.MultiheadAttention` reads their weights
instead, and cannot be adapted). Cast it to its type before the adapters go in: they are float32. Files are in PEFT's
own format: `adapter_config.json` and `adapter_model.safetensors`. PEFT loads the LoRA ones; the multi-head ones carry a
type of their own.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .lora import LoRALinear, is_linear
from .multihead import MultiHeadLoRALinear

# What sets the methods apart (`multihead.py` has the table); "dropout" says which of the two dropouts a method has.
METHODS = {
    "lora": {"multihead": False, "rank_stabilized": False, "dropout": 0.0},
    "hydralora": {"multihead": True, "rank_stabilized": False, "dropout": 0.0},
    "rlora": {"multihead": True, "rank_stabilized": True, "dropout": 0.1, "random_init": True},
    "mlora": {"multihead": True, "rank_stabilized": True, "dropout": 0.1, "random_init": True, "routed": False},
}
PAPER_TARGETS = ("gate_proj", "up_proj", "down_proj")
UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "use_qalora",
               "alora_invocation_tokens", "lora_bias")  # options of PEFT's that change what a LoRA computes
PREFIX = "base_model.model."  # of every key in a PEFT adapter file


@dataclass
class AdapterConfig:
    """Which adapters to add, and where. Align-LoRA and MeTA-LoRA train plain "lora" adapters."""

    method: str = "lora"  # one of METHODS: lora, hydralora, rlora, mlora
    rank: int = 8  # r, the width of the low-rank branch
    alpha: float = 16  # numerator of the scaling: s = alpha / r, or alpha / sqrt(r) when rank-stabilised
    dropout: float | None = None  # on x (lora, hydralora) or on A x, a mask per head (rlora, mlora); None: the method's
    heads: int = 5  # N, the number of heads of a multi-head method
    targets: tuple | str | None = None  # layer names or their last parts, "all-linear", or None: gate, up and down
    # projections where the model has them (as in the papers), otherwise all linear layers but the output head
    rank_stabilized: bool | None = None  # None: as the method's paper has it


def add_adapters(model, config):
    """Replace the targeted linear layers of a model, in place, by layers with an adapter; freeze all the rest.

    In evaluation mode the outputs do not change until the first training step; in training mode, dropout on R-LoRA's
    random heads shows at once. The adapters are float32 whatever the model's type.
    Returns {layer name: adapter}. Raises ValueError for an unknown method, targets that match no linear layer (the
    message names those there are), values out of range, and a model that already has adapters.
    """
    if config.method not in METHODS:
        raise ValueError(f"unknown method {config.method!r}; there are: {', '.join(METHODS)}")
    if find_adapters(model):
        raise ValueError("the model already has adapters; remove_adapters(model) takes them out")
    names = target_names(model, config.targets)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    adapters = {name: make_adapter(model.get_submodule(name), config) for name in names}
    model.requires_grad_(False)
    for name, adapter in adapters.items():
        replace_module(model, name, adapter.train(adapter.base.training))
    model.adapter_config, model.trainable_before_adapters = config, trainable
    return adapters


def make_adapter(base, config):
    """The adapter that a config asks for, around one linear layer."""
    method = METHODS[config.method]
    dropout = method["dropout"] if config.dropout is None else config.dropout
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    stabilized = method["rank_stabilized"] if config.rank_stabilized is None else config.rank_stabilized
    if not method["multihead"]:
        return LoRALinear(base, config.rank, config.alpha, dropout, stabilized)
    random_init = method.get("random_init", False)
    on_x, on_z = (0.0, dropout) if random_init else (dropout, 0.0)
    return MultiHeadLoRALinear(base, config.rank, config.alpha, config.heads, on_x, on_z, random_init,
                               routed=method.get("routed", True), rank_stabilized=stabilized)


def target_names(model, targets):
    """The names of the linear layers that `targets` (see AdapterConfig) stands for, in the model's order."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = [name for name, module in model.named_modules() if name and is_linear(module)]
    body = [name for name in linear if model.get_submodule(name) is not head]

    def matching(wanted):
        return [name for name in linear if any(name == w or name.endswith(f".{w}") for w in wanted)]

    targets = (targets,) if isinstance(targets, str) else targets
    if targets is None or tuple(targets) == ("all-linear",):
        papers = targets is None and all(matching([target]) for target in PAPER_TARGETS)
        names = matching(PAPER_TARGETS) if papers else body
        unmatched = [] if names else ["all-linear"]
    else:
        names, unmatched = matching(targets), [target for target in targets if not matching([target])]
    if unmatched or not names:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in linear})
        raise ValueError(f"no linear layer matches the target {', '.join(unmatched)!r}; "
                         f"the model has: {', '.join(kinds) or 'none'}")
    return names


def find_adapters(model):
    """{layer name: adapter} of all adapters in a model."""
    return {name: m for name, m in model.named_modules() if isinstance(m, (LoRALinear, MultiHeadLoRALinear))}


def adapter_parameters(model):
    """{name: Parameter} of everything that trains: A, B or the heads, and the routers, but never the base."""
    return {f"{layer}.{name}": parameter for layer, adapter in find_adapters(model).items()
            for name, parameter in adapter.named_parameters() if not name.startswith("base.")}


def remove_adapters(model):
    """Put the base layers back, in place. The base was never changed, so the model is what it was, bit for bit."""
    for name, adapter in find_adapters(model).items():
        replace_module(model, name, adapter.base)
    _forget_adapters(model)


@torch.no_grad()
def merge_adapters(model):
    """Add each adapter's ΔW to its layer's weight and leave plain layers, in place: W + s · B A.

    Computed in float32 and rounded once to the base's type, so a bfloat16 model merges to within its own rounding.
    Raises ValueError, before anything is changed, for routed adapters (HydraLoRA, R-LoRA) and for a weight that the
    model uses in a second place (a head tied to the embedding): that place would change with it.
    """
    adapters = find_adapters(model)
    places = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
    shared = [name for name, a in adapters.items() if sum(p is a.base.weight for p in places) > 1]
    if shared:
        raise ValueError(f"the weight of {shared[0]} is used in a second place of the model, which would change too")
    routed = [name for name, adapter in adapters.items() if getattr(adapter, "router", None) is not None]
    if routed:
        raise ValueError(f"{routed[0]} and {len(routed) - 1} more layers are routed: their heads are weighed anew for "
                         "every token, so no single weight equals them; keep the adapter in its own file")
    for name, adapter in adapters.items():
        weight, delta = adapter.base.weight, adapter.delta()
        delta = delta if isinstance(adapter.base, torch.nn.Linear) else delta.T  # Conv1D stores [d_in, d_out]
        weight.copy_(weight.float() + delta)
        replace_module(model, name, adapter.base)
    _forget_adapters(model)


def _forget_adapters(model):
    for name in model.__dict__.pop("trainable_before_adapters", []):
        model.get_parameter(name).requires_grad_(True)
    model.__dict__.pop("adapter_config", None)


def replace_module(model, name, module):
    """model.<name> = module, for a dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


# ----------------------------------------------------------------------------------------------------------- files
def save_adapter(model, folder):
    """Write the adapters of a model to `folder`, as adapter_config.json and adapter_model.safetensors.

    LoRA adapters are files of PEFT, scaling included (`r`, `lora_alpha`, `use_rslora`). ValueError without adapters.
    """
    adapters = find_adapters(model)
    if not adapters or not hasattr(model, "adapter_config"):
        raise ValueError("the model has no adapters to save that add_adapters put in")
    config, first = model.adapter_config, next(iter(adapters.values()))
    multihead = isinstance(first, MultiHeadLoRALinear)
    description = {
        "peft_type": "TINYLORA_MTL_MULTIHEAD" if multihead else "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None),
        "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout or 0.0,
        "use_rslora": first.rank_stabilized, "target_modules": list(adapters), "bias": "none",
        "fan_in_fan_out": not isinstance(first.base, torch.nn.Linear), "inference_mode": True,
    }
    if multihead:
        description |= {"method": config.method, "heads": config.heads, "lora_dropout": first.dropout.p or
                        first.head_dropout.p}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(description, indent=2) + "\n")
    tensors = {PREFIX + _file_key(name): p.detach().contiguous().cpu() for name, p in adapter_parameters(model).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def load_adapter(model, folder):
    """Add the adapters that `save_adapter` wrote (or PEFT, for LoRA) to a model, in place.

    Returns {layer name: adapter}. Raises FileNotFoundError if a file is missing, and ValueError, before the model is
    changed, for a file of another kind, an unknown adapter type, and layers or shapes that are not this model's.
    """
    folder = Path(folder)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} is not an adapter folder: it has no {file}")
    try:
        description = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        kind = description["peft_type"]
        if kind not in ("LORA", "TINYLORA_MTL_MULTIHEAD"):
            raise ValueError(f"its type is {kind}, not LoRA or a multi-head adapter of this package")
        unsupported = [key for key in UNSUPPORTED if description.get(key)]
        if description.get("init_lora_weights") not in (None, True, False, "gaussian"):
            unsupported += ["init_lora_weights"]  # PiSSA and its kin change the base weights
        if unsupported:
            raise ValueError(f"it uses {', '.join(unsupported)}, which this package does not have")
        if not isinstance(description["r"], int) or not isinstance(description["lora_alpha"], (int, float)):
            raise ValueError("r or lora_alpha is not a number")
        config = AdapterConfig(
            method="lora" if kind == "LORA" else description["method"], rank=description["r"],
            alpha=description["lora_alpha"], dropout=description.get("lora_dropout", 0.0),
            heads=description.get("heads", 1),
            targets=tuple(sorted({key.removeprefix(PREFIX).rsplit(".lora_A", 1)[0] for key in tensors
                                  if ".lora_A" in key})),
            rank_stabilized=description.get("use_rslora", False))
        missing = [name for name in config.targets if name not in dict(model.named_modules())]
        if missing or not config.targets:
            raise ValueError(f"it is for another model: there is no layer {(missing or ['?'])[0]}")
    except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{folder} is not an adapter that can be read: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from error

    adapters = add_adapters(model, config)
    wanted = {PREFIX + _file_key(name): parameter for name, parameter in adapter_parameters(model).items()}
    wrong = [f"{key} is missing" for key in wanted if key not in tensors]
    wrong += [f"{key} is not known" for key in tensors if key not in wanted]
    wrong += [f"{key} has shape {list(tensors[key].shape)}, not {list(p.shape)}" for key, p in wanted.items()
              if key in tensors and tensors[key].shape != p.shape]
    if wrong:
        remove_adapters(model)
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"{folder} does not fit this model: {wrong[0]}{more}")
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(tensors[key])
    return adapters


def _file_key(name):
    return name if name.endswith(".weight") else f"{name}.weight"
