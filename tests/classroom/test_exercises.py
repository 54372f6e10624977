"""The exercises: `pytest -m ex1` grades the first. The docstring of each function is its whole specification."""

import math

import pytest
import torch
from conftest import make_batch, make_llama, randomize_adapters
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from tinylora_mtl import AdapterConfig, LoRALinear, adapter_parameters, add_adapters, align, meta, multihead, train
from tinylora_mtl.config import TrainConfig
from tinylora_mtl.loss import label_loss

X = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, 1.0]])


def close(found, expected, message, **tolerances):
    """Equal but for rounding; or else the message, which says where to look, with both values."""
    assert isinstance(found, torch.Tensor), f"a tensor is to be returned, not {type(found).__name__}"
    expected = torch.as_tensor(expected)
    if found.shape != expected.shape:
        pytest.fail(f"the shape is {list(found.shape)}, it should be {list(expected.shape)}\n{message}", pytrace=False)
    if not torch.allclose(found.double(), expected.double(), **{"rtol": 1e-4, "atol": 1e-5} | tolerances):
        values = f"found:    {found.tolist()}\nexpected: {expected.tolist()}"
        if found.numel() > 12:
            at = int((found - expected).abs().argmax())
            place = [int(i) for i in torch.unravel_index(torch.tensor(at), found.shape)]
            values = f"most at {place}: found {found.flatten()[at]:.6g}, expected {expected.flatten()[at]:.6g}"
        pytest.fail(f"{message}\n{values}", pytrace=False)


def check(right, message):
    """As `assert`, without the tensors and the lines of the test."""
    if not right:
        pytest.fail(message, pytrace=False)


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
def test_ex1_rank_stabilised_and_with_gradients():
    adapter = LoRALinear(nn.Linear(3, 2), rank=4, alpha=6.0, rank_stabilized=True).eval()  # s = 6 / √4
    nn.init.normal_(adapter.lora_B.weight)
    weight = adapter.base.weight + 3 * adapter.lora_B.weight @ adapter.lora_A.weight
    x = X.clone().requires_grad_()
    y = adapter(x)
    close(y, x @ weight.T + adapter.base.bias, "s is self.scaling: alpha / r, or alpha / √r when rank-stabilised")
    y.sum().backward()
    close(x.grad, weight.sum(0).expand(2, 3), "the gradient on x comes through the base layer and through the branch: a frozen "
                                              "layer's parameters get none, but what lies before it does")


@pytest.mark.ex1
def test_ex1_with_b_zero_it_is_the_base_layer():
    adapter = small_lora(dropout=0.9).train()
    nn.init.zeros_(adapter.lora_B.weight)
    close(adapter(X), adapter.base(X), "with B = 0 the layer is its base, in training too: dropout belongs to the branch, "
                                       "and the base layer sees x as it is")


@pytest.mark.ex1
def test_ex1_dropout_acts_on_the_branchs_input_in_training_only():
    adapter, x = small_lora(dropout=0.5), torch.ones(400, 3)
    close(adapter(x), adapter(x), "in evaluation nothing is random: call self.dropout(…), which is off then")
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
    types = ((torch.bfloat16, torch.bfloat16), (torch.float64, torch.float32), (torch.float16, torch.float32))
    for dtype, computed_in in types:
        adapter, seen = LoRALinear(nn.Linear(3, 2, dtype=dtype), rank=2, alpha=2), []
        nn.init.ones_(adapter.lora_B.weight)
        adapter.lora_A.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        try:
            y = adapter(X.to(dtype))
        except RuntimeError as error:
            pytest.fail("the base layer gets x as it is, the branch what `with branch_precision(x) as …` makes of it: its "
                        f"weights are float32, and x is {dtype} here\n{error}", pytrace=False)
        assert y.dtype == dtype, "y should come in the type that the base layer returns: y.dtype"
        assert seen == [computed_in], "the branch should see what `with branch_precision(x) as …` makes of x"


