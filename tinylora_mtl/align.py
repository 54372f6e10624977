r"""Align-LoRA: a plain LoRA and a loss that draws the tasks' low-rank features together.

Changes from LoRA: the layers are the same; the loss becomes

    L = L_task + λ · mean over adapted layers of mean over task pairs of D(Z_t, Z_t'),    Z_t = { A x }

with x over the real tokens of the samples of task t in the step. D is a symmetric KL divergence between diagonal
Gaussians (`kl_alignment`) or a maximum mean discrepancy (`mmd.py`).

Source: "Align, Don't Divide", arXiv 2508.05078, equations 4 to 6, but that equation 5 sums over the pairs: the mean is
its code's, and so is the default λ. The paper does not say over what the statistics are taken; here it is all real
tokens of a task, never padding. A x is taken as the layer computes it, that is after dropout on x.
"""

from contextlib import contextmanager

import torch

from .adapters import find_adapters
from .loss import to_device
from .mmd import mmd_alignment

VARIANCE_EPS = 1e-5  # added to each variance, so that a feature which happens not to vary cannot divide by zero


@contextmanager
def collect_features(model, part="lora_A"):
    """Within the block, every forward pass of the model leaves z = A x of each adapted layer in the yielded dict.

    Yields {layer name: z [batch, length, r]}, or [batch · length, r] where a layer sees its tokens in one row, or more
    rows where it is called again; with part="router", the router's scores, N instead of r. Leave the block before
    `backward`: with gradient checkpointing the layers run once more there, and those outputs must not be counted.
    """
    features, handles = {}, []
    for name, adapter in find_adapters(model).items():
        if getattr(adapter, part, None) is not None:
            def keep(_, inputs, output, name=name):
                features[name] = torch.cat([features[name], output]) if name in features else output
            handles.append(getattr(adapter, part).register_forward_hook(keep))
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def alignment_loss(features, batch, kind="kl"):
    """Mean over the adapted layers of the alignment of their features: the term that λ multiplies.

    features: what `collect_features` left, {layer: z [batch, length, r]}; batch: `attention_mask` [batch, length] says
    which tokens are real, `task_ids` [batch] whose they are; kind: "kl" or "mmd" -> a scalar.
    Raises ValueError if the features have no gradient while gradients are on (the term would train nothing), and for a
    layer that does not see every token once (`of_every_token`).
    """
    return alignment(*real_tokens(features, batch), kind)


def real_tokens(features, batch):
    """z [n, layers, r] at the n real tokens of a batch, and the task id of each of them, [n] on the CPU: there the
    tokens are found, as a mask on the device would make it tell their number first. ValueError as `alignment_loss`."""
    wrong = [name for name, z in features.items() if not of_every_token(name, z, batch)]
    if wrong:
        raise ValueError(f"{wrong[0]} does not see every token once (an expert, the output head, a layer that is used "
                         "twice), so its features cannot be aligned; --targets names the layers to adapt")
    if torch.is_grad_enabled() and not all(z.requires_grad for z in features.values()):
        raise ValueError("the features have no gradient, so the alignment term would do nothing; use gradient "
                         "checkpointing with use_reentrant=False")
    real, owner = tokens_and_owners(batch["attention_mask"], batch["task_ids"])
    real = to_device(real, next(iter(features.values())).device)
    return torch.stack([z.flatten(0, -2).index_select(0, real) for z in features.values()], dim=1), owner


def tokens_and_owners(attention_mask, task_ids):
    """[ex5] The n real tokens (1) of a mask [batch, length], among padding (0), and the task id of each of them.

    task_ids [batch], of the rows -> two int64 tensors [n]: the places in `attention_mask.flatten()`, rising, and whose.
    """
    real = attention_mask.flatten().nonzero()[:, 0]  # [n], of batch · length
    return real, task_ids.repeat_interleave(attention_mask.shape[1])[real]


def of_every_token(name, z, batch):
    """Whether z [batch, length, r] or [batch · length, r] has a row for every token of a batch. An expert's has not."""
    shape = batch["attention_mask"].shape
    return z.shape[:-1] in (shape, (shape.numel(),)) and "experts" not in name.split(".")


def alignment(z, owner, kind):
    """`alignment_loss` of features z [n, layers, r] without padding; token i is of task owner[i]."""
    sizes = owner.unique(return_counts=True)[1].tolist()
    groups = z.index_select(0, to_device(owner.argsort(stable=True), z.device)).split(sizes)  # [n_t, layers, r] a task
    return {"kl": kl_alignment, "mmd": mmd_alignment}[kind](groups)


def kl_alignment(groups):
    """Mean symmetric KL divergence between the tasks' features, over all pairs of tasks, in O(T).

    groups: one [n_t, r] or [n_t, layers, r] tensor per task, n_t may differ -> a scalar, the mean over the layers. Each
    task is a diagonal Gaussian (μ_t, v_t); D = ½ (KL(t‖t') + KL(t'‖t)), summed over the r features. A task with fewer
    than two tokens has no variance and is left out; with fewer than two tasks left, the result and its gradient are 0.
    """
    kept = [group.float() for group in groups if len(group) > 1]
    if len(kept) < 2:
        return sum((group.sum() for group in groups), torch.zeros(())) * 0.0
    mean = torch.stack([group.mean(0) for group in kept])  # [T, layers, r]
    variance = torch.stack([group.var(0, correction=0) for group in kept]) + VARIANCE_EPS  # [T, layers, r]
    pairs, layers = len(kept) * (len(kept) - 1) / 2, kept[0][0, ..., 0].numel()  # 1 layer for [n_t, r]
    return kl_all_pairs(mean.flatten(1), variance.flatten(1)) / (pairs * layers)


def kl_all_pairs(mean, variance):
    """[ex6] Σ_{i<j} D_ij of T diagonal Gaussians, in O(T): no loop over the pairs, and no tensor of their number.

    mean, variance [T, r] -> a scalar. D_ij = ½ (KL(i‖j) + KL(j‖i)), summed over the r features; for each of them
        KL(i‖j) = ½ [ log(v_j / v_i) + (v_i + (μ_i - μ_j)²) / v_j - 1 ]
    What all μ have in common, feature by feature, costs no digits, however large it is.
    """
    # The logarithms cancel: D_ij = ¼ [ v_i/v_j + v_j/v_i - 2 + (μ_i - μ_j)² (1/v_i + 1/v_j) ]; sums over i pulled
    # inside, Σ_{i<j} D_ij = ¼ [ (Σ v)(Σ 1/v) - T² + Σ_j (M2 - 2 μ_j M1 + T μ_j²) / v_j ] with M1 = Σ μ, M2 = Σ μ².
    count, mean = len(mean), mean - mean.mean(0)  # T, and μ with M1 = 0
    spread = variance.sum(0) * (1 / variance).sum(0) - count ** 2  # [r]
    shift = ((mean.square().sum(0) + count * mean.square()) / variance).sum(0)  # Σ_j (M2 + T μ_j²) / v_j, [r]
    return (spread + shift).sum() / 4
