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

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .run.files import read_description, read_json, write_file, write_json
from .lora import LoRALinear, is_linear, linear_shape
from .multihead import MultiHeadLoRALinear

# What sets the methods apart (`multihead.py` has the table). "dropout" is the default rate, of the masks on z = A x with
# "random_init", else of those on x.
METHODS = {
    "lora": {"multihead": False, "rank_stabilized": False, "dropout": 0.0},
    "hydralora": {"multihead": True, "rank_stabilized": False, "dropout": 0.0},
    "rlora": {"multihead": True, "rank_stabilized": True, "dropout": 0.1, "random_init": True},
    "mlora": {"multihead": True, "rank_stabilized": True, "dropout": 0.1, "random_init": True, "routed": False},
}
PAPER_TARGETS = ("gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."  # of every key in a PEFT adapter file


@dataclass
class AdapterConfig:
    """Which adapters to add, and where.

    "lora": y = W x + b + s · B A drop(x), arXiv 2106.09685. "hydralora", "rlora", "mlora": N heads B_i on one A, see
    `MultiHeadLoRALinear` (arXiv 2404.19245, 2502.15455, 2508.05078). Align-LoRA (2508.05078) and MeTA-LoRA (2510.11598)
    train plain "lora" adapters, with another loss and another loop. A is [r, d_in], B and each B_i [d_out, r].
    Nothing is checked here: `add_adapters` raises ValueError for what cannot be.
    """

    method: str = "lora"  # one of METHODS: lora, hydralora, rlora, mlora
    rank: int = 8  # r, the width of the low-rank branch
    alpha: float = 16  # numerator of the scaling: s = alpha / r, or alpha / sqrt(r) when rank-stabilised
    dropout: float | None = None  # on x (lora, hydralora) or on A x, a mask per head (rlora, mlora); None: the method's
    heads: int = 5  # N, the number of heads of a multi-head method
    targets: tuple | str | None = None  # layer names or their last parts, "all-linear", or None: gate, up and down
    # projections where the model has them (as in the papers), otherwise all linear layers but the output head
    rank_stabilized: bool | None = None  # None: as the method's paper has it
    random_init: bool | None = None  # heads random at the start, or zero; None: as the method's paper has it


def add_adapters(model, config):
    """Replace the targeted linear layers of a model, in place, by layers with an adapter; freeze all the rest.

    A layer W [d_out, d_in] becomes y = W x + b + branch(x), x [..., d_in] -> y [..., d_out]; for the branch of each
    method see `LoRALinear` (arXiv 2106.09685) and `MultiHeadLoRALinear` (2404.19245, 2502.15455, 2508.05078).
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
    try:
        adapters = {name: make_adapter(model.get_submodule(name), config) for name in names}
    except ValueError:
        unfreeze(model, trainable)
        raise
    model.requires_grad_(False)
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter.train(adapter.base.training))
    model.adapter_config, model.trainable_before_adapters = config, trainable
    return adapters


def make_adapter(base, config):
    """The adapter that a config asks for, around one linear layer."""
    method = METHODS[config.method]
    dropout = method["dropout"] if config.dropout is None else config.dropout
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    d_in, d_out = linear_shape(base)
    most = max(256, 16 * min(d_in, d_out))  # more columns than a layer has say nothing new; so many are a mistake
    if config.rank > most:
        raise ValueError(f"rank {config.rank} is too large for a layer of {d_in} x {d_out}; the most is {most}")
    stabilized = method["rank_stabilized"] if config.rank_stabilized is None else config.rank_stabilized
    if not method["multihead"]:
        return LoRALinear(base, config.rank, config.alpha, dropout, stabilized)
    masks_z = method.get("random_init", False)
    on_x, on_z = (0.0, dropout) if masks_z else (dropout, 0.0)
    random_init = masks_z if config.random_init is None else config.random_init
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
    """{name: Parameter} of everything that trains, but never the base; {} of a model without adapters.

    For each layer `lora_A.weight` [r, d_in] and `lora_B.weight` [d_out, r] (LoRA, arXiv 2106.09685), or `heads`
    [N, d_out, r] instead of B and, if routed, `router.weight` [N, d_in] (arXiv 2404.19245). Raises nothing.
    """
    return {f"{layer}.{name}": parameter for layer, adapter in find_adapters(model).items()
            for name, parameter in adapter.named_parameters() if not name.startswith("base.")}


def remove_adapters(model):
    """Put the base layers back, in place. The base was never changed, so the model is what it was, bit for bit.

    Each W [d_out, d_in] is the very tensor that it was: the start of R-LoRA's heads is not subtracted from it, as it is
    in arXiv 2502.15455. Of a model without adapters nothing is changed. Raises nothing.
    """
    for name, adapter in find_adapters(model).items():
        model.set_submodule(name, adapter.base)
    _forget_adapters(model)


@torch.no_grad()
def merge_adapters(model):
    """Add each adapter's ΔW [d_out, d_in] to its layer's weight and leave plain layers, in place: W + s · B A.

    For M-LoRA it is W + s · Σ_i B_i A. Computed in float32 and rounded once to the base's type, so a bfloat16 model
    merges to within its own rounding. Raises ValueError, before anything is changed, for routed adapters (HydraLoRA,
    R-LoRA) and for a weight that the model uses in a second place (a head tied to the embedding): that place would
    change with it. Source: arXiv 2106.09685, section 4.1, and 2508.05078.
    """
    adapters = find_adapters(model)
    places = [parameter for _, parameter in model.named_parameters(remove_duplicate=False)]
    shared = [name for name, a in adapters.items() if sum(p is a.base.weight for p in places) > 1]
    if shared:
        raise ValueError(f"the weight of {shared[0]} is used in a second place of the model, which would change too")
    routed = [name for name, adapter in adapters.items() if getattr(adapter, "router", None) is not None]
    if routed:
        raise ValueError(f"{routed[0]} and {len(routed) - 1} more layers are routed: their heads are weighted anew for "
                         "every token, so no single weight equals them; keep the adapter in its own file")
    for name, adapter in adapters.items():
        weight, delta = adapter.base.weight, adapter.delta()
        delta = delta if isinstance(adapter.base, torch.nn.Linear) else delta.T  # Conv1D stores [d_in, d_out]
        weight.copy_(weight.float() + delta)
        model.set_submodule(name, adapter.base)
    _forget_adapters(model)


def _forget_adapters(model):
    unfreeze(model, model.__dict__.pop("trainable_before_adapters", []))
    model.__dict__.pop("adapter_config", None)


def unfreeze(model, names):
    """Have these parameters train again."""
    for name in names:
        model.get_parameter(name).requires_grad_(True)


# ----------------------------------------------------------------------------------------------------------- files
def save_adapter(model, folder):
    """Write the adapters of a model to `folder`, as adapter_config.json and adapter_model.safetensors.

    LoRA adapters (A [r, d_in], B [d_out, r]) are files of PEFT, scaling included (`r`, `lora_alpha`, and `use_rslora`
    for arXiv 2312.03732). Raises ValueError without adapters, OSError where they cannot be written.
    """
    adapters = find_adapters(model)
    if not adapters or not hasattr(model, "adapter_config"):
        raise ValueError("the model has no adapters to save that add_adapters put in")
    config, first = model.adapter_config, next(iter(adapters.values()))
    base = getattr(getattr(model, "config", None), "_name_or_path", None)
    if base and ".." in Path(base).parts:
        base = str(Path(base).resolve())  # `..` means another folder wherever the adapter is taken
    multihead = isinstance(first, MultiHeadLoRALinear)
    description = {
        "peft_type": "TINYLORA_MTL_MULTIHEAD" if multihead else "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout or 0.0,
        "use_rslora": first.rank_stabilized, "target_modules": list(adapters), "bias": "none",
        "fan_in_fan_out": not isinstance(first.base, torch.nn.Linear), "inference_mode": True,
    }
    if multihead:
        description |= {"method": config.method, "heads": config.heads, "lora_dropout": first.dropout.p or
                        first.head_dropout.p}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", description)
    tensors = {PREFIX + _file_key(name): p.detach().contiguous().cpu() for name, p in adapter_parameters(model).items()}
    write_file(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))


def load_adapter(model, folder):
    """Add the adapters that `save_adapter` wrote (or PEFT, for LoRA, arXiv 2106.09685) to a model, in place.

    Returns {layer name: adapter}; a layer W [d_out, d_in] has one as in `add_adapters`. Raises FileNotFoundError if a
    file is missing, and ValueError, before the model is changed, for anything that is not an adapter of this model: see
    `read_adapter`. No file that is loaded can run code.
    """
    if find_adapters(model):
        raise ValueError("the model already has adapters; remove_adapters(model) takes them out")
    folder = Path(folder)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} is not an adapter folder: it has no {file}")
    description = read_json(folder / "adapter_config.json")
    try:
        config, tensors = read_adapter(description, folder / "adapter_model.safetensors", model)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder} is not an adapter that can be read: {str(error):.200}") from error
    except ValueError as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from error
    adapters = add_adapters(model, config)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_(tensors[PREFIX + _file_key(name)])
    return adapters


def read_adapter(description, file, model):
    """(AdapterConfig, {key: tensor}) of an adapter that may come from a stranger, looked at before it is believed.

    description: the dict of adapter_config.json; file: the tensors; model: what the adapter is to fit. Raises
    ValueError for another kind of adapter, values of a wrong type or size, names that are paths or code, tensors that
    are missing, too many, of another shape or not finite. Shapes are compared before any tensor is read.
    """
    values = read_description(description)
    if METHODS.get(values["method"], {}).get("multihead") != (description["peft_type"] != "LORA"):
        raise ValueError(f"its method {values['method']!r:.60} is none of its type's")
    with safe_open(file, "pt") as stored:
        shapes = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}
        layers = sorted({key.removeprefix(PREFIX).rsplit(".lora_A", 1)[0] for key in shapes if ".lora_A" in key})
        linear = {name for name, module in model.named_modules() if name and is_linear(module)}
        foreign = [name for name in layers if name not in linear]
        if foreign or not layers:
            raise ValueError(f"it is for another model: there is no layer {(foreign or ['?'])[0]:.100}")
        config = AdapterConfig(**values, targets=tuple(layers))
        wanted = {}
        for name in target_names(model, config.targets):
            base = torch.nn.Linear(*linear_shape(model.get_submodule(name)), device="meta")  # shapes, no memory
            adapter = make_adapter(base, config)
            wanted |= {PREFIX + _file_key(f"{name}.{part}"): tuple(parameter.shape)
                       for part, parameter in adapter.named_parameters() if not part.startswith("base.")}
        wrong = [f"{key} is missing" for key in wanted if key not in shapes]
        wrong += [f"{key:.100} is not known" for key in shapes if key not in wanted]
        wrong += [f"{key} has shape {list(shapes[key])}, not {list(shape)}" for key, shape in wanted.items()
                  if key in shapes and shapes[key] != shape]
        if wrong:
            raise ValueError(f"it does not fit this model: {wrong[0]}"
                             + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""))
        tensors = {key: stored.get_tensor(key) for key in wanted}
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{key} holds {str(tensor.dtype).removeprefix('torch.')}, not floating-point numbers")
        if not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{key} holds a number that is not finite")
    return config, tensors


def _file_key(name):
    return name if name.endswith(".weight") else f"{name}.weight"
