"""The alignment losses against double loops and written-out sums, and their gradient in every way of training."""

import pytest
import torch
from conftest import make_batch, make_llama, randomize_adapters

from tinylora_mtl import AdapterConfig, adapter_parameters, add_adapters, kl_alignment, mmd_alignment
from tinylora_mtl import align as align_module
from tinylora_mtl.align import (MMD_BANDWIDTHS, VARIANCE_FLOOR, GaussianKernels, alignment_loss, alignment_of,
                                collect_features, group_by_task, kl_all_pairs, owners, real_tokens)
from tinylora_mtl.batching import label_loss, split_batch
from tinylora_mtl.run.training import TrainConfig, multitask_step


def groups_of(sizes, r=4, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, r, generator=generator, dtype=torch.float64) * (1 + t) ** 0.5 + shift * t
            for t, n in enumerate(sizes)]


def kl_by_pairs(groups):
    """The double loop over pairs, each KL from torch.distributions."""
    normals = [torch.distributions.Normal(g.float().mean(0), (g.float().var(0, unbiased=False) + VARIANCE_FLOOR).sqrt())
               for g in groups]
    kl = torch.distributions.kl_divergence
    pairs = [(kl(p, q) + kl(q, p)).sum() / 2 for i, p in enumerate(normals) for q in normals[:i]]
    return torch.stack(pairs).mean()


def mmd_by_sums(groups):
    """The unbiased estimator with every kernel value written out."""
    def k(a, b):
        return sum(torch.exp(-((a - b) ** 2).sum() / (2 * sigma)) for sigma in MMD_BANDWIDTHS)

    def within(g):
        return sum(k(g[a], g[b]) for a in range(len(g)) for b in range(len(g)) if a != b) / (len(g) * (len(g) - 1))

    def between(g, h):
        return sum(k(a, b) for a in g for b in h) / (len(g) * len(h))
    pairs = [within(g) + within(h) - 2 * between(g, h) for i, g in enumerate(groups) for h in groups[:i]]
    return sum(pairs) / len(pairs)


@pytest.mark.parametrize("sizes", [(5, 9), (3, 20, 7), (6, 6, 6, 6, 6)])
@pytest.mark.parametrize("shift", [0.0, 3.0, 1000.0])
def test_kl_equals_the_double_loop(sizes, shift):
    torch.testing.assert_close(kl_alignment(groups_of(sizes, shift=shift)), kl_by_pairs(groups_of(sizes, shift=shift)),
                               atol=1e-4, rtol=1e-4)


def test_kl_gradient_equals_the_double_loops():
    ours, theirs = ([g.float().requires_grad_() for g in groups_of((5, 9, 4))] for _ in range(2))
    torch.testing.assert_close(torch.autograd.grad(kl_alignment(ours), ours),
                               torch.autograd.grad(kl_by_pairs(theirs), theirs), atol=1e-5, rtol=1e-4)


def test_kl_by_hand():
    """Two tasks, one feature: N(0, 1) and N(2, 4) have KL(p‖q) + KL(q‖p) = ½ (1/4 + 4 - 2 + 4 (1 + 1/4)) = 3.625."""
    D = kl_all_pairs(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [4.0]]))
    assert D.item() == pytest.approx(3.625 / 2)


def test_kl_cost_is_linear_in_the_number_of_tasks():
    """No tensor grows with T²: at T = 400, r = 2 the largest one holds T·r numbers."""
    from torch.utils._python_dispatch import TorchDispatchMode
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            largest.append(result.numel() if isinstance(result, torch.Tensor) else 0)
            return result
    with Watch():
        kl_all_pairs(torch.randn(400, 2), torch.rand(400, 2) + 0.5)
    assert max(largest) == 800


@pytest.mark.parametrize("sizes", [(5, 9), (3, 8, 4)])
@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_mmd_equals_the_sums(sizes, shift):
    groups = groups_of(sizes, shift=shift)
    torch.testing.assert_close(mmd_alignment(groups).double(), mmd_by_sums(groups), atol=1e-4, rtol=1e-4)


def test_mmd_gradient_equals_that_of_the_sums():
    ours, theirs = ([(0.1 * g.float()).requires_grad_() for g in groups_of((5, 9, 4))] for _ in range(2))
    torch.testing.assert_close(torch.autograd.grad(mmd_alignment(ours), ours),
                               torch.autograd.grad(mmd_by_sums(theirs), theirs), atol=1e-5, rtol=1e-4)


def test_kernels_and_their_derivative_are_those_of_the_sum_written_out():
    """From points that coincide to points whose narrow kernels are far below the smallest float."""
    d = torch.tensor([0.0, 1e-7, 1e-4, 0.3, 7.0, 400.0, 1e8], requires_grad=True)
    upstream = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 1.5, 2.0])
    values = []
    for kernels in (GaussianKernels.apply(d, MMD_BANDWIDTHS), sum(torch.exp(-d / (2 * s)) for s in MMD_BANDWIDTHS)):
        values.append((kernels, torch.autograd.grad(kernels, d, upstream)[0]))
    torch.testing.assert_close(*values, atol=1e-30, rtol=1e-5)