# ------------------------------------------------------------------------------------------------- ex2: merging
@pytest.mark.ex2
def test_ex2_delta_by_hand():
    close(small_lora().delta(), [[3.0, 0.0, 0.0], [-3.0, 6.0, 12.0]],
          "ΔW = s · B A, of shape [d_out, d_in], without W: is the scaling alpha / r there, once, and is it B A, not its "
          "transpose?")


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
def test_ex2_it_depends_on_a_and_b_alone():
    adapter = LoRALinear(nn.Linear(3, 2, dtype=torch.bfloat16), 4, 6.0, dropout=0.5, rank_stabilized=True).train()
    nn.init.normal_(adapter.lora_B.weight)
    A, B = adapter.lora_A.weight.detach().clone(), adapter.lora_B.weight.detach().clone()
    for _ in range(2):
        delta = adapter.delta()
        close(delta, 3 * B @ A, "ΔW = s · B A with s = self.scaling, without dropout, and A and B stay as they are")
        assert delta.dtype == torch.float32, "ΔW is float32, whatever W is: it is rounded once, when it is added"


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
    close(multihead.combine_heads(Z.clone(), torch.tensor([[0.25, 0.75]]), HEADS), [[4.75, 1.25, -3.0]],
          "Σ_i w_i B_i z_i: is head i weighted by w_i, and does it see its own z_i? A sum, not a mean; and w as it is, "
          "without another softmax. For one product, the rows of every B_i are laid side by side: [d_out, N·r]")


@pytest.mark.ex3
def test_ex3_without_weights_the_heads_are_added_up():
    z = Z.clone()
    close(multihead.combine_heads(z, None, HEADS), [[7.0, 3.0, -2.0]],
          "weights None means that every w_i is 1; and the heads are laid side by side: transpose before you reshape")
    multihead.combine_heads(z, torch.tensor([[0.25, 0.75]]), HEADS)
    close(z, Z, "z should not be changed: `z * …`, not `z *= …`")


@pytest.mark.ex3
def test_ex3_any_number_of_leading_dimensions_and_no_large_tensor():
    torch.manual_seed(0)
    z, weights, heads = torch.randn(2, 5, 3, 4), torch.rand(2, 5, 3), torch.randn(3, 6, 4)
    inputs = [tensor.requires_grad_() for tensor in (z, weights, heads)]
    expected = sum(weights[..., i, None] * (z[..., i, :] @ heads[i].T) for i in range(3))
    gradients = torch.autograd.grad(expected.square().sum(), inputs)
    with Operations() as seen:
        y = multihead.combine_heads(z, weights, heads)
    assert y.shape == (2, 5, 6), f"[..., N, r] should become [..., d_out], here [2, 5, 6], not {list(y.shape)}"
    assert seen.largest < 2 * 5 * 3 * 6, "one product is enough: there should be no tensor of shape [..., N, d_out]"
    assert seen.products == 1, f"one matrix product for all heads, not {seen.products}"
    close(y, expected, "Σ_i w_i B_i z_i for each token by itself, with its own weights, which need not add up to 1")
    y.square().sum().backward()
    for tensor, gradient, name in zip(inputs, gradients, ("z", "the weights", "the heads")):
        assert tensor.grad is not None, f"{name} should have a gradient"
        close(tensor.grad, gradient, f"the gradient of {name} is not that of Σ_i w_i B_i z_i")


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
    check(heads.mean(0).abs().max() < 1e-6, "the mean over the heads is to be subtracted, so that Σ_i B_i = 0; in place, "
          "for `heads = heads - …` leaves the caller's tensor as it was")
    check((heads[0] - heads[1]).abs().mean() > 0.5 * heads.std(), "the heads should be drawn independently, so that they "
          "differ")
    check(torch.linalg.matrix_rank(started[0]) == 8 and torch.linalg.matrix_rank(heads[0]) == 8,
          "every entry is drawn by itself: here some rows or columns are alike")


@pytest.mark.ex4
def test_ex4_gamma_shrinks_the_start():
    torch.manual_seed(0)
    sizes = []
    for gamma in (64, 256):
        A, heads = torch.zeros(8, 900), torch.zeros(3, 1600, 8)
        multihead.random_start(A, heads, gamma=gamma)
        sizes.append([A.std().item(), heads.std().item()])
        check(heads.mean(0).abs().max() < 1e-6, "the mean over the heads is to be subtracted, however many there are: 3 here")
    for few, many in zip(*sizes):
        assert many == pytest.approx(few / 2, rel=0.05), "four times γ should halve A and the heads: √γ"
    again = torch.zeros(8, 900)
    multihead.random_start(again, torch.zeros(3, 1600, 8), gamma=256)
    check(not torch.equal(A, again), "every layer is to start otherwise: no seed is set here")


