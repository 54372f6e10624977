"""The KL form against a double loop, and what the alignment is taken over: real tokens, tasks, layers."""

import pytest
import torch
from conftest import make_batch, make_llama, randomize_adapters
from torch.utils._python_dispatch import TorchDispatchMode

from tinylora_mtl import AdapterConfig, adapter_parameters, add_adapters, kl_alignment, mmd_alignment
from tinylora_mtl.align import VARIANCE_EPS, alignment, alignment_loss, collect_features, kl_all_pairs, real_tokens
from tinylora_mtl.config import TrainConfig
from tinylora_mtl.loss import label_loss
from tinylora_mtl.train import align_gradients


def groups_of(sizes, r=4, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, r, generator=generator, dtype=torch.float64) * (1 + t) ** 0.5 + shift * t
            for t, n in enumerate(sizes)]


def kl_by_pairs(groups):
    """The double loop over pairs, each KL from torch.distributions."""
    normals = [torch.distributions.Normal(g.float().mean(0), (g.float().var(0, unbiased=False) + VARIANCE_EPS).sqrt())
               for g in groups]
    kl = torch.distributions.kl_divergence
    pairs = [(kl(p, q) + kl(q, p)).sum() / 2 for i, p in enumerate(normals) for q in normals[:i]]
    return torch.stack(pairs).mean()


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


def test_a_feature_that_does_not_vary_has_the_floor_as_its_variance():
    """Means 0 and 0.01, variances 1e-5: D = ½ 0.01² / 1e-5 = 5."""
    D = kl_alignment([torch.zeros(3, 1), torch.full((4, 1), 0.01)])
    assert D.item() == pytest.approx(5.0, rel=1e-4)


def test_kl_cost_is_linear_in_the_number_of_tasks():
    """No tensor grows with T²: at T = 400, r = 2 the largest one holds T·r numbers; and there is no loop over tasks."""
    sizes = {3: [], 400: []}
    for count, seen in sizes.items():
        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                seen.append(result.numel() if isinstance(result, torch.Tensor) else 0)
                return result
        with Watch():
            kl_all_pairs(torch.randn(count, 2), torch.rand(count, 2) + 0.5)
    assert max(sizes[400]) == 800 and len(sizes[400]) == len(sizes[3])


# ------------------------------------------------------------------------------------------ both forms, by themselves
@pytest.mark.parametrize("align", [kl_alignment, mmd_alignment])
def test_several_layers_give_the_mean_over_them(align):
    groups = [torch.randn(n, 5, 3) * (1 + t) for t, n in enumerate((4, 9, 6))]  # [n_t, L, r]
    mean = torch.stack([align([group[:, layer] for group in groups]) for layer in range(5)]).mean()
    torch.testing.assert_close(align(groups), mean)


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
        assert (value == 0) == (sum(n > 1 for n in sizes) < 2)
        if sizes:
            assert all(g.isfinite().all() for g in torch.autograd.grad(value, groups, allow_unused=True,
                                                                       materialize_grads=True))
    a, b = torch.randn(5, 4), torch.randn(6, 4)
    torch.manual_seed(0)
    torch.testing.assert_close(align([a, b, torch.randn(1, 4)]), align([a, b]))  # one token has no spread: left out
    constant = [torch.zeros(5, 4), torch.zeros(5, 4)]
    assert align(constant) == pytest.approx(0, abs=1e-6)


# ----------------------------------------------------------------------------------------------- features of a model
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


@pytest.mark.parametrize("method,part,width", [("rlora", "router", 5), ("rlora", "lora_A", 3),
                                               ("mlora", "router", None)])
def test_routers_can_be_collected_and_nothing_is_after_the_block(batch, method, part, width):
    model = adapted(method)
    with collect_features(model, part) as features:
        label_loss(model, batch)
    assert {z.shape for z in features.values()} == ({(6, 9, width)} if width else set())
    found = dict(features)
    label_loss(model, make_batch(seed=1))
    assert all(features[name] is z for name, z in found.items())


