"""Adapters to and from files in PEFT's format: adapter_config.json and adapter_model.safetensors.

PEFT loads the LoRA ones; the multi-head ones carry a type of their own. A file that comes from a stranger is looked at
before it is believed, and cannot run code.
"""

import json
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..adapters import LAYERS, AdapterConfig, add_adapters, find_adapters, make_adapter
from ..lora import linear_shape
from ..multihead import MultiHeadLoRALinear
from ..targets import linear_layers, target_names, unwrap
from .files import read_json, write_file, write_json
from .fingerprints import of_base, plain_name
from .methods import find_method

MULTIHEAD, GALLERY = "TINYLORA_MTL_MULTIHEAD", "TINYLORA_MTL_GALLERY"  # types of those that are not plain LoRA
PREFIX = "base_model.model."  # of every key in a PEFT adapter file
BASE = "base_sha256"  # the entry in the tensors' file, not in PEFT's JSON, that says which base the adapter is for
INITS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")  # of A and B; PiSSA and its kin change the base
# How an adapter was made or trained, or what the tensors tell too.
UNREAD = ("task_type", "base_model_name_or_path", "target_modules", "exclude_modules", "layers_to_transform",
          "layers_pattern", "fan_in_fan_out", "inference_mode", "auto_mapping", "peft_version", "revision",
          "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "megatron_config",
          "megatron_core", "qalora_group_size", "runtime_config")
READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "method", "heads", "tasks", "init_lora_weights",
        "rank_pattern", "alpha_pattern", "bias")