# ----------------------------------------------------------------------------------- ex5: the tasks' real tokens
@pytest.mark.ex5
def test_ex5_by_hand():
    places, owner = align.tokens_and_owners(torch.tensor([[0, 1, 1], [1, 1, 1]]), torch.tensor([4, 2]))
    close(places, [1, 2, 3, 4, 5], "the places of the ones in the flattened mask, row after row; 0 is padding")
    close(owner, [4, 4, 2, 2, 2], "whose each of them is: every real token of a row belongs to that row's task")
    assert places.dtype == owner.dtype == torch.int64, "both are int64, for they are indices"
    mask, ids = torch.tensor([[0, 1]]), torch.tensor([3])
    places, owner = align.tokens_and_owners(mask, ids)
    close(places, [1], "also with one token both have one dimension: [n]")
    close(owner, [3], "also with one token both have one dimension: [n]")
    check(mask.tolist() == [[0, 1]] and ids.tolist() == [3], "what comes in should not be changed")


@pytest.mark.ex5
def test_ex5_padding_on_any_side_and_tasks_in_any_order():
    mask = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0]])
    places, owner = align.tokens_and_owners(mask, torch.tensor([1, 7, 0, 1]))
    close(places, [0, 3, 8, 9, 10, 13], "only the mask says what is real: not the length of a row, nor that padding stands "
                                        "on the left")
    close(owner, [1, 1, 0, 0, 0, 1], "a token is of its own row's task; rows of a task need not stand together, and a row "
                                     "without real tokens has none")


@pytest.mark.ex5
def test_ex5_more_padding_changes_no_features():
    torch.manual_seed(0)
    mask, ids = torch.ones(4, 5, dtype=torch.int64), torch.tensor([0, 1, 0, 1])
    z = torch.randn(4, 5, 3, requires_grad=True)
    wide = torch.cat([torch.zeros(4, 2, 3), z], dim=1)  # two columns of padding on the left
    (one, owner), (other, other_owner) = (
        align.real_tokens({"layer": features}, {"attention_mask": m, "task_ids": ids})
        for features, m in ((z, mask), (wide, torch.cat([torch.zeros(4, 2, dtype=torch.int64), mask], dim=1))))
    close(other, one, "two columns of padding changed the features that are aligned: they are to be those of real tokens")
    close(other_owner, owner, "two columns of padding changed whose the features are")


# --------------------------------------------------------------------- ex6: the KL divergence of all pairs of tasks
def gaussians(count, width=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(count, width, generator=generator)
    return mean, 0.2 + torch.rand(count, width, generator=generator)


def reference(mean, variance, other_mean, other_variance):
    """torch's own divergence, there and back; it takes standard deviations."""
    one, other = Normal(mean, variance.sqrt()), Normal(other_mean, other_variance.sqrt())
    return (kl_divergence(one, other).sum() + kl_divergence(other, one).sum()) / 2


@pytest.mark.ex6
def test_ex6_by_hand():
    mean, variance = torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([[1.0, 4.0], [1.0, 1.0]])
    close(align.kl_all_pairs(mean, variance), 2.5625,
          "two tasks: ½ (KL there + KL back), summed over the features. Is it halved? Are they variances, not standard "
          "deviations? A sum over the features, not a mean?")


@pytest.mark.ex6
@pytest.mark.parametrize("count", [2, 3, 8])
def test_ex6_against_all_pairs(count):
    mean, variance = gaussians(count, seed=count)
    expected = sum(reference(mean[i], variance[i], mean[j], variance[j]) for i in range(count) for j in range(i))
    close(align.kl_all_pairs(mean, variance), expected,
          "Σ over pairs i < j: is each pair counted once, and is it a sum over them, not a mean? What the -1 of each KL adds "
          "up to belongs to every feature", rtol=1e-3)


@pytest.mark.ex6
def test_ex6_the_gradient_and_small_variances():
    mean, variance = gaussians(4, seed=9)
    variance = variance / 100
    found, expected = [], []
    for kept, function in ((found, align.kl_all_pairs), (expected, lambda mean, variance: sum(
            reference(mean[i], variance[i], mean[j], variance[j]) for i in range(4) for j in range(i)))):
        inputs = [mean.clone().requires_grad_(), variance.clone().requires_grad_()]
        value = function(*inputs)
        check(value.requires_grad, "it is a loss: the result should have a gradient, so no no_grad and no torch.tensor(…)")
        kept += [value, *torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)]
        check(torch.equal(inputs[0], mean) and torch.equal(inputs[1], variance), "what comes in should not be changed")
    for one, other, name in zip(found, expected, ("value", "gradient of the means", "gradient of the variances")):
        close(one, other, f"small variances: the {name} is not that of Σ_{{i<j}} D_ij. Is nothing added to v, and nothing "
                          "detached?", rtol=1e-3)


