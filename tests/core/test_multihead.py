"""MultiHeadLoRALinear against a loop over the heads, and its start against R-LoRA's table."""

import math

import pytest
import torch
from torch import nn

from tinylora_mtl import LoRALinear, MultiHeadLoRALinear
from tinylora_mtl.multihead import combine_heads, random_start
from tinylora_mtl.run.likeness import cosines, head_cosines, mean_of_pairs

HYDRA = dict(rank=3, alpha=7, heads=4)
RLORA = HYDRA | dict(random_init=True, rank_stabilized=True, head_dropout=0.5)


def loop_over_heads(layer, x):
    """The published form: y = W x + b + s Σ_i w_i B_i A x, head after head."""
    A = layer.lora_A.weight
    w = torch.softmax(x @ layer.router.weight.T, -1) if layer.router is not None else x.new_ones(*x.shape[:-1], 4)
    y = layer.base(x)
    for i, B in enumerate(layer.heads):
        y = y + layer.scaling * w[..., i:i + 1] * (x @ A.T @ B.T)
    return y


@pytest.mark.parametrize("shape", [(7, 5), (2, 3, 5)])
@pytest.mark.parametrize("routed", [True, False])
def test_forward_and_gradients_are_those_of_a_loop_over_heads(shape, routed):
    torch.manual_seed(0)
    layer = MultiHeadLoRALinear(nn.Linear(5, 6), **HYDRA, routed=routed)
    nn.init.normal_(layer.heads, std=0.1)  # outputs of size 1: sin of large ones would blow rounding up
    x = torch.randn(shape, requires_grad=True)
    parameters = [x, layer.heads, layer.lora_A.weight] + ([layer.router.weight] if routed else [])
    torch.testing.assert_close(layer(x), loop_over_heads(layer, x))
    ours = torch.autograd.grad(layer(x).sin().sum(), parameters)
    theirs = torch.autograd.grad(loop_over_heads(layer, x).sin().sum(), parameters)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_no_tensor_holds_every_heads_output():
    """The largest tensor of the branch is [tokens, N·r] or [tokens, d_out], never [tokens, N, d_out]."""
    from torch.utils._python_dispatch import TorchDispatchMode
    sizes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (result if isinstance(result, (tuple, list)) else [result])
                         if isinstance(t, torch.Tensor))
            return result

    layer = MultiHeadLoRALinear(nn.Linear(20, 64), rank=2, alpha=4, heads=8)
    with Watch():
        layer(torch.randn(100, 20)).sum().backward()
    assert max(sizes) <= 100 * 64 < 100 * 8 * 64


@pytest.mark.parametrize("options", [HYDRA, RLORA, RLORA | {"routed": False}])
def test_start_is_the_base_layer(options):
    torch.manual_seed(0)
    base = nn.Linear(896, 512)
    before = base.weight.clone()
    layer = MultiHeadLoRALinear(base, **options | {"head_dropout": 0.0})
    x = torch.randn(20, 896)
    torch.testing.assert_close(layer(x), base(x), atol=1e-5, rtol=0)  # outputs are of order 0.6
    assert (layer(x) - base(x)).norm() / base(x).norm() < 1e-6
    assert torch.equal(base.weight, before)


def test_random_start_has_the_papers_statistics_for_every_head():
    """Table 1 for a layer 896 -> 4864, γ = 64: std of A 3.5e-2, of each head 1.5e-2 (times √(1 - 1/N), centred)."""
    torch.manual_seed(0)
    layer = MultiHeadLoRALinear(nn.Linear(896, 4864), rank=4, alpha=32, heads=5, random_init=True)
    scale = 4864 ** 0.25 / math.sqrt(64)
    assert scale / math.sqrt(896) == pytest.approx(3.5e-2, rel=0.01)
    assert scale / math.sqrt(4864) == pytest.approx(1.5e-2, rel=0.01)
    assert layer.lora_A.weight.std().item() == pytest.approx(scale / math.sqrt(896), rel=0.05)
    for head in layer.heads:
        assert head.std().item() == pytest.approx(scale / math.sqrt(4864) * math.sqrt(1 - 1 / 5), rel=0.05)
        assert head.mean().item() == pytest.approx(0, abs=1e-3)
    torch.testing.assert_close(layer.heads.sum(0), torch.zeros(4864, 4), atol=1e-6, rtol=0)
    assert not layer.router.weight.any()


