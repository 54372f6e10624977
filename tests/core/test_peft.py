"""PEFT as an independent implementation of LoRA: same weights, same outputs, same gradients, files both ways."""

import json

import pytest
import torch
from conftest import make_batch, make_llama, randomize_adapters
from transformers import GPT2Config, GPT2LMHeadModel

from tinylora_mtl import AdapterConfig, adapter_parameters, add_adapters, load_adapter, save_adapter

peft = pytest.importorskip("peft", reason="comes with the extra [test]")
IDS = make_batch()["input_ids"]


def make_gpt2():
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(GPT2Config(**sizes)).eval()


@pytest.mark.parametrize("make", [make_llama, make_gpt2])
@pytest.mark.parametrize("stabilized", [False, True])
def test_peft_reads_our_adapter_with_the_same_logits_and_gradients(tmp_path, make, stabilized):
    ours = make()
    add_adapters(ours, AdapterConfig(rank=3, alpha=7, rank_stabilized=stabilized))
    randomize_adapters(ours)
    save_adapter(ours, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path, is_trainable=True).eval()
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    ours(IDS, labels=IDS).loss.backward()
    theirs(IDS, labels=IDS).loss.backward()
    gradients = {name.removeprefix("base_model.model.").replace(".default", ""): p.grad
                 for name, p in theirs.named_parameters() if p.requires_grad}
    assert set(gradients) == set(adapter_parameters(ours))
    for name, parameter in adapter_parameters(ours).items():
        assert parameter.grad.any()
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make,targets", [(make_llama, ["q_proj", "up_proj"]), (make_llama, "all-linear"),
                                          (make_gpt2, ["c_attn"])])
@pytest.mark.parametrize("stabilized", [False, True])
def test_we_read_pefts_adapter(tmp_path, make, targets, stabilized):
    config = peft.LoraConfig(r=3, lora_alpha=7, use_rslora=stabilized, target_modules=targets, task_type="CAUSAL_LM",
                             fan_in_fan_out=make is make_gpt2)
    theirs = peft.get_peft_model(make(), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    theirs.save_pretrained(tmp_path)
    ours = make()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)


def theirs_in(folder, make=make_llama, **options):
    """A random adapter of PEFT's in a folder; returns the model with it."""
    model = peft.get_peft_model(make(), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return model.eval()


SAME = {  # options that mean something which is here too
    "init orthogonal": dict(target_modules=["q_proj"], init_lora_weights="orthogonal"),
    "init gaussian": dict(target_modules=["q_proj"], init_lora_weights="gaussian"),
    "output head": dict(target_modules=["q_proj", "lm_head"]),
    "one rank for all": dict(target_modules=["q_proj"], rank_pattern={"q_proj": 2}),
    "a pattern for none": dict(target_modules=["q_proj"], rank_pattern={"nowhere": 2}, alpha_pattern={"nowhere": 1}),
    "one alpha for all": dict(target_modules=["q_proj", "k_proj"], alpha_pattern={"k_proj": 9, "self_attn.q_proj": 9}),
    "both, stabilised": dict(target_modules=["q_proj"], rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 9},
                             use_rslora=True),
    "a dot that is any character": dict(target_modules=["q_proj"], alpha_pattern={"q.proj": 2}),
    "some layers": dict(target_modules=["q_proj"], layers_to_transform=[1], exclude_modules=["nowhere"])}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", SAME)
def test_options_that_mean_the_same_are_read(tmp_path, kind):
    theirs, ours = theirs_in(tmp_path, **SAME[kind]), make_llama()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(ours(IDS).logits, make_llama()(IDS).logits)


OTHER = {  # the field: options that mean what is not here
    "rank_pattern": dict(target_modules=["q_proj", "k_proj"], rank_pattern={"q_proj": 2}),
    "alpha_pattern": dict(target_modules=["q_proj", "k_proj"], alpha_pattern={"q_proj": 2}),
    "alpha_pattern ": dict(target_modules=["q_proj"], alpha_pattern={r"layers\\.0.*q_proj": 2}),
    "modules_to_save": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "target_parameters": dict(target_modules=["q_proj"], target_parameters=["mlp.down_proj.weight"]),
    "trainable_token_indices": dict(target_modules=["q_proj"], trainable_token_indices=[1, 2]),
    "init_lora_weights": dict(target_modules=["q_proj"], init_lora_weights="pissa"),
    "use_dora": dict(target_modules=["q_proj"], use_dora=True), "bias": dict(target_modules=["q_proj"], bias="all")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("field", OTHER)
def test_options_that_mean_something_else_are_refused_by_name(tmp_path, field):
    theirs_in(tmp_path, **OTHER[field])
    ours = make_llama()
    with pytest.raises(ValueError, match=f"not an adapter that can be loaded: it(s| uses) {field.strip()}"):
        load_adapter(ours, tmp_path)
    assert torch.equal(ours(IDS).logits, make_llama()(IDS).logits)


@pytest.mark.filterwarnings("ignore")
def test_a_base_weight_in_the_file_is_read_over_only_if_it_is_the_models_own(tmp_path):
    theirs_in(tmp_path, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="lm_head.base_layer.weight is not known"):
        load_adapter(make_llama(seed=1), tmp_path)


def test_same_dropout_place_as_peft():
    """With the same random state both drop the same entries of x, in the branch only."""
    ours, theirs = make_llama(), make_llama()
    add_adapters(ours, AdapterConfig(rank=3, alpha=6, dropout=0.4, targets=("layers.1.mlp.down_proj",)))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=3, lora_alpha=6, lora_dropout=0.4,
                                                         target_modules=["model.layers.1.mlp.down_proj"]))
    randomize_adapters(ours)
    with torch.no_grad():
        for a, b in zip(adapter_parameters(ours).values(), [p for n, p in theirs.named_parameters() if "lora_" in n]):
            b.copy_(a)
    outputs = []
    for model in (ours, theirs):
        torch.manual_seed(5)
        outputs.append(model.train()(IDS).logits)
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


def test_what_an_older_description_lacks_has_pefts_default(tmp_path):
    theirs, file = theirs_in(tmp_path, r=8, lora_alpha=8, target_modules=["q_proj"]), tmp_path / "adapter_config.json"
    ours, description = make_llama(), json.loads(file.read_text())
    file.write_text(json.dumps({name: value for name, value in description.items() if name not in ("r", "lora_alpha")}))
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, atol=1e-5, rtol=1e-5)
