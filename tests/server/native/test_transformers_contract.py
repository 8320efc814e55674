"""One test for each interface of transformers that the engine leans on, so an upgrade fails here first."""

from __future__ import annotations

import inspect

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from longshore_server.native.attention import interface
from longshore_server.native.attention.kv_cache import LayerGeometry
from longshore_server.native.attention.probe import probe_geometries
from longshore_server.native.errors import UnsupportedModelError

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")


@pytest.fixture
def model(model_folder):
    def build(family: str):
        interface.register()
        config = AutoConfig.from_pretrained(model_folder(family))
        return AutoModelForCausalLM.from_config(config, attn_implementation=interface.ATTENTION_NAME).eval()

    return build


def test_register_makes_the_name_a_valid_implementation(model) -> None:
    interface.register()
    assert AttentionInterface()[interface.ATTENTION_NAME] is interface.paged_attention_forward
    assert model("llama").config._attn_implementation == interface.ATTENTION_NAME


def test_no_mask_is_built_for_a_name_without_mask_function() -> None:
    assert interface.ATTENTION_NAME not in ALL_MASK_ATTENTION_FUNCTIONS


@pytest.mark.parametrize("family", FAMILIES)
def test_keywords_reach_the_attention_with_its_layer_scale_and_window(family, model) -> None:
    calls = []

    class Context:
        def check_arguments(self, arguments, attention_mask) -> None:
            assert attention_mask is None

        def attend(self, layer_index, query, key, value, scale, window):
            calls.append((layer_index, tuple(query.shape), tuple(key.shape), scale, window))
            return torch.zeros(*query.shape)

    ids = torch.tensor([[5, 6, 7]])
    built = model(family)
    with torch.inference_mode():
        built(
            input_ids=ids,
            position_ids=torch.tensor([[3, 0, 9]]),
            use_cache=False,
            longshore_context=Context(),
        )
    dim = 24 if family == "qwen3" else 16
    window = 24 if family == "mistral" else None
    assert calls == [(layer, (3, 4, dim), (3, 2, dim), dim**-0.5, window) for layer in range(3)]


def test_a_mixed_layer_model_passes_each_layers_own_window(model) -> None:
    windows = [layer.self_attn.sliding_window for layer in model("qwen3-mixed").model.layers]
    assert windows == [None, 12, 12]


def test_logits_to_keep_takes_row_indices(oracle) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        whole = oracle("llama")(ids).logits
        kept = oracle("llama")(ids, logits_to_keep=torch.tensor([1, 3])).logits
    assert torch.allclose(kept[0], whole[0, [1, 3]], atol=1e-5)


def test_position_ids_alone_place_the_rows(oracle) -> None:
    """Rotary positions come from position_ids: shifting all of them changes nothing, permuting them does."""
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        at = lambda *positions: oracle("llama")(ids, position_ids=torch.tensor([positions])).logits  # noqa: E731
        assert torch.allclose(at(0, 1, 2), at(40, 41, 42), atol=1e-3)
        assert not torch.allclose(at(0, 1, 2), at(0, 5, 9), atol=1e-3)


def test_from_pretrained_reports_missing_keys(model_folder) -> None:
    config = AutoConfig.from_pretrained(model_folder("llama"), num_hidden_layers=4)
    _, info = AutoModelForCausalLM.from_pretrained(
        model_folder("llama"), config=config, use_safetensors=True, output_loading_info=True
    )
    assert any("layers.3" in key for key in info["missing_keys"])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probe_learns_every_layers_geometry(family, model) -> None:
    dim = 24 if family == "qwen3" else 16
    geometries = probe_geometries(model(family), 3, torch.device("cpu"))
    assert geometries == [LayerGeometry(2, dim, dim)] * 3
    with pytest.raises(UnsupportedModelError, match="3 of its 5"):
        probe_geometries(model(family), 5, torch.device("cpu"))


def test_attention_functions_take_what_we_take() -> None:
    """transformers' own function for the same slot, whose leading parameters ours must match."""
    theirs = list(inspect.signature(AttentionInterface()["sdpa"]).parameters)[:5]
    ours = list(inspect.signature(interface.paged_attention_forward).parameters)[:5]
    assert ours == theirs