def test_gamma_divides_the_start_by_its_root():
    stds = []
    for gamma in (16, 64):
        torch.manual_seed(0)
        A, heads = torch.empty(4, 100), torch.empty(3, 200, 4)
        random_start(A, heads, gamma)
        stds.append((A.std().item(), heads.std().item()))
    assert stds[0][0] / stds[1][0] == pytest.approx(2) and stds[0][1] / stds[1][1] == pytest.approx(2)


def test_centred_heads_are_the_papers_function_at_the_start():
    """(W - s B̄ A) x + s Σ w_i B_i A x with any router equals W x + s Σ w_i (B_i - B̄) A x, since Σ w_i = 1."""
    torch.manual_seed(0)
    layer = MultiHeadLoRALinear(nn.Linear(5, 6), **HYDRA, random_init=True)
    nn.init.normal_(layer.router.weight)
    drawn = layer.heads.detach() + torch.randn(6, 3)  # before centring: the same heads, shifted by any B̄
    mean = drawn.mean(0)
    x = torch.randn(7, 5)
    with torch.no_grad():
        ours = layer(x)
        layer.base.weight -= layer.scaling * mean @ layer.lora_A.weight
        layer.heads.copy_(drawn)
        paper = layer(x)
    torch.testing.assert_close(ours, paper)


def test_centred_heads_give_A_no_gradient_at_first_and_the_papers_do():
    """A's gradient comes through Σ w_i B_i: 0 for centred heads under a uniform router, B̄ in the paper's form."""
    torch.manual_seed(0)
    layer = MultiHeadLoRALinear(nn.Linear(5, 6), **HYDRA, random_init=True)
    x, gradients = torch.randn(7, 5), []
    for shift in (0.0, torch.randn(6, 3)):  # the paper's: not centred; what it takes off W has no gradient on A
        with torch.no_grad():
            layer.heads += shift
        gradients.append(torch.autograd.grad(layer(x).square().sum(), layer.lora_A.weight)[0].norm())
    assert gradients[0] < 1e-5 < 1e-1 < gradients[1]


def test_multi_head_dropout_has_a_mask_of_its_own_for_every_head_and_every_value():
    torch.manual_seed(0)
    layer = MultiHeadLoRALinear(nn.Linear(5, 12), rank=3, alpha=1, heads=4, head_dropout=0.5, routed=False)
    with torch.no_grad():
        layer.base.weight.zero_(), layer.base.bias.zero_()
        layer.scaling = 1.0
        for i in range(4):  # head i copies z into outputs 3i, 3i + 1, 3i + 2
            layer.heads[i, 3 * i:3 * i + 3] = torch.eye(3)
    x = torch.randn(4000, 5)
    z = x @ layer.lora_A.weight.T
    kept = (layer(x).unflatten(-1, (4, 3)) / z[:, None]).round() > 0  # [tokens, N, r]
    flat = kept.flatten(1).float()
    correlation = torch.corrcoef(flat.T) - torch.eye(12)
    assert (flat.mean(0) - 0.5).abs().max() < 0.05
    assert correlation.abs().max() < 0.08  # independent across heads and within a head
    layer.eval()
    torch.testing.assert_close(layer(x), z.repeat(1, 4))  # no mask in evaluation


def test_hydraloras_dropout_has_a_mask_on_x_for_every_head():
    torch.manual_seed(0)
    layer = MultiHeadLoRALinear(nn.Linear(6, 4), rank=1, alpha=1, heads=4, dropout=0.5, routed=False)
    with torch.no_grad():
        layer.base.weight.zero_(), layer.base.bias.zero_()
        layer.lora_A.weight.fill_(1.0)
        layer.heads.copy_(torch.eye(4)[:, :, None])  # output i is head i's A drop_i(x)
    y = layer(torch.ones(4000, 6)) / layer.scaling
    assert (torch.corrcoef(y.T) - torch.eye(4)).abs().max() < 0.08
    assert y.mean().item() == pytest.approx(6, rel=0.03)


