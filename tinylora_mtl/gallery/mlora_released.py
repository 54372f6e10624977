"""M-LoRA with the start of R-LoRA's released code: `rlora_released.py` without its router.

Changes from M-LoRA: the start, as it is there. Source: arXiv 2508.05078 for the heads without a router.
"""

from . import rlora_released

LR = 2e-3


class Layer(rlora_released.Layer):
    """As there, but the heads are added up."""

    routed = False
