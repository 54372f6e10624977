"""How alike the heads of a multi-head layer are: the figure of R-LoRA's paper."""

import math

import torch

from ..multihead import MultiHeadLoRALinear


def cosines(vectors):
    """The cosine of every pair of rows of [n, d], in float32 -> [n, n]; nan for a row of zeros."""
    unit = vectors.float() / vectors.float().norm(dim=1, keepdim=True)
    return unit @ unit.T


def mean_of_pairs(matrix):
    """The mean of a symmetric [n, n] off its diagonal: over all pairs i < j."""
    return (matrix.sum() - matrix.diagonal().sum()) / (len(matrix) * (len(matrix) - 1))


@torch.no_grad()
def head_cosines(model):
    """{"head_cosine": [the mean cosine between vec(B_i) and vec(B_j) over all pairs, for each layer]}, for the log.

    null for a layer with a head of zeros; {} for a model without several heads. R-LoRA starts at -1/(N-1): centred
    heads have Σ_{i≠j} B_i·B_j = -Σ_i B_i·B_i, exactly, and their lengths are nearly equal.
    """
    layers = [module.heads for module in model.modules() if isinstance(module, MultiHeadLoRALinear)]
    means = [mean_of_pairs(cosines(heads.flatten(1))).item() for heads in layers if len(heads) > 1]
    return {"head_cosine": [None if math.isnan(mean) else round(mean, 4) for mean in means]} if means else {}