def cosine(a, b):
    a, b = a.flatten().tolist(), b.flatten().tolist()
    return sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_cosines_against_a_loop():
    torch.manual_seed(0)
    vectors = torch.randn(4, 6)
    pairs = [cosine(vectors[i], vectors[j]) for i in range(4) for j in range(i)]
    assert mean_of_pairs(cosines(vectors)).item() == pytest.approx(sum(pairs) / 6, abs=1e-6)
    assert cosines(vectors)[1, 3].item() == pytest.approx(cosine(vectors[1], vectors[3]), abs=1e-6)


def test_logged_cosines_are_those_of_the_heads_of_each_layer():
    torch.manual_seed(0)
    layers = [MultiHeadLoRALinear(nn.Linear(5, 6), **HYDRA), MultiHeadLoRALinear(nn.Linear(6, 3), **HYDRA)]
    for layer in layers:
        nn.init.normal_(layer.heads)
    loops = [sum(cosine(layer.heads[i], layer.heads[j]) for i in range(4) for j in range(i)) / 6 for layer in layers]
    model = nn.Sequential(nn.ModuleDict({"block": nn.ModuleList(layers)}))
    assert head_cosines(model) == {"head_cosine": [round(mean, 4) for mean in loops]}


@pytest.mark.parametrize("count", [2, 3, 5])
def test_random_heads_start_at_minus_one_over_the_others(count):
    """Σ_{i≠j} B_i·B_j = -Σ_i B_i·B_i for centred heads: exactly -1/(N-1) weighted by length, nearly so in the mean."""
    torch.manual_seed(count)
    adapter = MultiHeadLoRALinear(nn.Linear(40, 60), rank=4, alpha=8, heads=count, random_init=True)
    flat = adapter.heads.detach().flatten(1).double()
    gram = flat @ flat.T
    weighted = (gram.sum() - gram.trace()) / (count - 1) / gram.trace()
    assert weighted.item() == pytest.approx(-1 / (count - 1), abs=1e-6)
    assert head_cosines(nn.Sequential(adapter))["head_cosine"] == [pytest.approx(-1 / (count - 1), abs=0.01)]


def test_the_log_has_null_for_zero_heads_and_nothing_without_several_heads():
    zero = MultiHeadLoRALinear(nn.Linear(5, 6), **HYDRA)
    assert head_cosines(nn.Sequential(zero, nn.Linear(6, 6))) == {"head_cosine": [None]}
    for layer in (MultiHeadLoRALinear(nn.Linear(5, 6), **HYDRA | {"heads": 1}), LoRALinear(nn.Linear(5, 6), 2, 4)):
        assert head_cosines(nn.Sequential(layer)) == {}


def test_zero_heads_become_near_copies():
    """They have near-identical first gradients, where R-LoRA's heads start apart."""
    torch.manual_seed(0)
    layer, goal = MultiHeadLoRALinear(nn.Linear(32, 24), **HYDRA), nn.Linear(32, 24)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(100):
        x = torch.randn(64, 32)
        optimizer.zero_grad()
        (layer(x) - goal(x)).square().mean().backward()
        optimizer.step()
    assert head_cosines(nn.Sequential(layer))["head_cosine"][0] > 0.7


def test_router_sees_x_without_dropout_and_weighs_in_float32():
    layer = MultiHeadLoRALinear(nn.Linear(5, 6).to(torch.bfloat16), **RLORA, dropout=0.5)
    seen = []
    layer.router.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    x = torch.randn(7, 5).to(torch.bfloat16)
    layer(x)
    assert torch.equal(seen[0][0], x.float()) and seen[0][1].dtype == torch.float32


def test_combine_heads_without_weights_adds_the_heads_up():
    z, heads = torch.randn(7, 4, 3), torch.randn(4, 6, 3)
    torch.testing.assert_close(combine_heads(z, None, heads), sum(z[:, i] @ heads[i].T for i in range(4)))


@pytest.mark.parametrize("change", [{"heads": 0}, {"rank": 0}, {"heads": 1, "random_init": True}])
def test_bad_values(change):
    with pytest.raises(ValueError, match="must be at least"):
        MultiHeadLoRALinear(nn.Linear(5, 6), **HYDRA | change)