@pytest.mark.ex6
def test_ex6_without_a_loop_over_pairs():
    counts = []
    for count in (4, 64):
        with Operations() as seen:
            align.kl_all_pairs(*gaussians(count))
        counts.append((seen.count, seen.largest))
    (few, _), (many, largest) = counts
    assert many <= few + 2, f"{few} operations for 4 tasks, {many} for 64: write the sum over all i and j out, and pull the sums over i inside"
    assert largest <= 64 * 3, "there should be no tensor with an entry for every pair of tasks"


@pytest.mark.ex6
def test_ex6_a_mean_that_all_tasks_share_changes_nothing():
    mean, variance = gaussians(5)
    far = align.kl_all_pairs(mean + torch.tensor([3000.0, -2000.0, 500.0]), variance)
    close(far, align.kl_all_pairs(mean, variance), "only differences of means count, and the squares of large numbers lose "
                                                   "their digits: take what all means have in common away first", rtol=1e-2)


# ---------------------------------------------------------------------------------------- ex7: the inner step
@pytest.mark.ex7
def test_ex7_one_step_downhill():
    parameters = [nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([[3.0]]))]
    places = [parameter.data_ptr() for parameter in parameters]
    gradients = [torch.tensor([10.0, -10.0]), torch.tensor([[1000.0]])]
    meta.inner_step(dict(enumerate(parameters)).values(), gradients, 0.1)
    for parameter, place, expected in zip(parameters, places, ([0.0, 3.0], [[-97.0]])):
        assert parameter.grad is None and parameter.data_ptr() == place, "in place: no new tensor, and no .grad"
        close(parameter, expected, "θ - α · gradient, in place: is the sign right, is the rate there, does it reach every "
                                   "parameter? A parameter that is only given a new name is not changed")


@pytest.mark.ex7
def test_ex7_the_gradients_are_left_alone_and_there_is_no_memory():
    parameter, gradient = nn.Parameter(torch.zeros(2)), torch.ones(2)
    for _ in range(3):
        meta.inner_step([parameter], [gradient], 0.5)
    close(gradient, [1.0, 1.0], "the gradients should be as they were")
    close(parameter, [-1.5, -1.5], "three equal steps go three times as far: plain gradient descent, no momentum, no "
                                   "division by the size of the gradient")
    assert parameter.requires_grad and parameter.is_leaf, "no graph through the step: first order"


# ---------------------------------------------------------------------------- ex8: both stages of a round
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
            pytest.fail("the adapter changed between the query's forward pass and its gradient: both belong within the "
                        "block, at θ_i", pytrace=False)
        raise


def expect(found, expected, message):
    assert set(found) == set(expected), "{name: gradient} for every adapter parameter is to be returned"
    for name in expected:
        close(found[name], expected[name], f"{name}: {message}", rtol=1e-3, atol=1e-6)


@pytest.mark.ex8
def test_ex8_within_the_block_the_adapter_is_adapted():
    model, ((support, query),) = round_of_tasks(1)
    parameters = adapter_parameters(model)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    expected = dict(before)
    for _ in range(3):
        gradients = at_adapted(model, support, support, 0.5, 0)
        expected = {name: parameter - 0.5 * gradients[name] for name, parameter in expected.items()}
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(expected[name])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(before[name])
    first = label_loss(model, support)
    with meta.adapted_to(model, support, 0.5, 3) as losses:
        assert isinstance(losses, list), "the list of losses is to be yielded, once, after the last step"
        for name, parameter in parameters.items():
            close(parameter, expected[name], f"{name}: within the block it should be θ_i, after 3 steps on the support set; "
                                             "each step's gradient is taken where the one before has led", atol=1e-6)
    assert len(losses) == 3, f"a loss for each step is to be yielded, 3 here, not {len(losses)}"
    close(losses[0], first, "the first loss is that before any step, at θ")