def save_adapter(model, folder):
    """Write the adapters of a model to `folder`, as adapter_config.json and adapter_model.safetensors.

    LoRA adapters (A [r, d_in], B [d_out, r]) are files of PEFT, scaling included (`r`, `lora_alpha`, and `use_rslora`
    for arXiv 2312.03732). The model may be compiled. ValueError without adapters, OSError where they cannot be written.
    """
    model = unwrap(model)
    adapters = find_adapters(model)
    if not adapters or not hasattr(model, "adapter_config"):
        raise ValueError("the model has no adapters to save that add_adapters put in")
    config, first = model.adapter_config, next(iter(adapters.values()))
    description = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None),
        "r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout or 0.0,
        "use_rslora": first.rank_stabilized, "target_modules": list(map(plain_name, adapters)), "bias": "none",
        "fan_in_fan_out": not isinstance(first.base, torch.nn.Linear), "inference_mode": True,
    }
    if config.method != "lora":
        on_z = first.head_dropout.p if isinstance(first, MultiHeadLoRALinear) else 0.0
        description |= {"peft_type": MULTIHEAD, "method": config.method, "heads": config.heads,
                        "lora_dropout": first.dropout.p or on_z}
    if "layer" in LAYERS[config.method]:
        description |= {"peft_type": GALLERY, "tasks": list(config.tasks)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", description)
    tensors = {file_key(name): tensor.contiguous().cpu() for name, tensor in adapter_tensors(model).items()}
    content = save(tensors, {"format": "pt"} | ({BASE: of_base(model)} if told_apart(model) else {}))
    length = int.from_bytes(content[:8], "little")  # of the header, whose two entries come in no fixed order
    header = json.loads(content[8:8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    header = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
    write_file(folder / "adapter_model.safetensors", content[:8] + header + content[8 + length:])


def load_adapter(model, folder):
    """Add the adapters that `save_adapter` wrote (or PEFT, for LoRA, arXiv 2106.09685) to a model, in place.

    Returns {layer name: adapter}; a layer W [d_out, d_in] has one as in `add_adapters`. Raises FileNotFoundError if a
    file is missing, and ValueError, before the model is changed, for another kind of adapter, values of a wrong type or
    size, for options of PEFT's that mean something which is not here, and for tensors that are missing, too many, of
    another shape or not finite. Warns if the adapter was trained on other base weights. No file can run code.
    """
    model = unwrap(model)
    if find_adapters(model):
        raise ValueError("the model already has adapters; remove_adapters(model) takes them out")
    folder = Path(folder)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder} is not an adapter folder: it has no {file}")
    try:
        description = read_json(folder / "adapter_config.json")
        config = read_description(description)
        tensors, base = read_tensors(folder / "adapter_model.safetensors", config, description, model)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{folder} is not an adapter that can be loaded: {str(error):.400}") from error
    if base is not None and told_apart(model) and base != of_base(model):
        warnings.warn(f"the adapter in {folder} was trained on other base weights than this model has, so it may do "
                      "anything here", stacklevel=2)
    adapters = add_adapters(model, config)
    with torch.no_grad():
        for name, tensor in adapter_tensors(model).items():
            tensor.copy_(tensors[file_key(name)])
    return adapters


def read_description(description):
    """The AdapterConfig, but for its targets, in the dict of an adapter_config.json; what is not read is not used."""
    kind = description.get("peft_type")
    if kind not in ("LORA", MULTIHEAD, GALLERY):
        raise ValueError(f"its type is {kind!s:.60}, not LoRA or an adapter of this package")
    unsupported = [f"{key:.60}" for key, value in description.items() if value and key not in READ + UNREAD]
    if description.get("init_lora_weights") not in INITS:
        unsupported += ["init_lora_weights"]
    if description.get("bias") not in (None, "none"):
        unsupported += ["bias"]
    if unsupported:
        raise ValueError(f"it uses {', '.join(unsupported[:5])}, which this package does not have")

    def number(name, low, high, default=None, kinds=(int, float)):
        value = default if description.get(name) is None else description[name]
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            raise ValueError(f"its {name} is {value!r:.60}, not a{' whole' if kinds is int else ''} number from {low} "
                             f"to {high}")
        return value

    method, stabilized = "lora" if kind == "LORA" else description.get("method"), description.get("use_rslora") or False
    find_method(method)
    if not isinstance(method, str) or method not in LAYERS or (method == "lora") != (kind == "LORA"):
        raise ValueError(f"its method {method!r:.60} is none of its type's; one in a file of yours is known once "
                         "tinylora_mtl.run.methods.typed_method(path) has read it")
    tasks = description.get("tasks") or []
    if not isinstance(tasks, list) or len(tasks) > 1000 or not all(isinstance(name, str) for name in tasks):
        raise ValueError(f"its tasks are {tasks!r:.60}, not a list of names")
    if not isinstance(stabilized, bool):
        raise ValueError(f"its use_rslora is {stabilized!r:.60}, not true or false")
    return AdapterConfig(method, number("r", 1, 4096, 8, int), number("lora_alpha", 0, 10 ** 6, 8),  # PEFT's defaults
                         number("lora_dropout", 0, 0.999, 0.0), number("heads", 1, 1024, 1, int),
                         tasks=tuple(tasks), rank_stabilized=stabilized)


def read_tensors(file, config, description, model):
    """({key: tensor} of an adapter's file, the hash of its base or None); fills in what the config lacks.

    Shapes are compared before any tensor is read.
    """
    with safe_open(file, "pt") as stored:
        shapes = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}
        linear = {plain_name(name): name for name in linear_layers(model)[0]}
        layers = sorted({key.removeprefix(PREFIX).rsplit(".lora_A", 1)[0] for key in shapes if ".lora_A" in key})
        for name in layers or ["?"]:
            if name not in linear:
                raise ValueError(f"it is for another model: there is no layer {name:.100} that can have it")
        config.targets = tuple(linear[name] for name in layers)
        read_patterns(config, description, layers, shapes)
        wanted = {}
        for name in target_names(model, config.targets):
            base = torch.nn.Linear(*linear_shape(model.get_submodule(name)), device="meta")  # shapes, no memory
            wanted |= {file_key(f"{name}.{part}"): tuple(tensor.shape) for part, tensor
                       in make_adapter(base, config).state_dict().items() if not part.startswith("base.")}
        for key in [key for key in shapes if key not in wanted and is_copy(stored, key, model)]:
            del shapes[key]  # PEFT adds the base weight of an output head that is adapted
        wrong = [f"{key} is missing" for key in wanted if key not in shapes]
        wrong += [f"{key:.100} is not known" for key in shapes if key not in wanted]
        wrong += [f"{key} has shape {list(shapes[key])}, not {list(shape)}" for key, shape in wanted.items()
                  if key in shapes and shapes[key] != shape]
        if wrong:
            raise ValueError(f"it does not fit this model: {wrong[0]}")
        tensors, base = {key: stored.get_tensor(key) for key in wanted}, (stored.metadata() or {}).get(BASE)
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{key} holds {str(tensor.dtype).removeprefix('torch.')}, not floating-point numbers")
        if not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{key} holds a number that is not finite")
    return tensors, base


def read_patterns(config, description, layers, shapes):
    """Put PEFT's rank_pattern and alpha_pattern into a config; ValueError, with the field's name, if layers differ."""
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(description.get(field) or {}, dict):
            raise ValueError(f"its {field} is {description[field]!r:.60}, not an object")
    if description.get("rank_pattern"):
        ranks = {shapes.get(f"{PREFIX}{name}.lora_A.weight", (0,))[0] for name in layers}
        if len(ranks) > 1 or not 1 <= max(ranks) <= 4096:
            raise ValueError(f"its rank_pattern gives its layers the ranks {sorted(ranks)}, and here all have the same")
        config.rank, = ranks
    pattern = description.get("alpha_pattern") or {}
    for key, alpha in pattern.items():
        if not re.fullmatch(r"[\w.]+", key) or type(alpha) not in (int, float) or not 0 <= alpha <= 10 ** 6:
            raise ValueError(f"its alpha_pattern has an entry that is not read here: {key!r:.60}: {alpha!r:.60}")
    alphas = {next((alpha for key, alpha in pattern.items() if re.fullmatch(rf"(.*\.)?{key}", name)), config.alpha)
              for name in layers}  # as PEFT has it: a dot is any character
    if len(alphas) > 1:
        raise ValueError(f"its alpha_pattern gives its layers the alphas {sorted(alphas)}, and here all have the same")
    config.alpha, = alphas


def is_copy(stored, key, model):
    """Whether a key of a file holds what the model has under its name, to the precision of bfloat16."""
    own = model.state_dict().get(key.removeprefix(PREFIX).replace(".base_layer.", "."))
    if own is None or tuple(stored.get_slice(key).get_shape()) != tuple(own.shape):
        return False
    return torch.equal(stored.get_tensor(key).to(torch.bfloat16), own.to("cpu", torch.bfloat16))


def told_apart(model):
    """Whether `of_base` tells the base: weights that were rounded to float16 have another hash than in other types."""
    return getattr(model, "dtype", None) != torch.float16


def adapter_tensors(model):
    """{name: tensor}, detached, of all that the adapters are: what trains (`adapter_parameters`), and their buffers."""
    return {f"{layer}.{name}": tensor for layer, adapter in find_adapters(model).items()
            for name, tensor in adapter.state_dict().items() if not name.startswith("base.")}


def file_key(name):
    """The key in a PEFT file of a tensor of `adapter_tensors`."""
    return PREFIX + plain_name(name if name.endswith(".weight") else f"{name}.weight")
