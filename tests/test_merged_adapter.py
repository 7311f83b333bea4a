"""An adapter that is merged while answers are drawn changes no law and leaves no trace."""

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_prefill import SHAPE, qwen, seeded
from transformers import Qwen3Config, Qwen3ForCausalLM

from hf_imitate.merged_adapter import merged_adapter

IDS = torch.tensor([[0, 1, 2, 0, 2]])


def adapted(**changes):
    torch.manual_seed(0)
    config = LoraConfig(**{"target_modules": "all-linear", "init_lora_weights": False} | changes)
    model = get_peft_model(qwen(), config)
    model.add_adapter("other", LoraConfig(target_modules="all-linear", init_lora_weights=False))
    return model.eval()


def test_the_law_stays_and_every_weight_comes_back_to_the_last_bit():
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        law = model(IDS).logits
        with merged_adapter(model):
            base = model.get_base_model().model.layers[0].mlp.up_proj.get_base_layer().weight
            assert not torch.equal(base, before["base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"])
            torch.testing.assert_close(model(IDS).logits, law, atol=1e-5, rtol=0)
        assert torch.equal(model(IDS).logits, law)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_error_while_drawing_leaves_no_trace_either():
    model = adapted()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), merged_adapter(model):
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def tied():
    return adapted(target_modules=["q_proj", "lm_head"])


def prompt_tuned():
    return get_peft_model(qwen(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))


def biased():
    base = seeded(Qwen3ForCausalLM, Qwen3Config(**SHAPE, num_key_value_heads=1, head_dim=8, attention_bias=True))
    return get_peft_model(base, LoraConfig(target_modules=["q_proj"], lora_bias=True, init_lora_weights=False))


@pytest.mark.parametrize("make", [lambda: adapted().bfloat16(), tied, biased, prompt_tuned, qwen])
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_what_cannot_be_put_back_exactly_stays_as_it_is(make):
    model = make()
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    with merged_adapter(model):
        inside = model.state_dict()
    assert all(value.data_ptr() == before[name][0] for name, value in inside.items())
    assert all(torch.equal(value, before[name][1]) for name, value in inside.items())


def test_inside_another_and_where_the_user_has_merged_it_the_law_stays_afterwards_too():
    model = adapted()
    with torch.no_grad():
        law = model(IDS).logits
        with merged_adapter(model):
            with merged_adapter(model):
                torch.testing.assert_close(model(IDS).logits, law, atol=1e-5, rtol=0)
            torch.testing.assert_close(model(IDS).logits, law, atol=1e-5, rtol=0)
        assert torch.equal(model(IDS).logits, law)
        model.merge_adapter()
        with merged_adapter(model):
            torch.testing.assert_close(model(IDS).logits, law, atol=1e-5, rtol=0)
        torch.testing.assert_close(model(IDS).logits, law, atol=1e-5, rtol=0)
