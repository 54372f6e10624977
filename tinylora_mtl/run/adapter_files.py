"""Adapters to and from files in PEFT's format: adapter_config.json and adapter_model.safetensors.

PEFT loads the LoRA ones; the multi-head ones carry a type of their own. A file that comes from a stranger is looked at
before it is believed, and cannot run code.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..adapters import (LAYERS, AdapterConfig, adapter_parameters, add_adapters, find_adapters, make_adapter,
                        target_names)
from ..lora import is_linear, linear_shape
from ..multihead import MultiHeadLoRALinear
from .files import read_json, write_file, write_json

MULTIHEAD = "TINYLORA_MTL_MULTIHEAD"
PREFIX = "base_model.model."  # of every key in a PEFT adapter file
UNSUPPORTED = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "use_qalora",
               "alora_invocation_tokens", "lora_bias")  # options of PEFT's that change what a LoRA computes


def save_adapter(model, folder):
    """Write the adapters of a model to `folder`, as adapter_config.json and adapter_model.safetensors.

    LoRA adapters (A [r, d_in], B [d_out, r]) are files of PEFT, scaling included (`r`, `lora_alpha`, and `use_rslora`
    for arXiv 2312.03732). Raises ValueError without adapters, OSError where they cannot be written.
    """
    adapters = find_adapters(model)
    if not adapters or not hasattr(model, "adapter_config"):
        raise ValueError("the model has no adapters to save that add_adapters put in")
    config, first = model.adapter_config, next(iter(adapters.values()))
    description = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None),
        "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout or 0.0,
        "use_rslora": first.rank_stabilized, "target_modules": list(adapters), "bias": "none",
        "fan_in_fan_out": not isinstance(first.base, torch.nn.Linear), "inference_mode": True,
    }
    if isinstance(first, MultiHeadLoRALinear):
        description |= {"peft_type": MULTIHEAD, "method": config.method, "heads": config.heads,
                        "lora_dropout": first.dropout.p or first.head_dropout.p}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", description)
    tensors = {file_key(name): p.detach().contiguous().cpu() for name, p in adapter_parameters(model).items()}
    write_file(folder / "adapter_model.safetensors", save(tensors, metadata={"format": "pt"}))


def load_adapter(model, folder):
    """Add the adapters that `save_adapter` wrote (or PEFT, for LoRA, arXiv 2106.09685) to a model, in place.

    Returns {layer name: adapter}; a layer W [d_out, d_in] has one as in `add_adapters`. Raises FileNotFoundError if a
    file is missing, and ValueError, before the model is changed, for another kind of adapter, values of a wrong type or
    size, and tensors that are missing, too many, of another shape or not finite. No file that is loaded can run code.
    """
    if find_adapters(model):
        raise ValueError("the model already has adapters; remove_adapters(model) takes them out")
    folder = Path(folder)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} is not an adapter folder: it has no {file}")
    try:
        config = read_description(read_json(folder / "adapter_config.json"))
        tensors = read_tensors(folder / "adapter_model.safetensors", config, model)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{folder} is not an adapter that can be loaded: {str(error):.400}") from error
    adapters = add_adapters(model, config)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            parameter.copy_(tensors[file_key(name)])
    return adapters


def read_description(description):
    """The AdapterConfig, but for its targets, in the dict of an adapter_config.json; what is not read is not used."""
    kind = description.get("peft_type")
    if kind not in ("LORA", MULTIHEAD):
        raise ValueError(f"its type is {kind!s:.60}, not LoRA or a multi-head adapter of this package")
    unsupported = [key for key in UNSUPPORTED if description.get(key)]
    if description.get("init_lora_weights") not in (None, True, False, "gaussian"):
        unsupported += ["init_lora_weights"]  # PiSSA and its kin change the base weights
    if unsupported:
        raise ValueError(f"it uses {', '.join(unsupported)}, which this package does not have")

    def number(name, low, high, default=None, kinds=(int, float)):
        value = default if description.get(name) is None else description[name]
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            raise ValueError(f"its {name} is {value!r:.60}, not a{' whole' if kinds is int else ''} number from {low} "
                             f"to {high}")
        return value

    method, stabilized = "lora" if kind == "LORA" else description.get("method"), description.get("use_rslora") or False
    if not isinstance(method, str) or method not in LAYERS or (method == "lora") != (kind == "LORA"):
        raise ValueError(f"its method {method!r:.60} is none of its type's")
    if not isinstance(stabilized, bool):
        raise ValueError(f"its use_rslora is {stabilized!r:.60}, not true or false")
    return AdapterConfig(method, number("r", 1, 4096, kinds=int), number("lora_alpha", 0, 10 ** 6),
                         number("lora_dropout", 0, 0.999, 0.0), number("heads", 1, 1024, 1, int),
                         rank_stabilized=stabilized)


def read_tensors(file, config, model):
    """{key: tensor} of an adapter's file; fills in the config's targets. Shapes are compared before any is read."""
    with safe_open(file, "pt") as stored:
        shapes = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}
        config.targets = tuple(sorted({key.removeprefix(PREFIX).rsplit(".lora_A", 1)[0] for key in shapes
                                       if ".lora_A" in key}))
        linear = {name: module for name, module in model.named_modules() if name and is_linear(module)}
        for name in config.targets or ["?"]:
            if name not in linear:
                raise ValueError(f"it is for another model: there is no layer {name:.100}")
        wanted = {}
        for name in target_names(model, config.targets):
            base = torch.nn.Linear(*linear_shape(linear[name]), device="meta")  # shapes, no memory
            wanted |= {file_key(f"{name}.{part}"): tuple(parameter.shape) for part, parameter
                       in make_adapter(base, config).named_parameters() if not part.startswith("base.")}
        wrong = [f"{key} is missing" for key in wanted if key not in shapes]
        wrong += [f"{key:.100} is not known" for key in shapes if key not in wanted]
        wrong += [f"{key} has shape {list(shapes[key])}, not {list(shape)}" for key, shape in wanted.items()
                  if key in shapes and shapes[key] != shape]
        if wrong:
            raise ValueError(f"it does not fit this model: {wrong[0]}")
        tensors = {key: stored.get_tensor(key) for key in wanted}
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{key} holds {str(tensor.dtype).removeprefix('torch.')}, not floating-point numbers")
        if not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{key} holds a number that is not finite")
    return tensors


def file_key(name):
    """The key in a PEFT file of a parameter of `adapter_parameters`."""
    return PREFIX + (name if name.endswith(".weight") else f"{name}.weight")
