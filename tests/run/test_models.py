"""Any causal language model: families of other shapes than the embedded one, folders, Hub names, dtypes."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import randomize_adapters

from tinylora_mtl import (AdapterConfig, adapter_parameters, add_adapters, kl_alignment, load_adapter, merge_adapters,
                          remove_adapters, save_adapter)
from tinylora_mtl.align import alignment_loss, collect_features
from tinylora_mtl.lab import heads
from tinylora_mtl.run import models, training
from tinylora_mtl.batching import collate, encode
from tinylora_mtl.loss import forward, label_loss
from tinylora_mtl.evaluate import generate_answers
from tinylora_mtl.run.models import load_model, pick_dtype, pick_length
from tinylora_mtl.run.ranking import log_likelihoods
from tinylora_mtl.targets import linear_layers
from tinylora_mtl.data.tasks import load_tasks
from tinylora_mtl.config import TrainConfig

TOKENIZER = load_model("mini", "cpu")[1]
README = Path(__file__).parents[2] / "README.md"
SMALL = dict(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=2, initializer_range=0.3)
GATED = SMALL | dict(intermediate_size=48, num_key_value_heads=2, head_dim=8)
MOE = GATED | dict(moe_intermediate_size=16, num_experts=4, num_local_experts=4, num_experts_per_tok=2)
GPT2 = dict(vocab_size=len(TOKENIZER), n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1,
            initializer_range=0.3)
FAMILIES = {  # name: (its configuration, the layers that adapters go into without --targets, of two blocks)
    "Llama": (GATED, 6), "Mistral": (GATED | dict(sliding_window=16), 6), "Qwen2": (GATED, 6), "Qwen3": (GATED, 6),
    "Gemma": (GATED, 6), "Gemma2": (GATED | dict(sliding_window=16), 6),
    "Gemma3Text": (GATED | dict(sliding_window=16), 6),
    "Olmo2": (GATED, 6), "Granite": (GATED, 6), "Phi3": (GATED, 8), "GPT2": (GPT2, 8),
    "GPTNeoX": (SMALL | dict(intermediate_size=64), 8),
    "OPT": (SMALL | dict(ffn_dim=64, word_embed_proj_dim=32, init_std=0.3), 12),
    "Bloom": (SMALL | dict(n_layer=2, n_head=4), 8), "Phi": (SMALL | dict(intermediate_size=64), 12),
    "Falcon": (SMALL, 8), "GPTNeo": (SMALL | dict(
        num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]), 12),
    "StableLm": (GATED, 6), "SmolLM3": (GATED, 6), "Cohere": (GATED | dict(logit_scale=1.0), 6), "Lfm2": (GATED | dict(
        layer_types=["conv", "full_attention"]), 12),
    # mixtures of experts: in one parameter, or in layers of their own
    "Qwen2Moe": (MOE | dict(shared_expert_intermediate_size=32), 6), "Qwen3Moe": (MOE, 8), "Phimoe": (MOE, 8),
    "Olmoe": (MOE, 8), "GptOss": (MOE, 8),
    # recurrent ones, which use some of their layers without calling them
    "Mamba": (SMALL | dict(state_size=4), 2), "FalconH1": (GATED | dict(
        mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1), 6),
    "Jamba": (MOE | dict(mamba_d_state=4, attn_layer_offset=1, attn_layer_period=2, num_experts=2,
                         expert_layer_offset=1, expert_layer_period=2, use_mamba_kernels=False), 3),
}
ALL = FAMILIES | {  # it uses the weights of one block in several places, so that nothing can be merged into them
    "Zamba2": (GATED | dict(mamba_d_state=8, mamba_headdim=8, n_mamba_heads=8, mamba_ngroups=1, num_hidden_layers=4,
                            layers_block_type=["mamba", "hybrid"] * 2, num_mem_blocks=1, attention_head_dim=16), 26)}


def make(family):
    """A random model of a family, large enough in its weights to have an opinion."""
    name = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
    config = {"Gemma3Text": "Gemma3TextConfig"}.get(family, f"{family}Config")
    torch.manual_seed(0)
    name = "Gemma3ForCausalLM" if family == "Gemma3Text" else name
    return getattr(transformers, name)(getattr(transformers, config)(**ALL[family][0])).eval()


def test_the_readme_counts_the_families():
    assert len(ALL) == 30 and "thirty families are in the tests" in README.read_text(encoding="utf-8")


def make_batch(extra=()):
    """Four samples of different lengths, and rows of padding length besides."""
    samples = [*load_tasks(["word_sorting"])[0].train[:2], *load_tasks(["web_of_lies"])[0].train[:2], *extra]
    return collate([encode(TOKENIZER, sample, 100) for sample in samples], [0] * len(samples), TOKENIZER.pad_token_id)


@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_learn_merge_and_come_back_in_every_family(tmp_path, family):
    model, batch = make(family), make_batch()
    base = copy.deepcopy(model)
    adapters = add_adapters(model, AdapterConfig(rank=4, alpha=32))
    assert len(adapters) == ALL[family][1] and not any("head" in name for name in adapters)
    rounding = 1e-6 if family in ("Mamba", "Jamba") else 0  # their next operation sees y + 0 with other strides than y
    torch.testing.assert_close(label_loss(model, batch), label_loss(base, batch), rtol=rounding, atol=0)
    optimizer, losses = torch.optim.AdamW(adapter_parameters(model).values(), lr=2e-2), []
    for _ in range(40):
        optimizer.zero_grad()
        losses.append(label_loss(model, batch))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    with torch.no_grad():
        trained = forward(model, batch["input_ids"], batch["attention_mask"], 5).logits
        save_adapter(model, tmp_path / "adapter")
        load_adapter(base, tmp_path / "adapter")
        loaded = forward(base, batch["input_ids"], batch["attention_mask"], 5).logits
        torch.testing.assert_close(loaded, trained, rtol=0, atol=0)
        merge_adapters(model)
        model.save_pretrained(tmp_path / "merged")
        TOKENIZER.save_pretrained(tmp_path / "merged")
        merged, _, _ = load_model(str(tmp_path / "merged"), "cpu")  # a plain folder, no adapter in it
        plain = forward(merged, batch["input_ids"], batch["attention_mask"], 5).logits
        torch.testing.assert_close(plain, trained, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing_in_any_family(family):
    """The loss of a batch is the same beside a far longer row without labels; so are generated and chosen answers."""
    model, batch = make(family), make_batch()
    longer = make_batch([("word " * 80, "x")])
    longer["labels"][-1] = -100
    assert longer["labels"].shape[1] > batch["labels"].shape[1] + 20
    torch.testing.assert_close(label_loss(model, longer), label_loss(model, batch), rtol=1e-4, atol=1e-5)
    samples = [*load_tasks(["word_sorting"])[0].test[:3], *load_tasks(["web_of_lies"])[0].test[:2]]
    alone = [generate_answers(model, TOKENIZER, [sample], 120)[0].removesuffix(" …") for sample in samples]
    together = [answer.removesuffix(" …") for answer in generate_answers(model, TOKENIZER, samples, 120)]
    assert all(a.startswith(b) or b.startswith(a) for a, b in zip(alone, together)) and any(alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_likelihoods_from_the_cache_are_those_of_whole_sequences(family):
    model = make(family)
    prompts = [TOKENIZER(prompt)["input_ids"] for prompt, _ in load_tasks(["web_of_lies"])[0].test[:3]] + [[5, 6, 7]]
    options = [[9, 1], [10, 11, 12, 1], [13], [9, 10, 1]]
    batch = collate([(prompt, prompt) for prompt in prompts], [0] * 4, TOKENIZER.pad_token_id)
    with torch.no_grad():
        found = log_likelihoods(model, batch, options)
        for prompt, row in zip(prompts, found):
            for option, value in zip(options, row):
                logits = model(torch.tensor([prompt + option])).logits[0].log_softmax(-1)
                whole = sum(logits[len(prompt) + i - 1, token] for i, token in enumerate(option))
                torch.testing.assert_close(value, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ALL)
def test_features_are_aligned_by_position_in_every_family(family):
    """The alignment is that of the inputs of each A, taken by hooks of the test and put into [batch, length, d_in]."""
    model, batch = make(family), make_batch() | {"task_ids": torch.tensor([0, 0, 1, 1])}
    adapters, inputs = add_adapters(model, AdapterConfig(rank=4)), {}
    for name, adapter in adapters.items():
        adapter.lora_A.register_forward_hook(lambda module, given, z, name=name: inputs.update({name: given[0]}))
    with collect_features(model) as features:
        label_loss(model, batch)
    assert features and set(features) <= set(adapters)  # Zamba2 has layers that no token reaches
    groups = [[], []]
    for name in features:
        x = inputs[name].reshape(*batch["input_ids"].shape, -1)  # [batch, length, d_in]
        for task, z in enumerate(groups):
            rows = [x[i][batch["attention_mask"][i] == 1] for i in range(4) if batch["task_ids"][i] == task]
            z.append(torch.cat(rows) @ adapters[name].lora_A.weight.T)
    expected = sum(kl_alignment(list(pair)) for pair in zip(*groups)) / len(features)
    torch.testing.assert_close(alignment_loss(features, batch), expected, rtol=1e-4, atol=1e-6)
    tasks = [replace(task, validation=task.validation[:2]) for task in load_tasks(["word_sorting", "web_of_lies"])]
    found, names = heads.collect(model, TOKENIZER, tasks, 100)  # and the same layers can be looked into
    assert names == list(features) and all(torch.isfinite(heads.task_distances(found)).flatten())


class Experts(torch.nn.Module):
    """Two experts, each of half of the tokens (or, `all_of_them`, of all, in another order)."""

    def __init__(self, all_of_them):
        super().__init__()
        self.experts = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)])
        self.all_of_them = all_of_them

    def forward(self, x):
        rows, y = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
        for number, expert in enumerate(self.experts):
            sent = torch.arange(len(rows)).flip(0) if self.all_of_them else torch.arange(number, len(rows), 2)
            y = y.index_add(0, sent, expert(rows[sent]))
        return y.view(x.shape)


@pytest.mark.parametrize("all_of_them", [False, True])
def test_experts_are_not_aligned_but_refused_by_name(all_of_them):
    model, mask = Experts(all_of_them), torch.ones(4, 6)
    add_adapters(model, AdapterConfig(rank=2, targets="all-linear"))
    with collect_features(model) as features:
        model(torch.randn(4, 6, 8))
    with pytest.raises(ValueError, match="experts.0 does not see every token once"):
        alignment_loss(features, {"attention_mask": mask, "task_ids": torch.tensor([0, 0, 1, 1])})


def test_only_adapters_have_routers_that_are_looked_at():
    """A mixture of experts has one of its own, which is none of R-LoRA's."""
    model, batch = make("GptOss"), make_batch()
    adapters = add_adapters(model, AdapterConfig("rlora", rank=2, heads=2))
    with collect_features(model, "router") as found:
        label_loss(model, batch)
    assert list(found) == list(adapters) and all(scores.shape[-1] == 2 for scores in found.values())


