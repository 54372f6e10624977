r"""Align-LoRA: a plain LoRA and a loss that draws the tasks' low-rank features together.

Changes from LoRA: the layers are the same; the loss becomes

    L = L_task + λ · mean over adapted layers of mean over task pairs of D(Z_t, Z_t'),    Z_t = { A x }

with x over the real tokens of the samples of task t in the step. D is a symmetric KL divergence between diagonal
Gaussians (`kl_alignment`) or a maximum mean discrepancy (`mmd_alignment`).

Source: "Align, Don't Divide", arXiv 2508.05078, equations 4 to 6. The paper does not say over what the statistics are
taken; here it is all real tokens of a task, never padding, and tasks are told apart by `task_ids`. A x is taken as
the layer computes it, that is after dropout on x.
"""

from contextlib import contextmanager

import torch

from .batching import label_logits, random_aside, send
from .run.distributed import gather_features, same_random_numbers

MMD_BANDWIDTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 5, 10, 15, 20, 25, 30, 35, 100, 1e3, 1e4, 1e5, 1e6)
MMD_TOKENS = 64  # tokens per task that the kernels see: their cost grows with the square of this
VARIANCE_FLOOR = 1e-5  # added to each variance, so that a feature which happens not to vary cannot divide by zero


def kl_alignment(groups):
    """Mean symmetric KL divergence between the tasks' features, over all pairs of tasks, in O(T).

    groups: one [n_t, r] tensor per task, n_t may differ -> a scalar. Each task is a diagonal Gaussian (μ_t, v_t);
    D = ½ (KL(t‖t') + KL(t'‖t)), summed over the r features. A task with fewer than two tokens has no variance and is
    left out; with fewer than two tasks left, the result is 0 (and still has a gradient, which is 0). Groups of shape
    [n_t, L, r] hold the features of L layers, and the result is the mean over the layers. Raises nothing.
    Source: arXiv 2508.05078, equations 4 to 6.
    """
    kept = [group for group in groups if len(group) > 1]
    if len(kept) < 2:
        return _zero(groups)
    layers = kept[0][0, ..., 0].numel()  # [n_t, L, r] -> L, [n_t, r] -> 1
    mean, variance = moments(torch.cat(kept).flatten(1).float(), [len(group) for group in kept])  # [T, L·r]
    return kl_all_pairs(mean, variance + VARIANCE_FLOOR) / layers / (len(kept) * (len(kept) - 1) / 2)


def moments(z, sizes):
    """The mean and the variance of each task, [T, d] both; z [n, d] holds the tasks one after another.

    Sums by index: a loop over the tasks would cost more than their tokens when there are many.
    """
    count = torch.tensor(sizes)  # [T]
    task = send(torch.arange(len(sizes)).repeat_interleave(count), z.device)  # [n]
    count = send(count, z.device)

    def mean_of(values):  # [n, d] -> [T, d]
        return values.new_zeros(len(sizes), z.shape[1]).index_add(0, task, values) / count[:, None]
    mean = mean_of(z)
    deviation = z - mean.detach().index_select(0, task)  # no gradient through this mean: deviations from it sum to 0
    return mean, mean_of(deviation.square())


def symmetric_kl(mean, variance, other_mean, other_variance):
    """[ex5] The symmetric KL divergence ½ (KL(t‖t') + KL(t'‖t)) of two diagonal Gaussians, summed over the features.

    All four [r] -> a scalar. Per feature, with means μ and μ' and variances v and v',
        KL(t‖t') = ½ [ log(v'/v) + (v + (μ - μ')²) / v' - 1 ]
    and in the sum of both ways the logarithms cancel: D = ¼ [ v/v' + v'/v - 2 + (μ - μ')² (1/v + 1/v') ].
    """
    ratio = variance / other_variance + other_variance / variance - 2  # [r]
    shift = (mean - other_mean).square() * (1 / variance + 1 / other_variance)  # [r]
    return (ratio + shift).sum() / 4


def kl_all_pairs(mean, variance):
    """[ex6] Σ_{i<j} D_ij between diagonal Gaussians, symmetric and summed over features, without a loop over pairs.

    mean, variance [T, r] -> a scalar. Per feature, with M1 = Σ μ and M2 = Σ μ²,
        Σ_{i<j} D_ij = ¼ [ (Σ v)(Σ 1/v) - T² + Σ_j (M2 - 2 μ_j M1 + T μ_j²) / v_j ]
    which is D_ij = ¼ [ v_i/v_j + v_j/v_i - 2 + (μ_i - μ_j)² (1/v_i + 1/v_j) ] with the sums over i pulled
    inside. Only differences of the μ count; taken as they are, large ones would lose their digits.
    """
    count = len(mean)
    mean = mean - mean.mean(0)
    m1, m2 = mean.sum(0), mean.square().sum(0)  # [r]; m1 is 0 now, but for rounding, and kept as in the equation
    spread = variance.sum(0) * (1 / variance).sum(0) - count ** 2  # [r]
    shift = ((m2 - 2 * mean * m1 + count * mean.square()) / variance).sum(0)  # [r]
    return (spread + shift).sum() / 4