@pytest.mark.ex8
def test_ex8_theta_comes_back_if_something_fails_and_no_random_number_is_used_up():
    model, ((support, _),) = round_of_tasks(1)
    before = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    drawing = model.register_forward_hook(lambda *_: torch.rand(3) is None or None)  # as dropout does
    with pytest.raises(KeyError), meta.adapted_to(model, support, 0.5, 1):
        raise KeyError
    drawing.remove()
    for name, parameter in adapter_parameters(model).items():
        check(torch.equal(parameter, before[name]), "θ should be back after the block, also if it failed: try … finally, "
              "from a copy (`.clone()`), in place (`copy_`)")
    check(torch.equal(torch.get_rng_state(), state), "the inner steps use random numbers up: take them within fork_rng(model)")


@pytest.mark.ex8
def test_ex8_an_inner_step_that_fails_leaves_theta_too_and_masks_differ():
    model, ((support, _),) = round_of_tasks(1)
    before, drawn = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}, []

    def draw(*_):
        drawn.append(torch.rand(3))
        if len(drawn) == 3:
            raise KeyError
    model.register_forward_hook(draw)
    with pytest.raises(KeyError), meta.adapted_to(model, support, 0.5, 3):
        pass
    for name, parameter in adapter_parameters(model).items():
        check(torch.equal(parameter, before[name]), "θ should be back if an inner step fails: the try is around them too")
    check(not torch.equal(drawn[0], drawn[1]), "each inner step draws other random numbers (dropout masks) than the one before")


@pytest.mark.ex8
def test_ex8_the_gradient_is_taken_at_the_adapted_parameters():
    model, episodes = round_of_tasks(1)
    expect(outer_gradient(model, episodes, 0.5, 2), at_adapted(model, *episodes[0], 0.5, 2),
           "∇ L(Q_i; θ_i): is it the query set, and is its forward pass made within the block in which the adapter is θ_i?")


@pytest.mark.ex8
def test_ex8_stage_2_draws_random_numbers_as_if_it_were_alone():
    model, episodes = round_of_tasks(2)
    model.register_forward_hook(lambda *_: torch.rand(3) is None or None)  # as dropout does
    states = []
    for inner_steps in (0, 2):
        torch.manual_seed(7)
        outer_gradient(model, episodes, 0.5, inner_steps)
        states.append(torch.get_rng_state())
    torch.manual_seed(7)
    torch.rand(3), torch.rand(3)  # one query pass for each task
    for state in states:
        check(torch.equal(state, torch.get_rng_state()), "the inner steps draw aside, and nothing else does: after the round "
              "the random state is as after its query passes, so the block itself is not within fork_rng")


@pytest.mark.ex8
def test_ex8_it_is_the_mean_over_the_tasks():
    model, episodes = round_of_tasks(3)
    episodes[0][1]["labels"][:, -1] = -100  # however many labels a task's query set has, it counts once
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
    expect(outer_gradient(model, episodes, 0.5, 0, losses), mean, "with k = 0 it is the mean of the query sets' gradients")
    for row in losses:
        assert len(row) == 1, "without inner steps a task's row of losses is its query loss alone"
        assert not row[-1].requires_grad, "the losses are for the log: detach them"


