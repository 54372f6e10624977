"""The exercises: `pytest -m ex1` grades the first. The docstring of each function is its whole specification."""

import math

import pytest
import torch
from conftest import make_batch, make_llama, randomize_adapters
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from tinylora_mtl import AdapterConfig, LoRALinear, adapter_parameters, add_adapters, align, meta, multihead
from tinylora_mtl.lab import heads as lab_heads
from tinylora_mtl.loss import label_loss

X = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])


def close(found, expected, message, **tolerances):
    """Equal but for rounding; or else the message, which says where to look, with both values."""
    assert isinstance(found, torch.Tensor), f"a tensor is to be returned, not {type(found).__name__}"
    expected = torch.as_tensor(expected)
    assert found.shape == expected.shape, f"the shape is {list(found.shape)}, it should be {list(expected.shape)}"
    if not torch.allclose(found.double(), expected.double(), **{"rtol": 1e-4, "atol": 1e-5} | tolerances):
        pytest.fail(f"{message}\nfound:    {found.tolist()}\nexpected: {expected.tolist()}", pytrace=False)


def small_lora(alpha=6.0, dropout=0.0):
    """3 -> 2 features, rank 2, scaling 3, with numbers that can be followed by hand."""
    base = nn.Linear(3, 2)
    adapter = LoRALinear(base, rank=2, alpha=alpha, dropout=dropout).eval()
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, -1.0, 1.0]]))
        base.bias.copy_(torch.tensor([0.5, -0.5]))
        adapter.lora_A.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 2.0]]))
        adapter.lora_B.weight.copy_(torch.tensor([[1.0, 0.0], [-1.0, 2.0]]))
    return adapter


# ------------------------------------------------------------------------------------------- ex1: LoRA's forward
@pytest.mark.ex1
def test_ex1_the_branch_is_added_to_the_base_layer():
    adapter = small_lora()
    close(adapter(X), [[5.5, -7.0], [2.5, 27.5]],
          "y = W x + b + s · B A x: is the base layer there, with its bias, and is the branch added, not put in its place?"
          " Is the branch multiplied by `self.scaling`, alpha / r, once?")


@pytest.mark.ex1
def test_ex1_with_b_zero_it_is_the_base_layer():
    adapter = small_lora(dropout=0.9).train()
    nn.init.zeros_(adapter.lora_B.weight)
    close(adapter(X), adapter.base(X), "with B = 0 the layer is its base, in training too: dropout belongs to the branch, "
                                       "and the base layer sees x as it is")


@pytest.mark.ex1
def test_ex1_dropout_acts_on_the_branchs_input_in_training_only():
    adapter, x = small_lora(dropout=0.5), torch.ones(400, 3)
    close(adapter(x), adapter(x), "in evaluation nothing is random")
    adapter.train()
    seen = []
    adapter.lora_A.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    y = adapter(x)
    assert seen, "call self.lora_A(...) as a layer: what it returns is collected there"
    values = set(seen[0].unique().tolist())
    assert values == {0.0, 2.0}, f"dropout acts on x before A, so A should see 0 and 1 / (1 - p) = 2, not {values}"
    assert len(y.unique(dim=0)) > 2, "in training, dropout has no effect on what comes out"


@pytest.mark.ex1
def test_ex1_the_type_is_the_base_layers():
    for dtype, computed_in in ((torch.bfloat16, torch.bfloat16), (torch.float64, torch.float32)):
        adapter, seen = LoRALinear(nn.Linear(3, 2, dtype=dtype), rank=2, alpha=2), []
        nn.init.ones_(adapter.lora_B.weight)
        adapter.lora_A.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        assert adapter(X.to(dtype)).dtype == dtype, "y should come in the type that the base layer returns: y.dtype"
        assert seen == [computed_in], "the branch should see what `with branch_precision(x) as x` makes of x"


# ------------------------------------------------------------------------------------------------- ex2: merging
@pytest.mark.ex2
def test_ex2_delta_by_hand():
    close(small_lora().delta(), [[3.0, 0.0, 0.0], [-3.0, 6.0, 12.0]],
          "ΔW = s · B A, of shape [d_out, d_in]: is the scaling alpha / r there, once, and is it B A, not its transpose?")


@pytest.mark.ex2
def test_ex2_a_square_layer_is_not_transposed():
    torch.manual_seed(0)
    adapter = LoRALinear(nn.Linear(4, 4, bias=False), rank=4, alpha=8).eval()
    nn.init.normal_(adapter.lora_B.weight)
    nn.init.zeros_(adapter.base.weight)
    x = torch.eye(4)
    rows = torch.stack([2 * adapter.lora_B(adapter.lora_A(row)) for row in x])  # s = 8 / 4
    close(adapter.delta(), rows.T, "ΔW x should be s · B (A x) for every x: B comes first in the product, and nothing is "
                                   "transposed")