def mmd_alignment(groups, bandwidths=MMD_BANDWIDTHS):
    """Mean squared maximum mean discrepancy between the tasks' features, over all pairs of tasks, unbiased.

    groups: one [n_t, r] tensor per task, n_t may differ -> a scalar, which can be slightly negative.
        D = mean_{a≠b} k(z_a, z_b) + mean_{a≠b} k(z'_a, z'_b) - 2 mean_{a,b} k(z_a, z'_b)
        k(z, z') = Σ_σ exp(-‖z - z'‖² / 2σ)
    Of a task with more than MMD_TOKENS tokens a random subset of that size is used, the same in all layers. Tasks with
    fewer than two tokens are left out, and groups may hold several layers, as in `kl_alignment`. Raises nothing.
    Source: arXiv 2508.05078; the estimator without its diagonal is Gretton et al., JMLR 2012, lemma 6.
    """
    kept = [_subset(group.float()) for group in groups if len(group) > 1]
    if len(kept) < 2:
        return _zero(groups)
    z = torch.cat(kept)  # [n, r] or [n, L, r], n over all tasks
    a, b = torch.triu_indices(len(z), len(z), 1, device=z.device)  # every pair of tokens once, in pdist's order
    weights = mmd_weights([len(group) for group in kept], a, b)
    total = 0.0
    for layer in z.view(len(z), -1, z.shape[-1]).unbind(1):  # [n, r]
        squared = (layer[a] - layer[b]).square().sum(-1) if lacks_pdist(layer) else torch.pdist(layer).square()
        total = total + weights @ GaussianKernels.apply(squared, bandwidths)  # squared [pairs]
    return total / z[0, ..., 0].numel()  # the mean of the L layers


def mmd_weights(sizes, a, b):
    """How much the kernel of tokens a and b, [pairs] both, counts in the mean of D over all pairs of tasks -> [pairs].

    Of T tasks, each is in T - 1 of the T (T-1) / 2 pairs, so mean D = 2/T Σ_t within_t - 4/(T (T-1)) Σ_{t<u} between_tu
    where within_t, a mean over a≠b, has each pair of the n_t tokens twice.
    """
    count = torch.tensor(sizes)
    task = send(torch.arange(len(sizes)).repeat_interleave(count), a.device)  # [n]
    count = send(count, a.device)
    within, between = 2 / len(sizes) * 2 / (count * (count - 1)), 4 / (len(sizes) * (len(sizes) - 1))
    of_a, of_b = task[a], task[b]
    return torch.where(of_a == of_b, within[of_a], -between / (count[of_a] * count[of_b]))


class GaussianKernels(torch.autograd.Function):
    """k(d) = Σ_σ exp(-d / 2σ) of each squared distance d, and its derivative -Σ_σ exp(-d / 2σ) / 2σ in the same loop.

    The same as writing the sum out, but autograd would keep two tensors for each of the 19 kernels and go over them
    again. Exponents stop at -87: e^-87 is as good as 0, and what is smaller, float32 computes many times slower.
    """

    @staticmethod
    def forward(ctx, d, bandwidths):
        k, slope, kernel = torch.zeros_like(d), torch.zeros_like(d), torch.empty_like(d)
        for sigma in bandwidths:
            torch.mul(d, -0.5 / sigma, out=kernel).clamp_(min=-87).exp_()
            k += kernel
            slope.sub_(kernel, alpha=0.5 / sigma)
        ctx.save_for_backward(slope)
        return k

    @staticmethod
    def backward(ctx, gradient):
        slope, = ctx.saved_tensors
        return gradient * slope, None


ALIGNMENTS = {"kl": kl_alignment, "mmd": mmd_alignment}


class NoGradientError(RuntimeError):
    """The alignment term would train nothing."""


def lacks_pdist(z):
    """Whether torch.pdist, five times as fast as taking differences, has no kernel where z is."""
    return z.device.type == "mps"


def _subset(group):
    return group if len(group) <= MMD_TOKENS else group[torch.randperm(len(group), device=group.device)[:MMD_TOKENS]]


def _zero(groups):
    return sum((group.sum() for group in groups), torch.zeros(())) * 0.0


