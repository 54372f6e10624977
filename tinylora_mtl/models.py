"""The model and its tokenizer: the embedded one, or a folder in Hugging Face format."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

MINI = Path(__file__).parent / "assets" / "mini"


def load_model(name, device="auto"):
    """(model, tokenizer, device) for "mini", the embedded model, or a local folder in Hugging Face format.

    device: a torch device, or "auto": CUDA, then Apple's MPS, then the CPU. Raises ValueError for what is not there.
    """
    folder = MINI if name == "mini" else Path(name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"unknown model {name!r}; there are: mini, or a local folder in Hugging Face format")
    device = pick_device(device)
    logging.disable_progress_bar()  # loading is too quick for a bar of its own
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what is amiss is said below, in a line
    options = {"local_files_only": True, "trust_remote_code": False}  # code that a model brings along is never run
    try:
        model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except (ValueError, RuntimeError, SafetensorError, KeyError, TypeError) as error:  # a spoiled or foreign file
        raise ValueError(f"the model in {name} cannot be loaded: {str(error):.300}") from error
    finally:
        logging.set_verbosity(verbosity)
    if found["missing_keys"]:
        raise ValueError(f"the model in {name} lacks weights, {sorted(found['missing_keys'])[0]} for one: random ones "
                         "would stand in for them; give the whole model")
    model.to(device)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer in {folder} has no end token, so no answer would ever end")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do
    return model, tokenizer, device


def pick_device(device):
    """The torch device of that name; "auto" takes the best there is. Raises ValueError if it is not to be had."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros((), device=device).item()  # `meta` has tensors, but no numbers in them
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:  # torch says so in one or the other way, by device
        raise ValueError(f"device {device!r} is not to be had here; there are: auto, cpu, cuda, mps") from error
