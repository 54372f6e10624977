"""tinylora_mtl: multi-task LoRA to read and to run. LoRA, HydraLoRA, R-LoRA, M-LoRA, Align-LoRA and MeTA-LoRA.

Read `train.py` first, or `lora.py` for the mathematics; run `python -m tinylora_mtl.train`. The files beside this one
are the methods; run/, data/, lab/ and classroom/ are rooms that each say for themselves what they are for.
"""

from .adapters import AdapterConfig, adapter_parameters, add_adapters, merge_adapters, remove_adapters
from .align import kl_alignment
from .lora import LoRALinear
from .meta import meta_gradients
from .mmd import mmd_alignment
from .multihead import MultiHeadLoRALinear
from .run.adapter_files import load_adapter, save_adapter

__version__ = "0.3.0"
__all__ = ["AdapterConfig", "LoRALinear", "MultiHeadLoRALinear", "adapter_parameters", "add_adapters",
           "kl_alignment", "load_adapter", "merge_adapters", "meta_gradients", "mmd_alignment", "remove_adapters",
           "save_adapter"]
