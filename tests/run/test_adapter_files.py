"""Adapters to files and back: a file says all there is to say, and a bad one is refused before anything is changed."""

import copy
import json

import pytest
import torch
from conftest import make_batch, make_llama, randomize_adapters
from safetensors.torch import load_file, save_file

from tinylora_mtl import AdapterConfig, add_adapters, load_adapter, merge_adapters, remove_adapters, save_adapter
from tinylora_mtl.adapters import LAYERS
from tinylora_mtl.run.models import load_model

IDS = make_batch()["input_ids"]


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def config_for(method, **changes):
    return AdapterConfig(**{"method": method, "rank": 3, "alpha": 6, "heads": 4} | changes)


@pytest.mark.parametrize("method", LAYERS)
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
        return "can be loaded"
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
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_adapter(model, tmp_path)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_options_of_later_versions_are_refused_by_name(tmp_path):
    config, _ = saved(tmp_path)
    rewrite(config, lambda c: c.update(some_new_option=None, another={}))
    load_adapter(make_llama(), tmp_path)
    rewrite(config, lambda c: c.update(some_new_option=3))
    with pytest.raises(ValueError, match="it uses some_new_option, which this package does not have"):
        load_adapter(make_llama(), tmp_path)


def compiled(part):
    """A small model in the wrapper of torch.compile, as a whole or a block of it."""
    model = make_llama()
    if part == "whole":
        return torch.compile(model, backend="eager")
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


@pytest.mark.parametrize("part", ["whole", "block"])
@pytest.mark.parametrize("compiled_first", [False, True])
def test_a_compiled_model_is_as_any_other(tmp_path, part, compiled_first):
    """Compiled before the adapters go in, or after; saved, loaded into one, taken out and merged."""
    if compiled_first:
        model = compiled(part)
        adapters = add_adapters(model, config_for("lora"))
    else:
        model = make_llama()
        adapters = add_adapters(model, config_for("lora"))
        if part == "whole":
            model = torch.compile(model, backend="eager")
        else:
            model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    randomize_adapters(model)
    assert len(adapters) == 6 and (part == "block" or not any("_orig_mod" in name for name in adapters))
    expected = logits(model)
    save_adapter(model, tmp_path)
    assert "_orig_mod" not in (tmp_path / "adapter_config.json").read_text()
    for other in (make_llama(), compiled(part)):
        load_adapter(other, tmp_path)
        torch.testing.assert_close(logits(other), expected)
    merge_adapters(model)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    remove_adapters(other)
    torch.testing.assert_close(logits(other), logits(make_llama()))


def test_a_layer_that_is_compiled_afterwards_is_saved_by_its_own_name(llama, tmp_path):
    add_adapters(llama, config_for("lora"))
    randomize_adapters(llama)
    expected = logits(llama)
    layer = llama.model.layers[1].mlp
    layer.up_proj = torch.compile(layer.up_proj, backend="eager")
    save_adapter(torch.nn.DataParallel(llama), tmp_path)
    other = make_llama()
    load_adapter(other, tmp_path)
    torch.testing.assert_close(logits(other), expected)


def test_a_model_folder_with_an_adapter_in_it_is_refused(llama, tmp_path):
    llama.save_pretrained(tmp_path / "m")
    load_model("mini", "cpu")[1].save_pretrained(tmp_path / "m")
    add_adapters(llama, config_for("lora"))
    save_adapter(llama, tmp_path / "m")
    with pytest.raises(ValueError, match="m has an adapter beside the model; keep them in folders of their own"):
        load_model(str(tmp_path / "m"), "cpu")


def test_saving_a_whole_model_with_its_adapters_in_it_is_told(llama, tmp_path, recwarn):
    """There where it is saved, and where it is to be loaded; not once they are out."""
    add_adapters(llama, config_for("lora"))
    with pytest.warns(UserWarning, match="what save_pretrained writes cannot be loaded; save_adapter saves them"):
        copy.deepcopy(llama).save_pretrained(tmp_path / "m")
    load_model("mini", "cpu")[1].save_pretrained(tmp_path / "m")
    with pytest.raises(ValueError, match="was saved with adapters in it, .* merge_adapters.* leaves a plain one"):
        load_model(str(tmp_path / "m"), "cpu")
    merge_adapters(llama)
    recwarn.clear()
    llama.save_pretrained(tmp_path / "plain")
    assert not recwarn and "save_pretrained" not in vars(llama)


def test_a_folder_without_a_tokenizer_says_so(llama, tmp_path):
    llama.save_pretrained(tmp_path / "m")
    for family in ("llama", "gemma"):  # of which transformers would make up an empty one
        config = json.loads((tmp_path / "m" / "config.json").read_text()) | {"model_type": family}
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="m has no tokenizer .*; save that of the model that it was made from"):
            load_model(str(tmp_path / "m"), "cpu")


def test_saving_nothing_is_refused(llama, tmp_path):
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapter(llama, tmp_path)


def test_loading_over_adapters_is_refused(llama, tmp_path):
    saved(tmp_path)
    add_adapters(llama, config_for("lora"))
    with pytest.raises(ValueError, match="already has adapters"):
        load_adapter(llama, tmp_path)