@pytest.mark.ex8
def test_ex8_the_shared_adapter_is_left_as_it_was():
    model, episodes = round_of_tasks(2)
    before = {name: parameter.detach().clone() for name, parameter in adapter_parameters(model).items()}
    losses, grads = [], {}
    for name, parameter in adapter_parameters(model).items():
        parameter.grad = grads[name] = torch.ones_like(parameter)
    found = outer_gradient(model, episodes, 0.5, 2, losses)
    assert not model.training, "train or eval mode is to stay as it was"
    for name, parameter in adapter_parameters(model).items():
        check(torch.equal(parameter, before[name]), "after the round every parameter is as it was: θ, not the last θ_i")
        check(parameter.grad is grads[name] and (parameter.grad == 1).all(), "no .grad is to be touched: gradients_of "
              "returns gradients, backward would add to what is there")
    assert all(not gradient.requires_grad for gradient in found.values()), "first order: no graph is kept"
    assert len(losses) == 2 and all(len(row) == 3 for row in losses), \
        "a row of losses for every task, if asked for: the support loss before each inner step, then the query loss"
    for (support, query_batch), (*_, query) in zip(episodes, losses):
        with meta.adapted_to(model, support, 0.5, 2):
            close(query, label_loss(model, query_batch).detach(), "the last loss of a row is L(Q_i; θ_i)")
    for first, second, query in losses:
        assert not any(loss.requires_grad for loss in (first, second, query)), "the losses are for the log: detach them"
        assert second < first, "the inner steps should lower the support loss"
        assert query > 0


# ------------------------------------------------------------------------------- ex9: a training step of Align-LoRA
def align_step(kind="kl", weight=2.0):
    """(what the exercise returned, its gradients, L_task, L_align, the gradients of their sum), on a tiny model."""
    model, batch = make_llama(), make_batch(seed=3, tasks=(0, 1))
    add_adapters(model, AdapterConfig("lora", rank=2, alpha=4))
    randomize_adapters(model)
    config, parameters = TrainConfig(align=kind, align_weight=weight), adapter_parameters(model)
    with align.collect_features(model) as features:
        loss = label_loss(model, batch)
    alignment = align.alignment_loss(features, batch, kind)
    expected = torch.autograd.grad(loss + weight * alignment, list(parameters.values()))
    passes = []
    counting = model.register_forward_hook(lambda *_: passes.append(1))
    returned = train.align_gradients(model, batch, config)
    counting.remove()
    assert not model.training, "train or eval mode is to stay as it was"
    return returned, parameters, loss, alignment, expected, len(passes)


@pytest.mark.ex9
@pytest.mark.parametrize("kind", ["kl", "mmd"])
def test_ex9_the_gradients_are_those_of_both_terms(kind):
    _, parameters, _, _, expected, _ = align_step(kind)
    for (name, parameter), gradient in zip(parameters.items(), expected):
        assert parameter.grad is not None, f"{name} has no gradient: the step is to leave them in .grad, by backward()"
        close(parameter.grad, gradient, f"{name}: the gradient should be that of L_task + λ · L_align. Is λ there, on the "
                                        "alignment alone? Has the alignment its gradient? Is its form config.align?", atol=1e-6)


@pytest.mark.ex9
def test_ex9_without_weight_it_is_lora_and_gradients_add_up():
    _, parameters, loss, _, _, _ = align_step(weight=0.0)
    model, batch = make_llama(), make_batch(seed=3, tasks=(0, 1))
    add_adapters(model, AdapterConfig("lora", rank=2, alpha=4))
    randomize_adapters(model)
    label_loss(model, batch).backward()
    plain = adapter_parameters(model)
    for name, parameter in parameters.items():
        close(parameter.grad, plain[name].grad, f"{name}: with λ = 0 the gradient is that of L_task alone", atol=1e-6)
    config = TrainConfig(align="kl", align_weight=0.0)
    train.align_gradients(model, batch, config)
    for name, parameter in plain.items():
        close(parameter.grad, 2 * parameters[name].grad, f"{name}: a gradient adds to what is in .grad, as backward does",
              atol=1e-6)


@pytest.mark.ex9
def test_ex9_what_is_returned():
    returned, _, loss, alignment, _, _ = align_step()
    assert set(returned) == {"loss", "alignment"}, 'the log is to have "loss" and "alignment"'
    close(returned["loss"], loss, '"loss" is L_task alone, so that it can be compared with LoRA\'s')
    close(returned["alignment"], alignment, '"alignment" is L_align, without λ')
    for name, value in returned.items():
        assert not value.requires_grad, f"{name} is for the log: detach it, or the whole graph is kept"


@pytest.mark.ex9
def test_ex9_one_forward_pass_is_enough():
    *_, passes = align_step()
    assert passes == 1, f"the features come from the pass that gives the loss: one forward pass, not {passes}"