@pytest.mark.parametrize("align", [kl_alignment, mmd_alignment])
def test_several_layers_give_the_mean_over_them(align):
    groups = [torch.randn(n, 5, 3) * (1 + t) for t, n in enumerate((4, 9, 6))]  # [n_t, L, r]
    mean = torch.stack([align([group[:, layer] for group in groups]) for layer in range(5)]).mean()
    torch.testing.assert_close(align(groups), mean)


def test_kl_has_no_loop_over_tasks():
    """As many operations for 300 tasks as for 3."""
    def operations(count):
        from torch.utils._python_dispatch import TorchDispatchMode
        seen = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                seen.append(function)
                return function(*args, **(kwargs or {}))
        z, owner = torch.randn(1200, 4, requires_grad=True), torch.arange(1200) % count
        with Watch():
            alignment_of({"layer": z}, owner, "kl")
        return len(seen)
    assert operations(300) == operations(3)


def test_mmd_without_pdist_is_the_same(monkeypatch):
    """MPS has none; there the pairs are written out."""
    groups = groups_of((5, 9, 4))
    expected = mmd_alignment(groups)
    monkeypatch.setattr(torch, "pdist", None)
    with pytest.raises(TypeError):
        mmd_alignment(groups)
    monkeypatch.setattr(align_module, "lacks_pdist", lambda z: True)
    torch.testing.assert_close(mmd_alignment(groups), expected)


def test_mmd_gradient_is_finite_where_points_coincide():
    group = torch.ones(4, 3, requires_grad=True)
    gradient, = torch.autograd.grad(mmd_alignment([group, torch.randn(5, 3)]), group)
    assert gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("align,bound", [(kl_alignment, 0.06), (mmd_alignment, 0.25)])
def test_same_distribution_gives_about_zero_and_different_ones_do_not(align, bound):
    """With 8 tasks of 400 tokens, where a KL of about 2 r / n is left; the published estimators give 2 to 10."""
    values = [align([torch.randn(400, 8, generator=torch.Generator().manual_seed(100 * seed + t)) for t in range(8)])
              for seed in range(5)]
    assert abs(torch.stack(values).mean()) < bound
    torch.manual_seed(0)
    assert align([torch.randn(200, 8) + 2 * t for t in range(3)]) > 10 * bound


@pytest.mark.parametrize("align", [kl_alignment, mmd_alignment])
def test_few_tokens_give_no_nan(align):
    for sizes in [(1, 5, 6), (1, 1), (0, 4), (2, 2), (1,), ()]:
        groups = [torch.randn(n, 4, requires_grad=True) for n in sizes]
        value = align(groups)
        assert value.shape == () and value.isfinite()
        if sizes:
            assert all(g.isfinite().all() for g in torch.autograd.grad(value, groups, allow_unused=True,
                                                                       materialize_grads=True))
    a, b = torch.randn(5, 4), torch.randn(6, 4)
    torch.manual_seed(0)
    torch.testing.assert_close(align([a, b, torch.randn(1, 4)]), align([a, b]))  # one token has no spread: left out
    constant = [torch.zeros(5, 4), torch.zeros(5, 4)]
    assert align(constant) == pytest.approx(0, abs=1e-6)


def adapted(method="lora", **options):
    model = make_llama()
    add_adapters(model, AdapterConfig(method, rank=3, alpha=6, **options))
    randomize_adapters(model)
    return model


def features_of(model, batch):
    with collect_features(model) as features:
        label_loss(model, batch)
    return features


def test_features_are_A_x_of_every_adapted_layer(batch):
    model = adapted()
    inputs = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            module.register_forward_hook(lambda m, i, o, name=name: inputs.update({name: i[0]}))
    features = features_of(model, batch)
    assert list(features) == list(inputs) and len(features) == 6
    for name, z in features.items():
        torch.testing.assert_close(z, inputs[name] @ model.get_submodule(name).lora_A.weight.T)


def test_groups_follow_task_ids_and_leave_padding_out(batch):
    z = torch.randn(6, 9, 3, requires_grad=True)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = {key: tensor[order] for key, tensor in batch.items()}
    def groups_in(z, batch):
        return group_by_task(real_tokens({"layer": z}, batch)["layer"], owners(batch))
    ours, theirs = groups_in(z, batch), groups_in(z[order], shuffled)
    for ours, theirs in zip(ours, theirs):
        assert sorted(ours.tolist()) == sorted(theirs.tolist())
    assert [len(group) for group in groups_in(z, batch)] == [9 + 8, 7 + 6, 9 + 8]
    padded = {"attention_mask": torch.cat([torch.zeros(6, 20, dtype=int), batch["attention_mask"]], 1),
              "task_ids": batch["task_ids"]}
    with_padding = torch.cat([torch.full((6, 20, 3), 1e6), z], 1)
    for kind in ("kl", "mmd"):
        torch.testing.assert_close(alignment_loss({"layer": with_padding}, padded, kind),
                                   alignment_loss({"layer": z}, batch, kind))


