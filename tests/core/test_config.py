"""The settings of a run: which defaults depend on the method and the model, and which adapters they stand for."""

import pytest

from tinylora_mtl import AdapterConfig
from tinylora_mtl.config import ALIGN_WEIGHT, METHODS, MINI_LR, TrainConfig, adapter_config, resolve


@pytest.mark.parametrize("method", METHODS)
def test_defaults_that_depend_on_the_method_and_the_model(method):
    mini, other = (resolve(TrainConfig(method=method, model=model)) for model in ("mini", "elsewhere"))
    assert (mini.lr, other.lr) == (MINI_LR[method], 5e-4)
    assert (mini.targets, other.targets) == (("all-linear",), None)
    assert (mini.score_samples, other.score_samples) == (200, None)
    assert mini.align_weight == ALIGN_WEIGHT["kl"] == 0.2
    assert resolve(mini) == mini


def test_the_weight_of_the_alignment_is_its_kinds():
    assert resolve(TrainConfig(align="mmd")).align_weight == 0.01


def test_what_is_given_stays_and_the_config_too():
    given = TrainConfig(method="meta", lr=0.1, align_weight=0.0, samples=7, targets=("q_proj",),
                        score_samples=9)
    assert resolve(given) == given
    config = TrainConfig()
    resolve(config)
    assert config == TrainConfig()


@pytest.mark.parametrize("method", METHODS)
def test_adapters_of_a_run(method):
    config = TrainConfig(method=method, rank=3, alpha=5.0, dropout=0.3, heads=4, targets=("q_proj",))
    layers = "lora" if method in ("align", "meta") else method
    assert adapter_config(config) == AdapterConfig(layers, rank=3, alpha=5.0, dropout=0.3, heads=4, targets=("q_proj",))
    config.zero_start = True
    assert adapter_config(config).random_init is False


def test_every_setting_has_its_sentence():
    assert all(field.metadata["help"] for field in TrainConfig.__dataclass_fields__.values())
