"""Adapters in, out and merged: the base is never changed."""

import pytest
import torch
from conftest import make_batch, make_llama, randomize_adapters
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tinylora_mtl import (AdapterConfig, LoRALinear, adapter_parameters, add_adapters, merge_adapters,
                          remove_adapters)
from tinylora_mtl.adapters import LAYERS

IDS = make_batch()["input_ids"]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def config_for(method, **changes):
    return AdapterConfig(**{"method": method, "rank": 3, "alpha": 6, "heads": 4} | changes)


@pytest.mark.parametrize("method", LAYERS)
def test_step_zero_equals_the_base_and_removing_gives_it_back_bit_for_bit(llama, method):
    before, weights = logits(llama), state(llama)
    add_adapters(llama, config_for(method))
    torch.testing.assert_close(logits(llama), before, atol=1e-6, rtol=0)
    randomize_adapters(llama)
    assert (logits(llama) - before).abs().max() > 1e-3
    optimizer = torch.optim.SGD(adapter_parameters(llama).values(), lr=0.1)
    llama.train()(IDS, labels=IDS).loss.backward()
    optimizer.step()
    remove_adapters(llama)
    after = state(llama)
    assert list(after) == list(weights) and all(torch.equal(after[name], weights[name]) for name in weights)
    assert torch.equal(logits(llama), before)
    assert all(parameter.requires_grad for parameter in llama.parameters())  # as it was before


@pytest.mark.parametrize("method", LAYERS)
def test_adapters_take_the_mode_of_their_layer(llama, method):
    """from_pretrained returns a model in evaluation mode; its adapters must not drop anything then."""
    before = llama(IDS).logits
    add_adapters(llama, config_for(method, dropout=0.5))
    torch.testing.assert_close(llama(IDS).logits, before, atol=1e-6, rtol=0)
    remove_adapters(llama)
    assert all(adapter.training for adapter in add_adapters(llama.train(), config_for(method)).values())


@pytest.mark.parametrize("method", LAYERS)
def test_only_the_adapters_train(llama, method):
    adapters = add_adapters(llama, config_for(method))
    assert len(adapters) == 2 * 3  # gate, up and down projections of two layers
    trainable = {id(p) for p in llama.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter_parameters(llama).values()}
    per_layer = {"lora": 2, "hydralora": 3, "rlora": 3, "mlora": 2}[method]
    assert len(adapter_parameters(llama)) == 6 * per_layer


@pytest.mark.parametrize("method,router,on_x,on_z,s,random", [  # as in the papers' tables; s of rank 4, alpha 32
    ("lora", False, 0.0, None, 8.0, None), ("hydralora", True, 0.0, 0.0, 8.0, False),
    ("rlora", True, 0.0, 0.1, 16.0, True), ("mlora", False, 0.0, 0.1, 16.0, True)])
def test_what_sets_the_methods_apart(method, router, on_x, on_z, s, random):
    def adapter_of(**changes):
        return add_adapters(make_llama(), AdapterConfig(method, rank=4, alpha=32, **changes)).popitem()[1]

    def rates(adapter):
        return adapter.dropout.p, adapter.head_dropout.p if method != "lora" else None
    adapter = adapter_of()
    assert (getattr(adapter, "router", None) is not None) == router
    assert rates(adapter) == (on_x, on_z) and adapter.scaling == s
    assert adapter_of(rank_stabilized=s == 8.0).scaling == 24.0 - s  # the other one
    assert rates(adapter_of(dropout=0.3)) == (0.0 if on_z else 0.3, 0.3 if on_z else on_z)
    if method != "lora":
        assert adapter.heads.shape == (5, 16, 4) and bool(adapter.heads.any()) == random
        assert bool(adapter_of(random_init=not random).heads.any()) != random
        assert len(adapter_of(heads=2).heads) == 2


def test_defaults_of_the_config():
    assert AdapterConfig() == AdapterConfig("lora", rank=8, alpha=16, dropout=None, heads=5, targets=None)


def test_targets(llama):
    assert len(add_adapters(llama, config_for("lora", targets=("q_proj", "layers.0.mlp.up_proj")))) == 3
    remove_adapters(llama)
    names = list(add_adapters(llama, config_for("lora", targets="all-linear")))
    assert len(names) == 14 and "lm_head" not in names
    remove_adapters(llama)
    assert len(add_adapters(llama, config_for("lora", targets="up_proj"))) == 2
    remove_adapters(llama)
    assert list(add_adapters(llama, config_for("lora", targets=("lm_head", "layers.0.mlp.up_proj")))) == [
        "model.layers.0.mlp.up_proj", "lm_head"]  # in the model's order
    remove_adapters(llama)
    llama.model.layers = llama.model.layers[:1]
    llama.model.layers[0].mlp.up_proj = nn.Identity()  # no longer all of the papers' targets: all but the head
    assert len(add_adapters(llama, config_for("lora"))) == 6
    remove_adapters(llama)
    with pytest.raises(ValueError, match="c_attn.*down_proj, gate_proj, k_proj, lm_head, o_proj"):
        add_adapters(llama, config_for("lora", targets=("c_attn",)))
    with pytest.raises(ValueError, match="the target 'proj'"):  # the last part of a name, not its last letters
        add_adapters(llama, config_for("lora", targets=("q_proj", "proj")))
    assert not adapter_parameters(llama)


