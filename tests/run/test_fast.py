"""bfloat16, gradient checkpointing and torch.compile: they change time and memory, and not what is learned."""

import shutil

import pytest
import torch
from conftest import SETTINGS, TINY, make_batch, make_llama, outcome, randomize_adapters, run, stopped_run

from tinylora_mtl import AdapterConfig, adapter_parameters, add_adapters, load_adapter, merge_adapters
from tinylora_mtl.run import training
from tinylora_mtl.align import collect_features
from tinylora_mtl.loss import label_loss
from tinylora_mtl.run.cli import run_command
from tinylora_mtl.run.scoring import accuracies
from tinylora_mtl.run.gradients import gradients_for
from tinylora_mtl.run.models import compile_model, load_model
from tinylora_mtl.config import METHODS, TrainConfig, adapter_config
from tinylora_mtl.run.settings import check, resume_config


def round_of_three():
    return [(make_batch(seed=t, tasks=(t,)), make_batch(seed=9 + t, tasks=(t,), each=3)) for t in range(3)]


def step(config, prepare=lambda model: model):
    """(metrics, gradients) of one training step on a tiny model, which `prepare` may wrap or change."""
    model = make_llama()
    add_adapters(model, adapter_config(config))
    randomize_adapters(model)
    called = prepare(model.train())
    torch.manual_seed(3)
    batch = round_of_three() if config.method == "meta" else make_batch()
    metrics = gradients_for(config)(called, batch, config)
    return metrics, [parameter.grad for parameter in adapter_parameters(model).values()]


# ------------------------------------------------------------------------------------------------------- bfloat16
@pytest.mark.parametrize("method", METHODS)
def test_a_step_in_bfloat16(method):
    """Products in bfloat16; loss, alignment, gradients in float32, and near those of a float32 model."""
    config = TrainConfig(method=method, rank=3, dropout=0.0, align_weight=0.01, inner_lr=0.1)
    types = set()

    def half(model):
        for name, module in model.named_modules():
            if name.endswith("lora_A"):
                module.register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
            elif name.endswith("router"):
                module.register_forward_hook(lambda module, inputs, output: types.add(f"router {output.dtype}"))
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        return model
    numbers, gradients = step(config, half)
    exact_numbers, exact = step(config)
    assert types == {torch.bfloat16} | ({"router torch.float32"} if method in ("hydralora", "rlora") else set())
    assert {tensor.dtype for tensor in [*gradients, *numbers.values()]} == {torch.float32}
    torch.testing.assert_close(numbers, exact_numbers, atol=0.02, rtol=0.02)
    flat, exact = (torch.cat([gradient.flatten() for gradient in both]) for both in (gradients, exact))
    assert torch.cosine_similarity(flat, exact, dim=0) > 0.995
    assert (flat - exact).norm() < 0.1 * exact.norm()


def test_float16_and_float32_compute_the_branch_in_float32():
    for dtype in (torch.float16, torch.float32):
        model = make_llama().to(dtype)
        add_adapters(model, AdapterConfig())
        with collect_features(model) as features:
            label_loss(model, make_batch())
        assert {z.dtype for z in features.values()} == {torch.float32}


def test_a_run_in_bfloat16_can_be_scored_and_merged(tmp_path, few):
    results = run(tmp_path, method="align", dtype="bfloat16", steps=2)
    model, tokenizer, _ = load_model("mini", "cpu", "bfloat16")
    load_adapter(model, tmp_path / "adapter")
    tasks = training.load_tasks(TINY["tasks"])
    assert accuracies(model, tokenizer, tasks, "validation") == results["after"]
    ids = torch.arange(5, 25)[None]
    before = model(ids).logits
    merge_adapters(model)
    torch.testing.assert_close(model(ids).logits.float(), before.float(), atol=0.15, rtol=0.05)


# ------------------------------------------------------------------------------------------ gradient checkpointing
@pytest.mark.parametrize("method,more", [(method, {}) for method in METHODS] + [
    ("align", {"accumulation": 2}), ("align", {"align": "mmd"}), ("lora", {"accumulation": 3})])
