"""R-LoRA and M-LoRA as the released code starts them: the start, the function, and the files."""

import pytest
import torch
from torch import nn

from tinylora_mtl.adapters import AdapterConfig, adapter_parameters, add_adapters, merge_adapters
from tinylora_mtl.config import TrainConfig
from tinylora_mtl.gallery import mlora_released, rlora_released
from tinylora_mtl.run.adapter_files import load_adapter, save_adapter
from tinylora_mtl.run.methods import find_method, in_gallery
from tinylora_mtl.run.models import load_model
from tinylora_mtl.run.settings import check


def layer(module, d_in=896, d_out=4864, **changes):
    torch.manual_seed(0)
    settings = {"rank": 4, "alpha": 32, "heads": 5, "dropout": 0.0} | changes
    return module.Layer(nn.Linear(d_in, d_out), AdapterConfig("x", **settings))


def test_the_start_is_that_of_the_released_code_with_its_fault():
    """On a layer 896 -> 4864 its A has a deviation of 5.8e-6, its heads from 2.5e-6 to 2.5e-3."""
    adapter = layer(rlora_released)
    factor = 4 ** 0.25 / 8
    assert adapter.lora_A.weight.std().item() == pytest.approx(factor ** 5 / 896 ** 0.5, rel=0.05)
    assert adapter.lora_A.weight.std().item() == pytest.approx(5.8e-6, rel=0.05)
    for i, head in enumerate(adapter.heads):
        assert head.std().item() == pytest.approx(factor ** (5 - i) / 4864 ** 0.5, rel=0.05)
    assert adapter.scaling == 16 and adapter.router.weight.abs().max() > 0
    at_rank_64 = layer(rlora_released, 32, 48, rank=64)  # r is the larger side
    assert at_rank_64.heads[-1].std().item() == pytest.approx(64 ** 0.25 / 8 / 8, rel=0.1)


@pytest.mark.parametrize("module", [rlora_released, mlora_released])
def test_the_layer_is_its_equation(module):
    """y = W x + b + s · (Σ_i w_i B_i z_i - B⁰ A⁰ x), head by head, after A and the heads have moved."""
    adapter, x = layer(module, 12, 10), torch.randn(3, 7, 12)
    A0, B0 = adapter.lora_A.weight.detach().clone(), adapter.heads.detach().clone()
    with torch.no_grad():
        for parameter in (adapter.lora_A.weight, adapter.heads):
            parameter += torch.randn_like(parameter)
    weights = torch.ones(3, 7, 5) if module is mlora_released else (x @ adapter.router.weight.T).softmax(-1)
    start = B0.sum(0) if module is mlora_released else B0.mean(0)
    expected = adapter.base(x) - adapter.scaling * x @ A0.T @ start.T
    for i in range(5):
        z = x @ adapter.lora_A.weight.T
        expected = expected + adapter.scaling * weights[..., i, None] * (z @ adapter.heads[i].T)
    assert torch.allclose(adapter(x), expected, atol=1e-4)


def test_it_starts_as_its_base_as_near_as_the_router_allows():
    x = torch.randn(5, 896)
    for module, most in ((mlora_released, 1e-6), (rlora_released, 1e-4)):
        adapter = layer(module)
        moved = (adapter(x) - adapter.base(x)).norm() / adapter.base(x).norm()
        assert moved < most


@pytest.mark.parametrize("method", ["rlora_released", "mlora_released"])
def test_a_file_holds_the_start_too(tmp_path, method):
    find_method(method)
    model, _, _ = load_model("mini", "cpu")
    torch.manual_seed(1)
    adapters = add_adapters(model, AdapterConfig(method, rank=2, heads=3))
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter += 0.1 * torch.randn_like(parameter)
    assert not any("start" in name for name in adapter_parameters(model))  # nor does it train
    save_adapter(model, tmp_path)
    again, _, _ = load_model("mini", "cpu")
    load_adapter(again, tmp_path)
    ids = torch.arange(5, 25).view(2, 10)
    assert torch.equal(model(ids).logits, again(ids).logits)
    starts = [adapter.start_A for adapter in adapters.values()]
    assert all(start.abs().max() > 0 for start in starts)
    if method == "mlora_released":
        expected = model(ids).logits
        merge_adapters(model)
        assert torch.allclose(model(ids).logits, expected, atol=1e-4)
    else:
        with pytest.raises(ValueError, match="routed"):
            merge_adapters(model)


def test_the_gallery_is_found_by_name_alone():
    assert {"rlora_released", "mlora_released"} <= set(in_gallery())
    find_method("../adapters")
    find_method(["rlora"])
    with pytest.raises(ValueError, match="unknown method '../adapters'; there are: lora"):
        check(TrainConfig(method="../adapters"))
