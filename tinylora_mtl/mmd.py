r"""The other alignment loss of Align-LoRA: a maximum mean discrepancy between the tasks' features, unbiased.

    D(Z, Z') = mean_{a≠b} k(z_a, z_b) + mean_{a≠b} k(z'_a, z'_b) - 2 mean_{a,b} k(z_a, z'_b)
    k(z, z') = Σ_σ exp(-‖z - z'‖² / 2σ)

Sources: arXiv 2508.05078; the estimator without its diagonal is Gretton et al., JMLR 2012, lemma 6.
"""

import torch

from .loss import to_device

MMD_BANDWIDTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 5, 10, 15, 20, 25, 30, 35, 100, 1e3, 1e4, 1e5, 1e6)
MMD_TOKENS = 64  # tokens per task that the kernels see: their cost grows with the square of this


def mmd_alignment(groups):
    """Mean squared maximum mean discrepancy between the tasks' features, over all pairs of tasks.

    groups: one [n_t, r] or [n_t, layers, r] tensor per task, n_t may differ -> a scalar, the mean over the layers; it
    can be slightly negative. Of more than MMD_TOKENS tokens of a task a random subset is used, the same in all layers.
    A task with fewer than two tokens is left out; with fewer than two tasks left, the result is 0, its gradient 0.
    """
    kept = [subset(group.float()) for group in groups if len(group) > 1]
    if len(kept) < 2:
        return sum((group.sum() for group in groups), torch.zeros(())) * 0.0
    z = torch.cat(kept)  # [n, r] or [n, layers, r], n over all tasks
    a, b = torch.triu_indices(len(z), len(z), 1, device=z.device)  # every pair of tokens once, in pdist's order
    weights = pair_weights([len(group) for group in kept], a, b)  # [token pairs]
    total = 0.0
    for layer in z.view(len(z), -1, z.shape[-1]).unbind(1):  # [n, r]
        # `pdist` is five times as fast as taking differences, but Apple's GPUs do not have it
        squared = (layer[a] - layer[b]).square().sum(-1) if z.device.type == "mps" else torch.pdist(layer).square()
        total = total + weights @ GaussianKernels.apply(squared)  # squared [token pairs]
    return total / z[0, ..., 0].numel()  # the mean of the layers


def subset(group):
    """[n, ...] -> at most MMD_TOKENS rows of it, drawn at random."""
    return group if len(group) <= MMD_TOKENS else group[torch.randperm(len(group), device=group.device)[:MMD_TOKENS]]


def pair_weights(sizes, a, b):
    """How much the kernel of tokens a and b counts in the mean of D over all pairs of tasks; all [token pairs].

    Of T tasks, each is in T - 1 of the T (T-1) / 2 pairs, so mean D = 2/T Σ_t within_t - 4/(T (T-1)) Σ_{t<u} between_tu
    where within_t, a mean over a≠b, has each pair of the n_t tokens twice.
    """
    count = torch.tensor(sizes)  # [T]
    task = to_device(torch.arange(len(sizes)).repeat_interleave(count), a.device)  # [n]
    count = to_device(count, a.device)
    within = 2 / len(sizes) * 2 / (count * (count - 1))  # [T]
    between = 4 / (len(sizes) * (len(sizes) - 1))
    of_a, of_b = task[a], task[b]
    return torch.where(of_a == of_b, within[of_a], -between / (count[of_a] * count[of_b]))


class GaussianKernels(torch.autograd.Function):
    """k(d) = Σ_σ exp(-d / 2σ) of each squared distance d, and its derivative -Σ_σ exp(-d / 2σ) / 2σ in the same loop.

    The same as writing the sum out, but autograd would keep two tensors for each of the 19 kernels and go over them
    again. Exponents stop at -87: e^-87 is as good as 0, and what is smaller, float32 computes many times slower.
    """

    @staticmethod
    def forward(ctx, d):
        k, slope, kernel = torch.zeros_like(d), torch.zeros_like(d), torch.empty_like(d)
        for sigma in MMD_BANDWIDTHS:
            torch.mul(d, -0.5 / sigma, out=kernel).clamp_(min=-87).exp_()
            k += kernel
            slope.sub_(kernel, alpha=0.5 / sigma)
        ctx.save_for_backward(slope)
        return k

    @staticmethod
    def backward(ctx, gradient):
        slope, = ctx.saved_tensors
        return gradient * slope
