import pytest
import torch
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

from hf_imitate.classifier import (
    HEAD_STD,
    adapter_config,
    classifier_around,
    load_classifier,
    new_head,
    without_dropout,
)


@pytest.fixture
def model(tiny_model_dir):
    return AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)


def test_an_adapter_that_the_body_would_not_read_is_refused_or_made_a_plain_one():
    """Only the head would have learned, and plain PEFT would have put untrained tokens before each text."""
    with pytest.raises(ValueError, match=r"PromptTuningConfig adapts no weights.*`distinguisher_peft_config`"):
        adapter_config(PromptTuningConfig(num_virtual_tokens=2))
    assert (
        adapter_config(LoraConfig(alora_invocation_tokens=[5], task_type="CAUSAL_LM")).alora_invocation_tokens is None
    )


def test_a_new_head_is_small_and_not_zero():
    torch.manual_seed(0)

    head = new_head(10_000, torch.device("cpu"))

    assert head.weight.shape == (1, 10_000)
    assert head.bias is None
    assert head.weight.std().item() == pytest.approx(HEAD_STD, rel=0.05)


def test_a_classifier_reads_with_the_causal_lms_body(model):
    ids = torch.tensor([[20, 21, 22]])

    classifier = classifier_around(model)

    hidden = model.base_model(ids).last_hidden_state[:, -1]
    torch.testing.assert_close(classifier(ids).logits, hidden @ classifier.score.weight.T)
    assert classifier.base_model is model.base_model
    assert classifier.generation_config is model.generation_config
    assert not any(parameter.is_meta for parameter in classifier.parameters())


def test_a_copied_body_is_apart(model):
    classifier = classifier_around(model, copy_body=True)

    with torch.no_grad():
        classifier.base_model.embed_tokens.weight.zero_()

    assert model.base_model.embed_tokens.weight.abs().max() > 0


def test_it_is_the_classifier_that_transformers_loads(model, tiny_model_dir, tmp_path):
    """The other road: save it whole, and read it back as a sequence classifier."""
    classifier = classifier_around(model)
    classifier.save_pretrained(tmp_path)
    ids = torch.tensor([[20, 21, 22]])

    loaded, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)

    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(loaded(ids).logits, classifier(ids).logits, atol=0, rtol=0)
    again = load_classifier(str(tmp_path), trust_remote_code=False)
    torch.testing.assert_close(again(ids).logits, classifier(ids).logits, atol=0, rtol=0)


def test_other_architectures_get_a_head_where_theirs_is():
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16, pad_token_id=1)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.tensor([[20, 21, 22]])

    classifier = classifier_around(model)

    hidden = model.transformer(ids).last_hidden_state[:, -1]
    torch.testing.assert_close(classifier(ids).logits, hidden @ classifier.score.weight.T)


def test_dropout_is_off_for_good():
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16, resid_pdrop=0.5, attn_pdrop=0.5)
    model = GPT2LMHeadModel(config).train()
    ids = torch.tensor([[20, 21, 22]])
    assert not torch.equal(model(ids).logits, model(ids).logits)

    without_dropout(model)

    assert torch.equal(model(ids).logits, model(ids).logits)


def test_an_adapters_configuration_is_copied_without_dropout():
    given = LoraConfig(r=3, lora_dropout=0.2, task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    given.inference_mode = True

    config = adapter_config(given, task_type="SEQ_CLS", modules_to_save=["score"])

    assert (config.r, config.lora_dropout, config.inference_mode) == (3, 0.0, False)
    assert (config.task_type, config.modules_to_save) == ("SEQ_CLS", ["score"])
    assert (given.lora_dropout, given.task_type, given.modules_to_save) == (0.2, "CAUSAL_LM", ["lm_head"])
