"""Adapters in, out, merged, saved and loaded: the base is never changed, and a file says all there is to say."""

import json

import pytest
import torch
from conftest import make_batch, make_llama, randomize_adapters
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tinylora_mtl import AdapterConfig, adapter_parameters, add_adapters, load_adapter, merge_adapters, remove_adapters, save_adapter
from tinylora_mtl.adapters import METHODS

IDS = make_batch()["input_ids"]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def config_for(method, **changes):
    return AdapterConfig(**{"method": method, "rank": 3, "alpha": 6, "heads": 4} | changes)


@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("method", METHODS)
def test_adapters_take_the_mode_of_their_layer(llama, method):
    """from_pretrained returns a model in evaluation mode; its adapters must not drop anything then."""
    before = llama(IDS).logits
    add_adapters(llama, config_for(method, dropout=0.5))
    torch.testing.assert_close(llama(IDS).logits, before, atol=1e-6, rtol=0)
    remove_adapters(llama)
    assert all(adapter.training for adapter in add_adapters(llama.train(), config_for(method)).values())


@pytest.mark.parametrize("method", METHODS)
def test_only_the_adapters_train(llama, method):
    adapters = add_adapters(llama, config_for(method))
    assert len(adapters) == 2 * 3  # gate, up and down projections of two layers
    trainable = {id(p) for p in llama.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in adapter_parameters(llama).values()}
    per_layer = {"lora": 2, "hydralora": 3, "rlora": 3, "mlora": 2}[method]
    assert len(adapter_parameters(llama)) == 6 * per_layer


def test_targets(llama):
    assert len(add_adapters(llama, config_for("lora", targets=("q_proj", "layers.0.mlp.up_proj")))) == 3
    remove_adapters(llama)
    names = list(add_adapters(llama, config_for("lora", targets="all-linear")))
    assert len(names) == 14 and "lm_head" not in names
    remove_adapters(llama)
    with pytest.raises(ValueError, match="c_attn.*down_proj, gate_proj, k_proj, lm_head, o_proj"):
        add_adapters(llama, config_for("lora", targets=("c_attn",)))
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


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("changes", [{}, {"rank_stabilized": True, "alpha": 5.0}, {"rank_stabilized": False}])
def test_a_reloaded_adapter_gives_the_same_logits(tmp_path, method, changes):
    model = make_llama()
    add_adapters(model, config_for(method, targets="all-linear", **changes))
    randomize_adapters(model)
    expected = logits(model)
    save_adapter(model, tmp_path / "a folder")
    other = make_llama()
    load_adapter(other, tmp_path / "a folder")
    assert torch.equal(logits(other), expected)
    save_adapter(other, tmp_path / "again")  # and saving what was loaded writes the same files
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "a folder" / file).read_bytes()


def test_half_precision_base_has_float32_adapters(llama):
    llama.to(torch.bfloat16)
    add_adapters(llama, config_for("rlora"))
    assert {parameter.dtype for parameter in adapter_parameters(llama).values()} == {torch.float32}
    llama.train()(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in adapter_parameters(llama).values())


def saved(tmp_path, method="lora"):
    model = make_llama()
    add_adapters(model, config_for(method))
    save_adapter(model, tmp_path)
    return tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"


def rewrite(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def corrupt(kind, config, weights):
    """One way to spoil an adapter folder; returns what the message must name."""
    tensors = load_file(weights)
    key = next(iter(tensors))
    if kind == "no weights":
        weights.unlink()
        return "adapter_model.safetensors"
    if kind == "cut off":
        weights.write_bytes(weights.read_bytes()[:-10])
        return "cannot? be read|can be read"
    if kind == "not json":
        config.write_text("{")
        return "can be read"
    if kind == "foreign":
        rewrite(config, lambda c: c.update(peft_type="IA3"))
        return "IA3"
    if kind == "dora":
        rewrite(config, lambda c: c.update(use_dora=True))
        return "use_dora"
    if kind == "shape":
        save_file(tensors | {key: torch.zeros(2, 2)}, weights)
        return rf"{key} has shape \[2, 2\], not"
    if kind == "missing":
        tensors.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight")
        save_file(tensors, weights)
        return "up_proj.lora_B.weight is missing"
    if kind == "extra":
        save_file(tensors | {"more": torch.zeros(2)}, weights)
        return "more is not known"
    save_file({k.replace("layers.1", "layers.7"): v for k, v in tensors.items()}, weights)
    return "no layer model.layers.7"


@pytest.mark.parametrize("kind", ["no weights", "cut off", "not json", "foreign", "dora", "shape", "missing", "extra",
                                  "other model"])
def test_a_bad_adapter_folder_is_refused_and_the_model_left_alone(tmp_path, kind):
    message = corrupt(kind, *saved(tmp_path))
    model = make_llama()
    before = state(model)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_adapter(model, tmp_path)
    assert list(model.state_dict()) == list(before)


def test_adding_twice_and_saving_nothing_are_refused(llama, tmp_path):
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(llama, tmp_path)
    add_adapters(llama, config_for("lora"))
    with pytest.raises(ValueError, match="already has adapters"):
        add_adapters(llama, config_for("lora"))
    remove_adapters(llama)
    with pytest.raises(ValueError, match="unknown method 'dora'; there are: lora, hydralora, rlora, mlora"):
        add_adapters(llama, config_for("dora"))
    with pytest.raises(ValueError, match="rank must be at least 1"):
        add_adapters(llama, config_for("lora", rank=0))
    llama.model.layers[0].self_attn.q_proj = nn.Linear(32, 32)
    with pytest.raises(ValueError, match="rank 300 is too large for a layer of 16 x 24"):  # but not for the first
        add_adapters(llama, config_for("lora", rank=300, targets=("q_proj", "gate_proj")))
    assert all(parameter.requires_grad for parameter in llama.parameters())  # a refusal freezes nothing