@pytest.mark.ex2
def test_ex2_the_base_layer_is_left_alone():
    adapter = small_lora()
    weight = adapter.base.weight.detach().clone()
    delta = adapter.delta()
    close(adapter.base.weight, weight, "delta returns what merging adds; it adds nothing itself")
    assert delta.abs().max() < 20, "ΔW is only what is added to W, without W"
    assert delta.dtype == torch.float32


# ------------------------------------------------------------------------------ ex3: several heads in one product
Z = torch.tensor([[[1.0, 2.0], [3.0, -1.0]]])  # [1, N = 2, r = 2]
HEADS = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [[2.0, 0.0], [0.0, -1.0], [0.0, 5.0]]])  # [2, 3, 2]


@pytest.mark.ex3
def test_ex3_heads_are_weighted_and_added_up():
    close(multihead.combine_heads(Z, torch.tensor([[0.25, 0.75]]), HEADS), [[4.75, 1.25, -3.0]],
          "Σ_i w_i B_i z_i: is head i weighted by w_i, and does it see its own z_i? A sum, not a mean; and w as it is, "
          "without another softmax. For one product, the rows of every B_i are laid side by side: [d_out, N·r]")


@pytest.mark.ex3
def test_ex3_without_weights_the_heads_are_added_up():
    close(multihead.combine_heads(Z, None, HEADS), [[7.0, 3.0, -2.0]], "weights None means that every w_i is 1")


@pytest.mark.ex3
def test_ex3_any_number_of_leading_dimensions_and_no_large_tensor():
    torch.manual_seed(0)
    z, weights, heads = torch.randn(2, 5, 3, 4), torch.rand(2, 5, 3), torch.randn(3, 6, 4)
    z.requires_grad_()
    with Operations() as seen:
        y = multihead.combine_heads(z, weights, heads)
    assert y.shape == (2, 5, 6), f"[..., N, r] should become [..., d_out], here [2, 5, 6], not {list(y.shape)}"
    assert seen.largest < 2 * 5 * 3 * 6, "one product is enough: there should be no tensor of shape [..., N, d_out]"
    assert seen.products == 1, f"one matrix product for all heads, not {seen.products}"
    y.sum().backward()
    assert z.grad is not None and z.grad.abs().min() > 0, "every z_i should have a gradient"


class Operations(TorchDispatchMode):
    """Within the block: how many operations and matrix products there were, and the largest result."""

    def __init__(self):
        super().__init__()
        self.count, self.products, self.largest = 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        name = function.overloadpacket.__name__
        self.count += 1
        self.products += name in ("mm", "bmm", "addmm", "baddbmm", "linear", "mv")
        if isinstance(result, torch.Tensor) and name not in ("expand", "view", "_unsafe_view"):
            self.largest = max(self.largest, result.numel())
        return result


# ---------------------------------------------------------------------------------------- ex4: R-LoRA's start
@pytest.fixture(scope="module")
def started():
    torch.manual_seed(0)
    A, heads = torch.full((8, 900), 5.0), torch.full((4, 1600, 8), 5.0)
    returned = multihead.random_start(A, heads, gamma=64)
    return A, heads, returned


SPREAD = 1600 ** 0.25 / math.sqrt(64)


@pytest.mark.ex4
def test_ex4_the_start_of_a(started):
    A, _, returned = started
    assert not (A == 5).any(), "the tensors are to be changed in place"
    assert A.mean().abs() < 0.002
    expected = SPREAD / math.sqrt(900)
    assert A.std().item() == pytest.approx(expected, rel=0.03), (
        f"the standard deviation of A is {A.std():.5f}, it should be {expected:.5f}: d_out^¼ / √γ times a normal of "
        "variance 1 / d_in (so of standard deviation 1 / √d_in). Is it d_out^¼, not r^¼? Is it scaled once, not in a loop?")


@pytest.mark.ex4
def test_ex4_the_start_of_the_heads(started):
    heads = started[1]
    expected = SPREAD / math.sqrt(1600) * math.sqrt(1 - 1 / 4)
    found = heads.std(dim=(1, 2))
    assert torch.allclose(found, torch.full((4,), expected), rtol=0.03), (
        f"the standard deviations of the heads are {found.tolist()}, they should be {expected:.5f}: d_out^¼ / √γ times a "
        "normal of variance 1 / d_out, then √(1 - 1/N) of it is left when the mean is taken away. Are all heads alike?")