@contextmanager
def collect_features(model, part="lora_A"):
    """Within the block, every forward pass of the model leaves z = A x of each adapted layer in the yielded dict.

    Yields {layer name: z [batch, length, r]}; with part="router", the router's scores [batch, length, N]. Leave the
    block before `backward`: with gradient checkpointing the layers run once more there, and those outputs must not be
    counted.
    """
    features, handles = {}, []
    for name, module in model.named_modules():
        if getattr(module, part, None) is not None:
            def keep(_, inputs, output, name=name):
                features[name] = output
            handles.append(getattr(module, part).register_forward_hook(keep))
    try:
        yield features
    finally:
        for handle in handles:
            handle.remove()


def real_tokens(features, batch):
    """{layer: z [batch, length, r]} at the real tokens, by `attention_mask` [batch, length] -> {layer: z [n, r]}.

    The tokens are found on the CPU, where the batch is; a mask on the device would make it tell their number first.
    """
    real = batch["attention_mask"].flatten().nonzero()[:, 0]  # [n], of batch · length
    real = send(real, next(iter(features.values())).device)
    return {name: z.flatten(0, 1).index_select(0, real) for name, z in features.items()}


def owners(batch):
    """The task id of every real token of a batch, [n] on the CPU, in the order of `real_tokens`."""
    return batch["task_ids"][:, None].expand_as(batch["attention_mask"])[batch["attention_mask"].bool()]


def alignment_loss(features, batch, kind="kl"):
    """Mean over the adapted layers of the alignment of their features: the term that λ multiplies.

    features: what `collect_features` left, {layer: z [batch, length, r]}; batch: `attention_mask` [batch, length] says
    which tokens are real, `task_ids` [batch] whose they are; kind: a key of ALIGNMENTS -> a scalar.
    Raises NoGradientError as `require_gradient` does.
    """
    require_gradient(features)
    return alignment_of(real_tokens(features, batch), owners(batch), kind)


def require_gradient(features):
    """NoGradientError if features carry no gradient in training (reentrant gradient checkpointing does that).

    The alignment term would be a number in the log and nothing else.
    """
    if torch.is_grad_enabled() and not all(z.requires_grad for z in features.values()):
        raise NoGradientError("the features have no gradient, so the alignment term would do nothing; "
                              "use gradient checkpointing with use_reentrant=False")


def alignment_of(features, owner, kind):
    """The mean over the layers for features without padding, {layer: z [n, r]}; token i is of task owner[i].

    With several processes, of the features of all: the same number in each, with the gradient of its own features.
    """
    features, owner = gather_features(features, owner)
    z = torch.stack(list(features.values()), dim=1)  # [n, L, r]: all layers at once
    with same_random_numbers(z.device):  # for the tokens that `mmd_alignment` takes
        return ALIGNMENTS[kind](group_by_task(z, owner))


def group_by_task(z, owner):
    """z [n, ...] as a [n_t, ...] tensor for every task that is in owner [n], which is on the CPU."""
    sizes = owner.unique(return_counts=True)[1].tolist()
    return z.index_select(0, send(owner.argsort(stable=True), z.device)).split(sizes)


def alignment_gradients(model, pieces, kind):
    """The alignment loss of a batch that is computed in pieces, and its gradient with respect to each piece's features.

    A first pass, without a graph, collects the features of all pieces, because the statistics are the whole batch's.
    Its random numbers are drawn aside (on CPU and CUDA), so the pass that trains sees the same dropout masks.
    pieces: what `split_batch` made -> (loss, [for each piece {layer name: dL/dZ [n_piece, r], at its real tokens}]).
    """
    seed = int(torch.randint(2 ** 62, ()))  # not drawn aside: MMD is to take other tokens in every step
    collected = []
    with random_aside(model):
        for piece in pieces:
            with torch.no_grad(), collect_features(model) as features:
                label_logits(model, piece)
            collected.append(real_tokens(features, piece))
        whole = {name: torch.cat([part[name] for part in collected]).requires_grad_() for name in collected[0]}
        torch.manual_seed(seed)
        loss = alignment_of(whole, torch.cat([owners(piece) for piece in pieces]), kind)
        gradients = torch.autograd.grad(loss, list(whole.values()))
    sizes = [len(owners(piece)) for piece in pieces]
    by_piece = zip(*(gradient.split(sizes) for gradient in gradients))
    return loss.detach(), [dict(zip(whole, parts)) for parts in by_piece]


def through_features(features, piece, gradients):
    """Σ Z · dL/dZ over the layers, a scalar: its gradient is that of the alignment L through this piece's features.

    features: what `collect_features` left of the piece; gradients: the piece's of `alignment_gradients`. Raises
    NoGradientError as `require_gradient` does.
    """
    require_gradient(features)
    return sum((z * gradients[name]).sum() for name, z in real_tokens(features, piece).items())