def test_a_layer_that_is_called_twice_is_not_aligned():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    add_adapters(model, AdapterConfig(rank=2, targets="all-linear"))
    with collect_features(model) as features:
        model(model(torch.randn(4, 6, 8)))
    with pytest.raises(ValueError, match="0 does not see every token once"):
        alignment_loss(features, {"attention_mask": torch.ones(4, 6), "task_ids": torch.tensor([0, 0, 1, 1])})


LEFT_OUT = {"Mamba": {"x_proj", "dt_proj", "out_proj"}, "Jamba": {"dt_proj"}, "FalconH1": {"out_proj"},
            "Zamba2": {"out_proj"}, "Phimoe": {"router"}}


@pytest.mark.parametrize("family", ALL)
def test_what_cannot_take_an_adapter_is_left_out_by_name(family):
    model = make(family)
    layers, left_out = linear_layers(model)
    assert {name.rsplit(".", 1)[-1] for name in left_out} == LEFT_OUT.get(family, set()) and layers
    assert not set(layers) & set(left_out)
    for name in sorted(left_out)[:1]:
        with pytest.raises(ValueError, match=f"no linear layer matches the target '{name}' .{name}: it"):
            add_adapters(model, AdapterConfig(targets=(name,)))
    first, *rest = training.coverage(model) if add_adapters(model, AdapterConfig(rank=2)) else ()
    said = " ".join(rest)
    assert re.match(r"adapters on .*: \d+ % of the body's weights$", first)
    assert all(name in said for name in LEFT_OUT.get(family, ()))
    experts = family in ("Qwen2Moe", "Qwen3Moe", "Phimoe", "Olmoe", "GptOss", "Jamba")
    assert ("experts.gate_up_proj" in said) == experts


