import json
import logging
from types import SimpleNamespace

import pytest
import torch
from distinguishers import ANSWERS, KINDS, LORA, QUESTIONS, causal_lm, imitator_model, is_short, is_wanted, make
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from hf_imitate.distinguisher import Distinguisher
from hf_imitate.imitator import Imitator
from hf_imitate.rendering import Answer


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def separate(tiny_model_dir, tokenizer):
    return make("adapter", tiny_model_dir, tokenizer)


@pytest.mark.parametrize("checks", [[], [is_short, is_wanted]], ids=["text", "checks"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_distinguisher_gives_the_logits_it_had(kind, checks, tiny_model_dir, tokenizer, tmp_path):
    distinguisher = make(kind, tiny_model_dir, tokenizer, checks=checks, max_answer_tokens=7)
    outcomes = torch.tensor([[1.0, 0.0], [0.0, torch.nan], [1.0, 1.0], [0.0, 0.0]])[:, : len(checks)]
    before = distinguisher.score(QUESTIONS, ANSWERS, outcomes)

    distinguisher.save_pretrained(tmp_path)
    loaded = Distinguisher.from_pretrained(tmp_path, checks=checks[::-1])

    # An adapter merged into its base is the same law, rounded once more.
    tolerance = 1e-5 if kind.startswith("nameless") else 0
    torch.testing.assert_close(loaded.score(QUESTIONS, ANSWERS, outcomes), before, atol=tolerance, rtol=0)
    torch.testing.assert_close(distinguisher.score(QUESTIONS, ANSWERS, outcomes), before, atol=0, rtol=0)
    assert loaded.check_names == tuple(check.__name__ for check in checks)
    assert loaded.checks == tuple(checks)
    assert loaded.renderer.max_answer_tokens == 7
    assert not list(tmp_path.glob("*.bin"))
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


@pytest.mark.parametrize("kind", ["shared", "adapter", "full"])
def test_loading_and_starting_say_nothing_of_missing_weights(kind, tiny_model_dir, tokenizer, tmp_path, caplog):
    logger = logging.getLogger("transformers")
    level, propagates = logger.level, logger.propagate
    logger.setLevel(logging.WARNING)
    logger.propagate = True
    try:
        make(kind, tiny_model_dir, tokenizer).save_pretrained(tmp_path)
        Distinguisher.from_pretrained(tmp_path)
        Distinguisher.from_causal_lm(str(tiny_model_dir))
    finally:
        logger.setLevel(level)
        logger.propagate = propagates

    assert "LOAD REPORT" not in caplog.text
    assert "newly initialized" not in caplog.text


@pytest.mark.parametrize("kind", ["shared", "adapter"])
def test_its_text_part_loads_by_plain_peft(kind, tiny_model_dir, tokenizer, tmp_path):
    distinguisher = make(kind, tiny_model_dir, tokenizer)
    distinguisher.save_pretrained(tmp_path / "distinguisher")
    imitator_model(tiny_model_dir).save_pretrained(tmp_path)

    plain = AutoModelForSequenceClassification.from_pretrained(
        str(tmp_path), num_labels=1, adapter_kwargs={"subfolder": "distinguisher"}
    ).eval()

    rows = distinguisher.encode(QUESTIONS, ANSWERS)
    logits = [plain(input_ids=torch.tensor([row.prompt_ids + row.answer_ids])).logits.item() for row in rows]
    assert logits == pytest.approx(distinguisher.score(QUESTIONS, ANSWERS).tolist(), abs=1e-5)


def test_check_weights_are_stored_by_name(tiny_model_dir, tokenizer, tmp_path):
    make("adapter", tiny_model_dir, tokenizer, checks=[is_short, is_wanted]).save_pretrained(tmp_path)

    stored = json.loads((tmp_path / "checks.json").read_text())

    assert stored["checks"] == {"is_short": 1.0, "is_wanted": 2.0}
    assert stored["end_token_ids"] == [tokenizer.eos_token_id]


def test_every_end_token_of_the_model_survives_saving(tiny_model_dir, tokenizer, tmp_path):
    model = causal_lm(tiny_model_dir)
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    model.generation_config = GenerationConfig(eos_token_id=ends)
    distinguisher = Distinguisher.from_causal_lm(model, tokenizer, peft_config=LORA)

    distinguisher.save_pretrained(tmp_path)

    assert distinguisher.renderer.end_token_ids == ends
    assert Distinguisher.from_pretrained(tmp_path).renderer.end_token_ids == ends


def test_a_folder_without_a_distinguisher_and_one_with_a_pickle_are_refused(tmp_path, separate):
    with pytest.raises(FileNotFoundError, match=r"checks\.json"):
        Distinguisher.from_pretrained(tmp_path)
    separate.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="no pickle"):
        Distinguisher.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_a_distinguisher_in_half_precision_keeps_its_head_in_single(kind, tiny_model_dir, tokenizer, tmp_path):
    """A head in bf16 would give many answers one and the same score."""
    distinguisher = make(kind, tiny_model_dir, tokenizer)
    distinguisher.save_pretrained(tmp_path)

    loaded = Distinguisher.from_pretrained(tmp_path, dtype=torch.bfloat16)
    logits = loaded.score(QUESTIONS, ANSWERS)

    assert logits.dtype == torch.float32
    assert not torch.equal(logits.bfloat16().float(), logits)
    assert {parameter.dtype for parameter in loaded.head.parameters()} == {torch.float32}
    torch.testing.assert_close(logits, distinguisher.score(QUESTIONS, ANSWERS), atol=0.1, rtol=0.05)


def saved_imitator(path, tokenizer, kind, folder):
    imitator_model(path).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    distinguisher = make(kind, path, tokenizer, checks=[is_short])
    distinguisher.save_pretrained(folder / "distinguisher", with_tokenizer=False)
    return distinguisher


@pytest.mark.parametrize("kind", ["shared", "adapter"])
def test_an_imitator_carries_its_distinguisher_on_its_one_base(kind, tiny_model_dir, tokenizer, tmp_path):
    saved_imitator(tiny_model_dir, tokenizer, kind, tmp_path)
    imitator = Imitator.from_pretrained(tmp_path, device="cpu")
    answers = [answer.text for answer in ANSWERS]
    law = imitator.log_prob(QUESTIONS, answers).nats

    logits = imitator.human_logit(QUESTIONS, answers, text_only=True)

    assert imitator.distinguisher.model is imitator.model
    separate = Distinguisher.from_pretrained(tmp_path)
    assert separate.model is not imitator.model
    expected = separate.score(QUESTIONS, [Answer(text, True) for text in answers])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert torch.equal(imitator.log_prob(QUESTIONS, answers).nats, law)
    assert imitator.model.active_adapter == "default"
    assert imitator.distinguisher.check_weights.tolist() == separate.check_weights.tolist() == [1.0]


def other_base(config):
    config["base_model_name_or_path"] += "/"


def pissa(config):
    config["init_lora_weights"] = "pissa"


def other_revision(config):
    config["revision"] = "v1"


@pytest.mark.parametrize("change", [other_base, pissa, other_revision])
def test_another_base_is_not_shared(change, tiny_model_dir, tokenizer, tmp_path):
    saved_imitator(tiny_model_dir, tokenizer, "shared", tmp_path)
    file = tmp_path / "distinguisher" / "adapter_config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))
    imitator = Imitator.from_pretrained(tmp_path, device="cpu")

    assert imitator.distinguisher.model is not imitator.model
    assert list(imitator.model.peft_config) == ["default"]


@pytest.mark.parametrize("kind", ["full weights", "quantised", "fp16"])
def test_a_base_that_is_not_plain_is_not_shared(kind, tiny_model_dir, tokenizer, tmp_path):
    saved_imitator(tiny_model_dir, tokenizer, "shared", tmp_path)
    base = PeftModel.from_pretrained(causal_lm(tiny_model_dir), tmp_path)
    if kind == "full weights":
        base = causal_lm(tiny_model_dir)
    elif kind == "quantised":
        base.get_base_model().config.quantization_config = SimpleNamespace(quant_method="bitsandbytes")
    else:
        base.get_base_model().half()

    assert Distinguisher.from_pretrained(tmp_path, base=base).model is not base
