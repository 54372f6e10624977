"""The model and its tokenizer: the embedded one, a folder in Hugging Face format, or a name on the Hugging Face Hub."""

import os
import platform
from pathlib import Path
from pickle import UnpicklingError

import torch
import transformers
from huggingface_hub import HfApi
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ..adapters import adapter_parameters
from ..evaluate import check_finite
from ..loss import forward, label_loss
from ..meta import fork_rng

MINI = Path(__file__).parents[1] / "assets" / "mini"
TOKENIZER_FILES = ("tokenizer.json", "tekken.json", "vocab*", "*.model", "*.tiktoken", "*.spm")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(name, device="auto", dtype="auto"):
    """(model, tokenizer, device) of a causal language model, in evaluation mode.

    name: "mini", the embedded model; a local folder in Hugging Face format; or a Hub name such as
        "HuggingFaceTB/SmolLM2-135M", of which a copy in the Hub's local cache is used without asking the network.
    device: a torch device, or "auto": CUDA, then Apple's MPS, then the CPU.
    dtype: of the frozen weights (adapters are float32 always): a key of DTYPES, or "auto": bfloat16 for a model that
        was saved in half precision, on a GPU that computes in bfloat16; float32 everywhere else.

    Code that a model brings along is never run. Raises ValueError for what is not there or cannot be loaded.
    """
    source, device = MINI if name == "mini" else Path(name), pick_device(device)
    if source.is_dir():
        if not (source / "config.json").is_file():
            raise ValueError(f"{name} is not a model in Hugging Face format: the folder has no config.json")
        if not any(found for pattern in TOKENIZER_FILES for found in source.glob(pattern)):  # some make up an empty one
            raise ValueError(f"the folder {name} has no tokenizer (tokenizer.json, say); save that of the model that "
                             "it was made from there too: AutoTokenizer.from_pretrained(...).save_pretrained(folder)")
        if (source / "adapter_config.json").is_file():  # which transformers would put in, if peft is there
            raise ValueError(f"the folder {name} has an adapter beside the model; keep them in folders of their own, "
                             "and give them as --model and --adapter")
        return load(source, device, dtype, local_files_only=True)
    try:
        return load(name, device, dtype, local_files_only=True)
    except OSError:
        pass  # not in the Hub's local cache
    try:  # asked once, because loading itself would try for most of a minute before it gave up
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # of several kinds, by what is wrong and by the version of huggingface_hub
        raise ValueError(f"unknown model {name!r}: there is no such folder, and the Hugging Face Hub does not give it "
                         f"({str(error).strip() or type(error).__name__}); there are: mini, the path of a folder in "
                         "Hugging Face format (no network needed), or a Hub name") from error
    return load(name, device, dtype, local_files_only=False)


def load(source, device, dtype, local_files_only):
    """(model, tokenizer, device) from a folder or a Hub name."""
    logging.disable_progress_bar()  # loading is too quick for a bar of its own
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is amiss is said below, in a line
    options = {"local_files_only": local_files_only, "trust_remote_code": False}  # code it brings along is never run
    try:
        dtype = pick_dtype(dtype, AutoConfig.from_pretrained(source, **options).dtype, device)
        model, found = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, output_loading_info=True, **options,
            adapter_kwargs={"local_files_only": local_files_only})  # for peft, if it is there
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    except (ValueError, RuntimeError, SafetensorError, UnpicklingError, KeyError, TypeError, ImportError) as error:
        # a spoiled or foreign file, or one that needs a library which is not here
        raise ValueError(f"the model in {source} cannot be loaded: {str(error):.300}") from error
    finally:
        logging.set_verbosity(verbosity)
    if any(".base.weight" in key for key in found["unexpected_keys"]):
        raise ValueError(f"the model in {source} was saved with adapters in it, so nothing can load it; merge_adapters("
                         "model) or remove_adapters(model) before save_pretrained leaves a plain one")
    if found["missing_keys"]:
        raise ValueError(f"the model in {source} lacks weights, {sorted(found['missing_keys'])[0]} for one: random "
                         "ones would stand in for them; give the whole model")
    model.to(device).eval()
    check_causal(model, source)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {source} has no end token, so no answer would ever end")
    if tokenizer.pad_token is None or tokenizer.pad_token_id >= model.get_input_embeddings().weight.shape[0]:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do that the model has
    return model, tokenizer, device


