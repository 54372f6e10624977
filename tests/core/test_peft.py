"""PEFT as an independent implementation of LoRA: same weights, same outputs, same gradients, files both ways."""

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
