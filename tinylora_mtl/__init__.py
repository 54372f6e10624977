"""tinylora_mtl: multi-task LoRA to read and to run. LoRA, HydraLoRA, R-LoRA, M-LoRA, Align-LoRA and MeTA-LoRA.

Start reading at `train.py`, or at `lora.py` for the mathematics; start running with `python -m tinylora_mtl.train`.
"""

from .adapters import (AdapterConfig, adapter_parameters, add_adapters, load_adapter, merge_adapters, remove_adapters,
                       save_adapter)
from .align import kl_alignment, mmd_alignment
from .lora import LoRALinear
from .meta import meta_gradients
from .multihead import MultiHeadLoRALinear

__version__ = "0.1.0"
__all__ = ["AdapterConfig", "LoRALinear", "MultiHeadLoRALinear", "adapter_parameters", "add_adapters",
           "kl_alignment", "load_adapter", "merge_adapters", "meta_gradients", "mmd_alignment", "remove_adapters",
           "save_adapter"]