@pytest.mark.ex4
def test_ex4_the_heads_are_centred_and_differ(started):
    heads = started[1]
    assert heads.mean(0).abs().max() < 1e-6, "the mean over the heads is to be subtracted, so that Σ_i B_i = 0"
    assert (heads[0] - heads[1]).abs().mean() > 0.01, "the heads should be drawn independently, so that they differ"


@pytest.mark.ex4
def test_ex4_gamma_shrinks_the_start():
    torch.manual_seed(0)
    A, heads = torch.zeros(8, 900), torch.zeros(4, 1600, 8)
    multihead.random_start(A, heads, gamma=256)
    assert A.std().item() == pytest.approx(SPREAD / 2 / math.sqrt(900), rel=0.03), "four times γ should halve A: √γ"


# ------------------------------------------------------------------------------- ex5 and ex6: the KL divergence
def gaussians(count, width=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(count, width, generator=generator)
    return mean, 0.2 + torch.rand(count, width, generator=generator)


def reference(mean, variance, other_mean, other_variance):
    """torch's own divergence, there and back; it takes standard deviations."""
    one, other = Normal(mean, variance.sqrt()), Normal(other_mean, other_variance.sqrt())
    return (kl_divergence(one, other).sum() + kl_divergence(other, one).sum()) / 2


@pytest.mark.ex5
def test_ex5_by_hand():
    one = torch.tensor([0.0, 1.0]), torch.tensor([1.0, 4.0])
    other = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 1.0])
    close(lab_heads.symmetric_kl(*one, *other), 2.5625,
          "½ (KL there + KL back), summed over the features. Is it halved? Are they variances, not standard deviations? "
          "A sum over the features, not a mean?")


@pytest.mark.ex5
def test_ex5_there_and_back():
    (first, second), (v, w) = gaussians(2)
    found = lab_heads.symmetric_kl(first, v, second, w)
    close(lab_heads.symmetric_kl(second, w, first, v), found.item(), "symmetric: the two may change places")
    close(found, reference(first, v, second, w), "it differs from ½ (KL(t‖t') + KL(t'‖t)) by torch.distributions")


@pytest.mark.ex5
def test_ex5_of_the_same_is_zero_and_the_gradient_draws_the_means_together():
    (first, second), (v, w) = gaussians(2, seed=1)
    close(lab_heads.symmetric_kl(first, v, first, v), 0.0, "the divergence of a Gaussian from itself is 0")
    first.requires_grad_()
    lab_heads.symmetric_kl(first, v, second, w).backward()
    assert ((first.grad > 0) == (first > second)).all(), "the gradient should draw the means together"


@pytest.mark.ex6
@pytest.mark.parametrize("count", [2, 3, 8])
def test_ex6_against_all_pairs(count):
    mean, variance = gaussians(count, seed=count)
    expected = sum(reference(mean[i], variance[i], mean[j], variance[j]) for i in range(count) for j in range(i))
    close(align.kl_all_pairs(mean, variance), expected,
          "Σ over pairs i < j: is each pair counted once, is it a sum and not a mean, and is the T² of each feature there? "
          "The ¼ belongs to all of it", rtol=1e-3)


@pytest.mark.ex6
def test_ex6_without_a_loop_over_pairs():
    counts = []
    for count in (4, 64):
        with Operations() as seen:
            align.kl_all_pairs(*gaussians(count))
        counts.append((seen.count, seen.largest))
    (few, _), (many, largest) = counts
    assert many <= few + 2, f"{few} operations for 4 tasks, {many} for 64: pull the sums inside, as the equation does"
    assert largest <= 64 * 3, "there should be no tensor with an entry for every pair of tasks"


@pytest.mark.ex6
def test_ex6_a_mean_that_all_tasks_share_changes_nothing():
    mean, variance = gaussians(5)
    far = align.kl_all_pairs(mean + 3000, variance)
    close(far, align.kl_all_pairs(mean, variance), "only differences of means count: take the mean of the means away first, "
                                                   "or large numbers lose their digits", rtol=1e-2)


# ---------------------------------------------------------------------------------------- ex7: the inner step
@pytest.mark.ex7
def test_ex7_one_step_downhill():
    parameters = [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([[3.0]]))]
    gradients = [torch.tensor([10.0, -10.0]), torch.tensor([[1.0]])]
    meta.inner_step(parameters, gradients, 0.1)
    for parameter, expected in zip(parameters, ([0.0, 3.0], [[2.9]])):
        close(parameter, expected, "θ - α · gradient, in place: is the sign right, is the rate there, does it reach every "
                                   "parameter? A parameter that is only given a new name is not changed")