@torch.no_grad()
def check_causal(model, source):
    """ValueError for a model whose logits after some tokens change with the tokens behind them, or with padding before.

    FloatingPointError for logits that are not finite.
    """
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [9, 9, 9, 9, 1, 2, 3, 4]])
    ids %= model.get_input_embeddings().weight.shape[0]
    mask = torch.tensor([[1] * 8, [0] * 4 + [1] * 4])
    logits = forward(model, ids.to(model.device), mask.to(model.device), 8).logits.float()  # [2, 8, vocabulary]
    check_finite(None, logits)
    one, other = logits[0, 3], logits[1, 7]  # after 1, 2, 3, 4
    own = model(input_ids=ids[:1].to(model.device)).logits[0, 3].float()  # with positions that the model counts itself
    rounding = 1e-3 if model.dtype == torch.float32 else 0.1
    for change, logits in {
            "with the tokens that follow (so in training it would see the answers) or with padding before them": other,
            "with the positions that it is given, which it counts otherwise by itself": own}.items():
        if (one - logits).abs().max() > rounding * one.abs().max():
            raise ValueError(f"the model in {source} ({type(model).__name__}) cannot be used here: what it says after "
                             f"some tokens changes {change}")


def compile_model(model, batch):
    """The model as compiled by torch, tried on a batch, forward and backward. Where that fails, the model itself, and a
    line says why."""
    compiled = torch.compile(model, dynamic=True)  # batches differ in length
    try:
        with fork_rng(model):
            torch.autograd.grad(label_loss(compiled, batch), list(adapter_parameters(model).values()))
        return compiled
    except Exception as error:  # of many kinds, by what is missing
        first, *more = f"{type(error).__name__}: {error}".splitlines()
        reason = " ".join([first, *more[:1]]) if first.endswith(":") else first  # the cause is in the line after it
        print(f"torch.compile does not work here ({reason:.200}): going on without it")
        return model


def pick_device(device):
    """The torch device of that name; "auto" takes the best there is. Raises ValueError if it is not to be had.

    Of several GPUs, each of the processes that torchrun started takes its own.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if device == "cuda" and "LOCAL_RANK" in os.environ:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # from now on "cuda" is this one
        torch.zeros((), device=device).item()  # `meta` has tensors, but no numbers in them
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:  # torch says so in one or the other way, by device
        raise ValueError(f"device {device!r} is not to be had here; there are: auto, cpu, cuda, mps") from error


def machine_name(device):
    """What a torch device is, and what computes on it: processor or GPU, threads, versions."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        names[0] if names else platform.processor() or platform.machine())
    threads = torch.get_num_threads()
    return (f"{name}, {threads} thread{'s' * (threads > 1)}, torch {torch.__version__}, transformers "
            f"{transformers.__version__}")


def pick_dtype(dtype, saved, device):
    """The torch dtype of that name for a model that was saved as `saved`; see `load_model` for "auto"."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; there are: auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    half = saved in (torch.bfloat16, torch.float16)
    gpu = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if half and gpu else torch.float32


def pick_length(model, max_length):
    """The longest sample in tokens: `max_length`; if that is None, 512 or what the model has positions for.

    Raises ValueError for a length of which the model cannot tell all positions apart."""
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or float("inf")
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):  # beyond, a sample's numbers depend on its batch's longest one
        positions = min(positions, rope.get("original_max_position_embeddings") or getattr(
            config, "original_max_position_embeddings", None) or positions)
    if max_length is None:
        return min(512, positions)
    if max_length > positions:
        raise ValueError(f"--max-length {max_length} is more than the {positions} positions that the model has")
    return max_length