def test_real_tokens_are_stacked_by_layer_each_with_its_task(batch):
    """Against a loop over the rows and columns of the batch."""
    features = {"first": torch.randn(6, 9, 3, requires_grad=True), "second": torch.randn(6, 9, 3, requires_grad=True)}
    z, owner = real_tokens(features, batch)
    places = [(row, column) for row in range(6) for column in range(9) if batch["attention_mask"][row, column]]
    assert owner.tolist() == [batch["task_ids"][row] for row, _ in places]
    assert torch.equal(z, torch.stack([torch.stack([features[name][place] for name in features]) for place in places]))


def test_groups_follow_task_ids_and_leave_padding_out(batch):
    z = torch.randn(6, 9, 3, requires_grad=True)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = {key: tensor[order] for key, tensor in batch.items()}
    padded = {"attention_mask": torch.cat([torch.zeros(6, 20, dtype=int), batch["attention_mask"]], 1),
              "task_ids": batch["task_ids"]}
    with_padding = torch.cat([torch.full((6, 20, 3), 1e6), z], 1)
    for kind in ("kl", "mmd"):
        expected = alignment_loss({"layer": z}, batch, kind)
        torch.testing.assert_close(alignment_loss({"layer": z[order]}, shuffled, kind), expected)
        torch.testing.assert_close(alignment_loss({"layer": with_padding}, padded, kind), expected)


@pytest.mark.parametrize("kind,align", [("kl", kl_alignment), ("mmd", mmd_alignment)])
def test_groups_of_unequal_sizes_are_those_of_a_loop(kind, align):
    owner, z = torch.tensor([4, 1, 1, 7, 4, 1, 1, 7, 1]), torch.randn(9, 2, 3)
    torch.testing.assert_close(alignment(z, owner, kind), align([z[owner == task] for task in (1, 4, 7)]))


def test_the_kl_form_is_the_default():
    z, batch = torch.randn(6, 9, 3, requires_grad=True), make_batch()
    assert alignment_loss({"layer": z}, batch) == alignment_loss({"layer": z}, batch, "kl")


def test_a_batch_of_one_task_gives_zero():
    model, single = adapted(), make_batch(tasks=(5,), each=4)
    assert alignment_loss(features_of(model, single), single) == 0


# ------------------------------------------------------------------------------------------------------- its gradient
@pytest.mark.parametrize("kind", ["kl", "mmd"])
def test_gradient_reaches_A_and_not_B(batch, kind):
    model = adapted()
    loss = alignment_loss(features_of(model, batch), batch, kind)
    gradients = torch.autograd.grad(loss, list(adapter_parameters(model).values()), allow_unused=True,
                                    materialize_grads=True)
    last = "model.layers.1.mlp.down_proj.lora_B.weight"  # every other B changes what later layers see
    for name, gradient in zip(adapter_parameters(model), gradients):
        assert gradient.any() == (name != last)


def gradients_in_training(batch, kind, weight, checkpointing=False):
    model = adapted().train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    metrics = align_gradients(model, batch, TrainConfig(method="align", align=kind, align_weight=weight))
    return metrics, {name: parameter.grad for name, parameter in adapter_parameters(model).items()}


@pytest.mark.parametrize("kind", ["kl", "mmd"])
def test_checkpointing_changes_nothing(batch, kind):
    plain = gradients_in_training(batch, kind, 0.5)
    torch.testing.assert_close(gradients_in_training(batch, kind, 0.5, checkpointing=True), plain, atol=1e-6, rtol=1e-4)
    unaligned = gradients_in_training(batch, kind, 0.0)[1]
    assert max((plain[1][name] - unaligned[name]).abs().max() for name in unaligned) > 1e-3  # the term does something


def test_features_without_a_gradient_are_noticed(batch):
    model = adapted().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()  # without which nothing at all would train
    with pytest.raises(ValueError, match="no gradient"):
        align_gradients(model, batch, TrainConfig(method="align", align_weight=0.5))
    with torch.no_grad():  # to look at the number is another thing
        assert alignment_loss(features_of(model, batch), batch) > 0