@pytest.mark.ex7
def test_ex7_the_gradients_are_left_alone_and_there_is_no_memory():
    parameter, gradient = nn.Parameter(torch.zeros(2)), torch.ones(2)
    for _ in range(3):
        meta.inner_step([parameter], [gradient], 0.5)
    close(parameter, [-1.5, -1.5], "three equal steps go three times as far: plain gradient descent, no momentum, no "
                                   "division by the size of the gradient")
    close(gradient, [1.0, 1.0], "the gradients should be as they were")
    assert parameter.requires_grad and parameter.is_leaf, "no graph through the step: first order"


# ------------------------------------------------------------------------------------ ex8: the outer gradient
def round_of_tasks(count=2):
    model = make_llama()
    add_adapters(model, AdapterConfig("lora", rank=2, alpha=4))
    randomize_adapters(model)
    episodes = [(make_batch(seed=2 * i, tasks=(i,)), make_batch(seed=2 * i + 1, tasks=(i,))) for i in range(count)]
    return model, episodes


def at_adapted(model, support, query, inner_lr, inner_steps):
    """∇ L(S or Q; θ_i) after plain gradient descent on the support set, by torch's own optimiser; θ is put back."""
    parameters = adapter_parameters(model)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=inner_lr)
    for batch in [support] * inner_steps + [query]:
        optimizer.zero_grad()
        label_loss(model, batch).backward()
        if batch is support:
            optimizer.step()
    found = {name: parameter.grad.clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        parameter.data.copy_(before[name])
        parameter.grad = None
    return found


def outer_gradient(*args):
    try:
        return meta.meta_gradients(*args)
    except RuntimeError as error:
        if "inplace operation" in str(error):
            pytest.fail("the query loss comes from a forward pass that was made before the adapter was adapted: make it "
                        "within the block, at θ_i", pytrace=False)
        raise


def expect(found, expected, message):
    assert set(found) == set(expected), "{name: gradient} for every adapter parameter is to be returned"
    for name in expected:
        close(found[name], expected[name], f"{name}: {message}", rtol=1e-3, atol=1e-6)


@pytest.mark.ex8
def test_ex8_the_gradient_is_taken_at_the_adapted_parameters():
    model, episodes = round_of_tasks(1)
    expect(outer_gradient(model, episodes, 0.5, 2), at_adapted(model, *episodes[0], 0.5, 2),
           "∇ L(Q_i; θ_i): is it the query set, and is its forward pass made within the block in which the adapter is θ_i?")


@pytest.mark.ex8
def test_ex8_it_is_the_mean_over_the_tasks():
    model, episodes = round_of_tasks(3)
    alone = [at_adapted(model, *episode, 0.5, 1) for episode in episodes]
    mean = {name: sum(gradients[name] for gradients in alone) / 3 for name in alone[0]}
    expect(outer_gradient(model, episodes, 0.5, 1), mean,
           "g is the mean over all tasks, not their sum and not the last one's; and each task starts at θ anew")


@pytest.mark.ex8
def test_ex8_without_inner_steps_it_is_multi_task_training():
    model, episodes = round_of_tasks(2)
    alone = [at_adapted(model, support, query, 0.5, 0) for support, query in episodes]
    mean = {name: (alone[0][name] + alone[1][name]) / 2 for name in alone[0]}
    losses = []
    expect(outer_gradient(model, episodes, 0.5, 0, losses), mean, "with k = 0 it is the plain gradient over the query sets")
    for row in losses:
        assert len(row) == 1, "without inner steps a task's row of losses is its query loss alone"
        assert not row[-1].requires_grad, "the losses are for the log: detach them"


@pytest.mark.ex8
def test_ex8_the_shared_adapter_is_left_as_it_was():
    model, episodes = round_of_tasks(2)
    before = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}
    losses = []
    found = outer_gradient(model, episodes, 0.5, 2, losses)
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(parameter, before[name]), "after the round every parameter is as it was: θ, not the last θ_i"
        assert parameter.grad is None, "no .grad is to be touched"
    assert all(not gradient.requires_grad for gradient in found.values()), "first order: no graph is kept"
    assert len(losses) == 2 and all(len(row) == 3 for row in losses), \
        "a row of losses for every task, if asked for: the support loss before each inner step, then the query loss"
    for first, second, query in losses:
        assert second < first, "the inner steps should lower the support loss"
        assert query > 0
