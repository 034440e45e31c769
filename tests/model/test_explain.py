"""What is said about the implementations that layers run on."""

import pytest
import torch

from hydra_dist.model.explain import explain_layers


@pytest.mark.parametrize("over_ranks", [False, True])
def test_every_choice_is_said_once_with_its_layers(model_config, over_ranks):
    settings = [{"layers": [3], "attention": "gqa"}, {"layers": [5], "num_query_heads": 2, "num_key_heads": 2}]
    config = model_config(num_layers=6, layer_windows=[4, None], layer_settings=settings)
    lines = explain_layers(config, torch.device("cpu"), torch.float32, 64, over_ranks)
    said = "CCGQA prologue plain: not triton (Triton kernels do not run on cpu)"
    assert f"layers 0-2, 4-5: {said}" in lines
    assert any(line.startswith("layers 0-5: attention backend flash") for line in lines)
    assert len(lines) == 2


def test_another_dtype_may_mean_another_choice(model_config):
    (_, line) = explain_layers(model_config(), torch.device("cpu"), torch.float64, 64, False)
    assert "torch.float64" in line