def test_the_share_of_the_bodys_weights():
    model = make("Llama")
    body = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
    under = sum(p.numel() for name, p in model.named_parameters() if "down_proj" in name)
    add_adapters(model, AdapterConfig(rank=3, targets=("down_proj", "lm_head")))
    assert list(training.coverage(model)) == [
        f"adapters on down_proj, lm_head: {100 * under / body:.0f} % of the body's weights"]


def test_multihead_attention_and_odd_linear_layers_are_left_out():
    class Odd(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    class Plain(torch.nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    class Halved(torch.nn.Linear):
        def forward(self, x):
            return 0.5 * super().forward(x).relu()

    class Asking(torch.nn.Module):  # for the type only, as the code of some models does
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(8, 8)

        def forward(self, x):
            return self.inner(x.to(self.inner.weight.dtype))

    model = torch.nn.ModuleDict({"attention": torch.nn.MultiheadAttention(8, 2), "odd": Odd(8, 8), "plain": Plain(8, 4),
                                 "halved": Halved(8, 8), "asking": Asking()})
    layers, left_out = linear_layers(model)
    assert list(layers) == ["plain", "asking.inner"] and sorted(left_out) == ["attention.out_proj", "halved", "odd"]
    for method in ("lora", "rlora"):
        add_adapters(model, AdapterConfig(method, targets="all-linear", rank=2))
        model["attention"](*torch.randn(3, 5, 1, 8))
        assert model["asking"](torch.randn(3, 8).double()).dtype == torch.float32
        assert model["asking"].inner.weight.is_meta  # where its numbers are asked for, it has none
        remove_adapters(model)


@pytest.mark.parametrize("family,config", [
    ("BertLMHeadModel", SMALL | dict(intermediate_size=64)), ("RobertaForCausalLM", SMALL | dict(intermediate_size=64)),
    ("XLNetLMHeadModel", dict(vocab_size=len(TOKENIZER), d_model=32, n_layer=2, n_head=4, d_inner=64)),
    ("RobertaForCausalLM", SMALL | dict(intermediate_size=64, is_decoder=True)),  # whose positions begin elsewhere
    ("RwkvForCausalLM", dict(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2))])  # takes padding for text
def test_models_that_see_what_follows_or_padding_are_refused(tmp_path, family, config):
    torch.manual_seed(0)
    kind = getattr(transformers, re.sub("(LMHeadModel|ForCausalLM)$", "Config", family))
    getattr(transformers, family)(kind(**config)).save_pretrained(tmp_path / "m")
    TOKENIZER.save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match=f"m .{family}. cannot be used here: what it says after some tokens changes w"):
        load_model(str(tmp_path / "m"), "cpu")


@pytest.mark.parametrize("where", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_base_that_is_not_finite_is_an_error_on_every_path(tmp_path, where):
    model = make("Llama")
    model.get_parameter(where).data.view(-1)[0] = float("nan")
    model.save_pretrained(tmp_path / "m")
    TOKENIZER.save_pretrained(tmp_path / "m")
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        load_model(str(tmp_path / "m"), "cpu")


@pytest.mark.parametrize("family,method", [("GPT2", "meta"), ("GPTNeoX", "rlora"), ("Qwen2", "align"),
                                           ("Phi3", "mlora")])
def test_the_command_trains_on_a_folder_without_a_pad_token(tmp_path, family, method):
    make(family).save_pretrained(tmp_path / "a model")
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "a model")
    results = training.run(TrainConfig(
        model=str(tmp_path / "a model"), tasks=("navigate", "web_of_lies"), method=method, steps=2, batch_size=8,
        support=4, query=4, tasks_per_round=2, samples=20, device="cpu", split="validation", score="choose",
        score_samples=100, out=str(tmp_path / "run")))
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["lr"] == 5e-4 and config["max_length"] == 128  # what the model has positions for
    assert results["score"] == "choose" and results["samples"] == {"navigate": 100, "web_of_lies": 100}
    low, high = results["average_after_interval"]
    assert 0 <= low <= results["average_after"] <= high <= 1 and 0 < results["average_after"] < 1


def test_start_tokens_survive_the_cut_from_the_left():
    start = TOKENIZER.bos_token_id
    whole, _ = encode(TOKENIZER, ("one two three four five six seven", "x"))
    cut, labels = encode(TOKENIZER, ("one two three four five six seven", "x"), 8)
    assert whole[0] == start and len(whole) > 9  # this tokenizer begins every text with it
    assert cut == [start, *whole[-7:]] and len(labels) == 8


def with_processor(normalizer=None, pre_tokenizer=None, template=None):
    """The embedded model's tokenizer with another way of beginning and ending a text."""
    from tokenizers.processors import TemplateProcessing
    tokenizer = copy.deepcopy(TOKENIZER)
    backend = tokenizer.backend_tokenizer
    if normalizer:
        backend.normalizer = normalizer
    if template:
        backend.post_processor = TemplateProcessing(template, special_tokens=[("[S]", 0), ("[E]", 1)])
    return tokenizer


def test_an_end_token_that_the_tokenizer_adds_does_not_stand_before_the_answer():
    sample = ("one two three", "four")
    plain = encode(with_processor(template="$A"), sample)[0]
    assert 0 not in plain and plain.count(1) == 1
    assert encode(with_processor(template="$A [E]"), sample)[0] == plain
    assert encode(with_processor(template="[S] $A [E]"), sample)[0] == [0, *plain]
    assert encode(with_processor(template="[S] $A [E]"), sample, 6)[0] == [0, *plain[-5:]]


def test_a_tokenizer_that_puts_a_space_before_every_text_does_not_double_the_answers():
    """As SentencePiece's do; the answer's tokens are those that it has after a prompt."""
    from tokenizers.normalizers import Prepend
    tokenizer = with_processor(normalizer=Prepend(" "), template="$A")
    ids = encode(tokenizer, ("say Answer:", "four"))[0]
    assert ids == [*tokenizer("say Answer: four")["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(ids[:-1]) == " say Answer: four"


def test_a_pad_token_that_the_model_has_no_embedding_for_is_not_used(tmp_path):
    make("Llama").save_pretrained(tmp_path)
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer, _ = load_model(str(tmp_path), "cpu")
    assert tokenizer.pad_token_id < model.config.vocab_size
    assert generate_answers(model, tokenizer, [("a b c", "x"), ("a", "x")])


def test_a_model_that_needs_a_missing_library_is_one_line(tmp_path):
    make("Llama").save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(str(tmp_path), "cpu")


def test_a_name_that_is_no_folder_and_not_to_be_had_is_one_line(monkeypatch):
    class NoNetwork:
        def model_info(self, name, timeout):
            raise ConnectionError("no route to the Hub")
    monkeypatch.setattr(models, "HfApi", NoNetwork)
    message = (r"unknown model 'someone/model': there is no such folder, and the Hugging Face Hub does not give it "
               r"\(no route to the Hub\); there are: mini, the path")
    with pytest.raises(ValueError, match=message):
        load_model("someone/model", "cpu")


def test_a_hub_name_is_taken_from_the_cache_before_the_network_is_asked(tmp_path, monkeypatch):
    """The cache's own layout, filled by hand; the network would raise."""
    from huggingface_hub import constants
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / ("0" * 40)
    make("Llama").save_pretrained(snapshot)
    TOKENIZER.save_pretrained(snapshot)
    (tmp_path / "models--someone--tiny" / "refs").mkdir()
    (tmp_path / "models--someone--tiny" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "HfApi", None)
    model, tokenizer, _ = load_model("someone/tiny", "cpu")
    assert model.config.hidden_size == 32 and len(tokenizer) == len(TOKENIZER)


def test_folders_that_are_no_model(tmp_path):
    with pytest.raises(ValueError, match="is not a model in Hugging Face format: the folder has no config.json"):
        load_model(str(tmp_path), "cpu")
    make("Llama").save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(str(tmp_path), "cpu")


def test_code_that_a_model_brings_along_is_not_run(tmp_path):
    make("Llama").save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemError('the code was run')")
    with pytest.raises(ValueError, match="trust_remote_code|execute"):
        load_model(str(tmp_path), "cpu")


def test_dtypes():
    cpu = torch.device("cpu")
    assert [pick_dtype("auto", saved, cpu) for saved in (torch.bfloat16, torch.float16, torch.float32, None)] \
        == [torch.float32] * 4
    with pytest.raises(ValueError, match="unknown dtype 'int8'; there are: auto, float32, bfloat16, float16"):
        pick_dtype("int8", None, cpu)


def test_auto_dtype_on_a_gpu(monkeypatch):
    gpu = torch.device("cuda")
    for has_bfloat16 in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
        half = torch.bfloat16 if has_bfloat16 else torch.float32
        assert [pick_dtype("auto", saved, gpu) for saved in (torch.bfloat16, torch.float16, torch.float32)] \
            == [half, half, torch.float32]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", ["lora", "hydralora", "rlora", "mlora"])
def test_half_precision_trains_float32_adapters(dtype, method):
    """The frozen weights are half, the adapters and the loss are not; gradients point where those in float32 do."""
    gradients = []
    for kind in ("float32", dtype):
        model, _, _ = load_model("mini", "cpu", kind)
        assert model.dtype == getattr(torch, kind)
        add_adapters(model, AdapterConfig(method, dropout=0.0))
        randomize_adapters(model, std=0.02)
        loss = label_loss(model, make_batch())
        loss.backward()
        assert loss.dtype == torch.float32
        assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
        gradients.append(torch.cat([p.grad.flatten() for p in adapter_parameters(model).values()]))
    assert torch.cosine_similarity(*gradients, dim=0) > (0.99 if dtype == "bfloat16" else 0.999)


def test_lengths():
    model = make("GPT2")
    assert pick_length(model, None) == 128 and pick_length(model, 100) == 100
    with pytest.raises(ValueError, match="--max-length 129 is more than the 128 positions that the model has"):
        pick_length(model, 129)
    assert pick_length(make("Bloom"), None) in (128, 512)  # it has no position embeddings, so nothing to run out of