def test_gradient_checkpointing_changes_no_gradient(method, more):
    """With dropout: the layers that are computed anew see the masks of the first time."""
    config = TrainConfig(method=method, dropout=0.3, align_weight=0.5, inner_lr=0.1, **more)
    calls = []

    def counted(model):
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *args: calls.append(1))
        return model

    def checkpointed(model):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return counted(model)
    plain = step(config, counted)
    once = len(calls)
    torch.testing.assert_close(step(config, checkpointed), plain, atol=1e-6, rtol=1e-5)
    assert len(calls) - once > once  # it was computed again


def test_gradient_checkpointing_is_for_training_only(tmp_path, few, monkeypatch):
    """A run that goes on with it is the run without it; scoring computes every layer once."""
    models = []
    monkeypatch.setattr(training, "load_model", lambda *args: models.append(load_model(*args)) or models[-1])
    run(tmp_path / "whole", method="rlora", **SETTINGS)
    stopped_run(tmp_path / "run", 5, method="rlora")
    training.run(resume_config(tmp_path / "run", gradient_checkpointing=True), resuming=True)
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert [model.model.layers[0].gradient_checkpointing for model, _, _ in models] == [False, False, True]
    calls = []
    model = models[-1][0]
    model.model.layers[0].register_forward_hook(lambda *args: calls.append(1))
    ids = torch.arange(5, 25)[None]
    model(ids).logits.sum().backward()
    assert len(calls) == 1 and not model.training


# --------------------------------------------------------------------------------------------------- torch.compile
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("method", ["rlora", "meta"])
def test_compiled_steps_are_the_steps(method, capsys):
    config = TrainConfig(method=method, dropout=0.0, inner_lr=0.1)
    numbers, gradients = step(config, lambda model: compile_model(model, make_batch(seed=5, each=3, length=12)))
    said = capsys.readouterr().out
    if "CppCompileError" in said and " " in torch.__file__:
        pytest.skip("torch does not find its own headers in a path with a space")
    assert said == ""  # it did work
    exact_numbers, exact = step(config)
    torch.testing.assert_close(numbers, exact_numbers, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradients, exact, atol=1e-5, rtol=1e-4)


def test_compile_is_used_in_training_and_not_in_scoring(tmp_path, few, monkeypatch):
    called = []

    def compiled(model, dynamic):
        def forward(*args, **kwargs):
            called.append(model.training)
            return model(*args, **kwargs)
        wrapper = torch.nn.Module()
        wrapper._orig_mod, wrapper.forward = model, forward
        return wrapper
    monkeypatch.setattr(torch, "compile", compiled)
    run(tmp_path / "a", method="rlora", compile=True)
    assert called == [True] * 4  # tried once, then three steps
    run(tmp_path / "b", method="rlora")  # its dropout tells that the trial used up no random number
    assert len(called) == 4 and outcome(tmp_path / "a") == outcome(tmp_path / "b")


def test_where_compiling_fails_the_run_goes_on_without_it(tmp_path, few, monkeypatch, capsys):
    def fails(model, dynamic):
        def forward(*args, **kwargs):
            raise RuntimeError("no compiler\nand a long report")
        wrapper = torch.nn.Module()
        wrapper._orig_mod, wrapper.forward = model, forward
        return wrapper
    monkeypatch.setattr(torch, "compile", fails)
    run(tmp_path / "a", method="rlora", compile=True)
    said = "torch.compile does not work here (RuntimeError: no compiler): going on without it"
    assert capsys.readouterr().out.splitlines().count(said) == 1
    run(tmp_path / "b", method="rlora")
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


def test_compile_and_align_are_refused(capsys):
    with pytest.raises(ValueError, match="--compile does not go with --method align"):
        check(TrainConfig(method="align", compile=True))
    with pytest.raises(SystemExit):
        run_command(lambda: training.command(["--compile"]))
    assert capsys.readouterr().err.startswith("error: --compile does not go with --method align")