def test_any_module_and_gpt2s_conv1d():
    plain = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    x = torch.randn(7, 4)
    expected = plain(x)
    assert list(add_adapters(plain, config_for("rlora", dropout=0.0))) == ["0", "2"]
    torch.testing.assert_close(plain(x), expected, atol=1e-6, rtol=0)

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()
    before = logits(gpt2)
    adapters = add_adapters(gpt2, config_for("mlora"))
    assert [name.rsplit(".", 2)[-2:] for name in adapters] == [["attn", "c_attn"], ["attn", "c_proj"], ["mlp", "c_fc"],
                                                             ["mlp", "c_proj"]]
    torch.testing.assert_close(logits(gpt2), before, atol=1e-6, rtol=0)
    randomize_adapters(gpt2)
    adapted = logits(gpt2)
    merge_adapters(gpt2)
    torch.testing.assert_close(logits(gpt2), adapted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["lora", "mlora"])
def test_merged_equals_adapted(llama, method):
    add_adapters(llama, config_for(method))
    randomize_adapters(llama)
    adapted = logits(llama)
    merge_adapters(llama)
    torch.testing.assert_close(logits(llama), adapted, atol=1e-5, rtol=1e-5)
    assert not any("lora" in name for name, _ in llama.named_modules())
    merge_adapters(llama)  # nothing left to merge: nothing changes
    torch.testing.assert_close(logits(llama), adapted, atol=1e-5, rtol=1e-5)


def test_merging_rounds_once_to_the_type_of_the_base(llama):
    llama.to(torch.bfloat16)
    adapters = add_adapters(llama, config_for("lora"))
    randomize_adapters(llama)
    expected = {name: (adapter.base.weight.float() + 2 * adapter.lora_B.weight @ adapter.lora_A.weight).bfloat16()
                for name, adapter in adapters.items()}
    merge_adapters(llama)
    assert all(torch.equal(llama.get_submodule(name).weight, weight) for name, weight in expected.items())


def test_adapters_put_in_by_hand_come_out_too():
    """Without add_adapters nobody froze the rest, so nothing is said about what trains."""
    model = nn.Sequential(LoRALinear(nn.Linear(4, 5), rank=2, alpha=2), nn.Linear(5, 2))
    remove_adapters(model)
    assert type(model[0]) is nn.Linear and not model[0].weight.requires_grad and model[1].weight.requires_grad


def test_merging_a_tied_weight_is_refused():
    model = make_llama(tie_word_embeddings=True)
    add_adapters(model, config_for("lora", targets=("lm_head",)))
    before = state(model)
    with pytest.raises(ValueError, match="lm_head is used in a second place"):
        merge_adapters(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", ["hydralora", "rlora"])
def test_merging_a_routed_adapter_is_refused_and_changes_nothing(llama, method):
    add_adapters(llama, config_for(method))
    randomize_adapters(llama)
    before, weights = logits(llama), state(llama)
    with pytest.raises(ValueError, match="routed"):
        merge_adapters(llama)
    assert torch.equal(logits(llama), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in llama.state_dict().items())


def test_half_precision_base_has_float32_adapters(llama):
    llama.to(torch.bfloat16)
    add_adapters(llama, config_for("rlora"))
    assert {parameter.dtype for parameter in adapter_parameters(llama).values()} == {torch.float32}
    llama.train()(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(llama).values())


def test_what_cannot_be_is_refused_and_freezes_nothing(llama):
    before = list(llama.state_dict())
    for config, message in [(config_for("dora"), "unknown method 'dora'; there are: lora, hydralora, rlora, mlora"),
                            (config_for("lora", rank=0), "rank must be at least 1"),
                            (config_for("rlora", heads=1), "heads must be at least 2"),
                            (config_for("lora", dropout=1.0), "dropout must be at least 0 and below 1, got 1.0"),
                            (config_for("mlora", dropout=-0.1), "dropout must be at least 0 and below 1, got -0.1"),
                            (config_for("lora", targets=("up_proj", "c_attn")), "no linear layer matches")]:
        with pytest.raises(ValueError, match=message):
            add_adapters(llama, config)
    assert list(llama.state_dict()) == before and all(parameter.requires_grad for parameter in llama.parameters())
    add_adapters(llama, config_for("lora"))
    with pytest.raises(ValueError, match="already has adapters"):
        add_adapters(llama, config_for("lora"))