def test_groups_of_unequal_sizes_are_those_of_a_loop():
    owner, z = torch.tensor([4, 1, 1, 7, 4, 1, 1, 7, 1]), torch.randn(9, 2, 3)
    for ours, task in zip(group_by_task(z, owner), (1, 4, 7), strict=True):
        assert torch.equal(ours, z[owner == task])


@pytest.mark.parametrize("kind", ["kl", "mmd"])
def test_gradient_reaches_A_and_not_B(batch, kind):
    model = adapted()
    loss = alignment_loss(features_of(model, batch), batch, kind)
    gradients = torch.autograd.grad(loss, list(adapter_parameters(model).values()), allow_unused=True,
                                    materialize_grads=True)
    last = "model.layers.1.mlp.down_proj.lora_B.weight"  # every other B changes what later layers see
    for name, gradient in zip(adapter_parameters(model), gradients):
        assert gradient.any() == (name != last) or "layers.0" in name
        if name.endswith("lora_A.weight"):
            assert gradient.any()
    assert not dict(zip(adapter_parameters(model), gradients))[last].any()


def step_gradients(batch, accumulation=1, checkpointing=False, dropout=0.0, kind="kl", weight=0.5):
    model = adapted(dropout=dropout).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(3)
    config = TrainConfig(method="align", accumulation=accumulation, align=kind, align_weight=weight)
    numbers = multitask_step(model, batch, config)
    return numbers, {name: parameter.grad for name, parameter in adapter_parameters(model).items()}


@pytest.mark.parametrize("kind", ["kl", "mmd"])
@pytest.mark.parametrize("change", [{"checkpointing": True}, {"accumulation": 2}, {"accumulation": 5},
                                    {"accumulation": 3, "checkpointing": True}])
def test_checkpointing_and_accumulation_change_nothing(batch, kind, change):
    plain_numbers, plain = step_gradients(batch, kind=kind)
    numbers, gradients = step_gradients(batch, kind=kind, **change)
    _, unaligned = step_gradients(batch, kind=kind, weight=0.0)
    assert max((plain[name] - unaligned[name]).abs().max() for name in plain) > 1e-3  # the term does something
    torch.testing.assert_close(gradients, plain, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(numbers, plain_numbers, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["kl", "mmd"])
def test_the_collecting_pass_sees_the_dropout_masks_of_the_training_pass(monkeypatch, kind):
    """With dropout, the features that the alignment was computed on are the ones that train."""
    import tinylora_mtl.run.training as train
    collected, trained = [], []
    original = train.alignment_gradients

    def watch(model, pieces, kind):
        handle = model.model.layers[0].mlp.up_proj.lora_A.register_forward_hook(lambda m, i, o: collected.append(o))
        result = original(model, pieces, kind)
        handle.remove()
        model.model.layers[0].mlp.up_proj.lora_A.register_forward_hook(lambda m, i, o: trained.append(o.detach()))
        return result
    monkeypatch.setattr(train, "alignment_gradients", watch)
    step_gradients(make_batch(each=12), accumulation=3, dropout=0.5, kind=kind)  # more tokens than MMD_TOKENS a task
    assert len(collected) == len(trained) == 3
    assert all(torch.equal(a, b) for a, b in zip(collected, trained))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_features_without_a_gradient_are_noticed(batch, accumulation):
    model = adapted().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()  # without which nothing at all would train
    with pytest.raises(align_module.NoGradientError, match="no gradient"):
        multitask_step(model, batch, TrainConfig(method="align", accumulation=accumulation, align_weight=0.5))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_mmd_takes_other_tokens_in_every_step(monkeypatch, accumulation):
    taken = []

    def watch(*arguments, original=torch.randperm, **options):
        taken.append(original(*arguments, **options))
        return taken[-1]
    monkeypatch.setattr(torch, "randperm", watch)
    model, batch = adapted().train(), make_batch(each=12)
    torch.manual_seed(0)
    for _ in range(2):
        multitask_step(model, batch, TrainConfig(method="align", accumulation=accumulation, align="mmd",
                                                 align_weight=0.5))
    first, second = taken[:len(taken) // 2], taken[len(taken) // 2:]
    assert len(first) == 3 and not any(torch.equal(a, b) for a, b in zip(first, second))


def test_pieces_are_weighed_by_their_labels(batch):
    """Plain losses: in pieces with different numbers of labels the gradient is that of the whole batch."""
    model = adapted()
    whole = torch.autograd.grad(label_loss(model, batch), list(adapter_parameters(model).values()))
    count = (batch["labels"] != -100).sum()
    pieces = split_batch(batch, 4)
    assert len({int((piece["labels"] != -100).sum()) for piece in pieces}) > 1
    sum(label_loss(model, piece, count) for piece in pieces).backward()
    torch.testing.assert_close([p.grad for p in adapter_parameters(model).values()], list(whole), atol=1e-6, rtol=1e-4)


def test_batch_tasks_of_one_kind_only_give_zero():
    model, single = adapted(), make_batch(tasks=(5,), each=4)
    assert alignment_loss(features_of(model, single), single) == 0
