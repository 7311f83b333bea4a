import itertools
import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from hf_imitate.distinguisher import Distinguisher
from hf_imitate.imitator import DEFAULT_MAX_NEW_TOKENS, Imitator
from hf_imitate.rendering import Answer

QUESTIONS = ["Return the", "Set the name of the file and return", "list"]
CHAT = [[{"role": "user", "content": question}] for question in QUESTIONS]


def is_short(prompts, completions, completion_ids=None, **columns):
    return [len(text) < 5 for text in completions]


def is_wanted(prompts, completions, completion_ids=None, *, wanted, **columns):
    return [None if want is None else text == want for text, want in zip(completions, wanted, strict=True)]


@pytest.fixture(scope="module")
def saved(tiny_model_dir, tmp_path_factory):
    """An adapter repo as a trainer leaves it, with a distinguisher that knows two checks."""
    folder = tmp_path_factory.mktemp("imitator")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    lora = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(base, lora).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    law = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 6}
    ends = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    GenerationConfig(**law, eos_token_id=ends).save_pretrained(folder)
    facts = {"version": 1, "max_answer_tokens": 9, "chat_template_kwargs": {"tone": "calm"}}
    (folder / "imitation.json").write_text(json.dumps(facts))
    distinguisher = Distinguisher.from_causal_lm(
        str(tiny_model_dir), peft_config=LoraConfig(target_modules="all-linear"), checks=[is_short, is_wanted]
    )
    distinguisher.check_weights.data = torch.tensor([2.0, 8.0])
    distinguisher.save_pretrained(folder / "distinguisher", with_tokenizer=False)
    return folder


@pytest.fixture(scope="module")
def imitator(saved):
    return Imitator.from_pretrained(saved, device="cpu")


@pytest.fixture(scope="module")
def plain(tiny_model_dir):
    return Imitator.from_pretrained(tiny_model_dir, device="cpu")


def test_the_adapter_the_trained_law_and_the_template_arguments_are_loaded(imitator, plain, saved, tiny_model_dir):
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    law = torch.nn.functional.log_softmax(base(torch.tensor([[20, 30]])).logits, dim=-1)
    adapted = torch.nn.functional.log_softmax(imitator.model(torch.tensor([[20, 30]])).logits, dim=-1)

    assert (law - adapted).abs().max() > 0.01
    assert imitator.max_new_tokens == 6
    assert plain.max_new_tokens == DEFAULT_MAX_NEW_TOKENS
    assert imitator.renderer.end_token_ids == imitator.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    assert imitator.renderer.chat_template_kwargs == {"tone": "calm"}
    assert not imitator.model.training
    assert not any(parameter.requires_grad for parameter in imitator.model.parameters())


def test_an_adapter_without_tokenizer_or_law_of_its_own_takes_its_bases(saved, tmp_path, tiny_model_dir):
    for name in ("adapter_config.json", "adapter_model.safetensors", "imitation.json"):
        shutil.copy(saved / name, tmp_path)

    imitator = Imitator.from_pretrained(tmp_path, device="cpu")

    assert imitator.max_new_tokens == 9  # of imitation.json
    assert imitator.tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tiny_model_dir).get_vocab()
    assert imitator.renderer.end_token_ids == [imitator.tokenizer.eos_token_id]


def test_a_loaded_imitator_equals_the_one_in_memory(imitator, saved):
    by_plain_loading = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    same = Imitator(by_plain_loading.eval(), imitator.tokenizer, max_new_tokens=6)

    assert same.answer(QUESTIONS, num_answers=3) == imitator.answer(QUESTIONS, num_answers=3)
    nats = (each.log_prob(QUESTIONS, [" a", "b", ""]).nats for each in (same, imitator))
    torch.testing.assert_close(*nats, atol=1e-5, rtol=0)


def test_weights_load_in_the_asked_precision(saved):
    model = Imitator.from_pretrained(saved, device="cpu", dtype=torch.bfloat16).model

    assert model.get_base_model().model.embed_tokens.weight.dtype == torch.bfloat16


def test_answers_are_repeatable_and_series_continue(imitator):
    whole = imitator.answer(QUESTIONS, num_answers=4, seed=1)

    first, rest = (imitator.answer(QUESTIONS, num_answers=2, seed=1, first_draw=n, batch_size=1) for n in (0, 2))

    assert [a + b for a, b in zip(first, rest, strict=True)] == whole
    assert imitator.answer(QUESTIONS, num_answers=4, seed=2) != whole
    assert [len(answers) for answers in whole] == [4, 4, 4]
    assert all(isinstance(answer, str) for answers in whole for answer in answers)


def test_answers_stop_at_the_trained_limit_unless_told_otherwise(imitator):
    answers = imitator.answer(QUESTIONS, num_answers=8)

    assert answers == imitator.answer(QUESTIONS, num_answers=8, max_new_tokens=6)
    longer = imitator.answer(QUESTIONS, num_answers=8, max_new_tokens=12)
    pairs = [pair for of_question in zip(answers, longer, strict=True) for pair in zip(*of_question, strict=True)]
    # The same draws, only not cut; a character cut in half reads differently.
    assert all(long.startswith(short.rstrip("\ufffd")) for short, long in pairs)
    assert any(len(long) > len(short) for short, long in pairs)


def test_a_cold_imitator_repeats_itself(imitator):
    cold = imitator.answer(["Return the"], num_answers=20, temperature=1e-4)[0]

    assert len(set(cold)) == 1
    assert len(set(imitator.answer(["Return the"], num_answers=20)[0])) > 10


def test_own_answers_are_verified_and_others_are_not(imitator):
    answers = imitator.answer(QUESTIONS, num_answers=4, seed=1)

    result = imitator.verify(QUESTIONS, answers, seed=1, batch_size=5)

    assert result.verified
    assert result.num_mismatched == 0 < result.num_tokens
    assert imitator.verify(QUESTIONS, [each[2:] for each in answers], seed=1, first_draw=2).verified
    assert not imitator.verify(QUESTIONS, answers, seed=2).verified
    assert not imitator.verify(QUESTIONS, answers, seed=1, temperature=0.1).verified
    assert not imitator.verify(QUESTIONS, answers, seed=1, max_new_tokens=5).verified
    other = Imitator(imitator.model.get_base_model(), imitator.tokenizer, max_new_tokens=6)
    with imitator.model.disable_adapter():
        assert not other.verify(QUESTIONS, answers, seed=1).verified


def test_a_tolerance_for_the_rounding_of_logits_leaves_capacity(imitator):
    answers = imitator.answer(QUESTIONS, num_answers=4)

    assert (
        imitator.verify(QUESTIONS, answers).capacity_bits
        < 1
        < imitator.verify(QUESTIONS, answers, tolerance=0.5).capacity_bits
    )


def test_log_prob_is_the_sum_over_the_tokens_and_the_end_token(plain):
    answer = " the é"
    ids = plain.tokenizer("Return")["input_ids"]
    by_hand = 0.0
    for token in [*plain.tokenizer(answer)["input_ids"], plain.tokenizer.eos_token_id]:
        by_hand += plain.model(torch.tensor([ids])).logits[0, -1].double().log_softmax(0)[token].item()
        ids.append(token)

    result = plain.log_prob(["Return"], [answer])

    assert result.nats.item() == pytest.approx(by_hand, abs=1e-4)
    assert torch.equal(result.lower_bound, result.nats)
    assert result.is_exact.tolist() == [True]
    assert result.effective_sample_size.tolist() == [torch.inf]


def test_log_prob_scores_the_tempered_law(plain):
    logits = plain.model(torch.tensor([plain.tokenizer("Return")["input_ids"]])).logits[0, -1].double()

    cold = plain.log_prob(["Return"], [""], temperature=0.5).nats

    assert cold.item() == pytest.approx((logits / 0.5).log_softmax(0)[plain.tokenizer.eos_token_id].item(), abs=1e-4)


def test_one_letter_answers_share_less_than_probability_one(plain):
    """All strings of at most one printable letter: each has its own token ids, so they can only share."""
    answers = ["", *(chr(code) for code in range(33, 127))]

    nats = plain.log_prob(["Return"] * len(answers), answers).nats

    assert len(set(answers)) == 95
    assert 0 < nats.exp().sum() < 1


def test_an_answer_longer_than_the_limit_is_scored_whole(imitator):
    long = " return" * 20

    assert imitator.log_prob(["Set"], [long]).nats < imitator.log_prob(["Set"], [long[:-7]]).nats - 1


def test_a_spelling_no_reader_can_tell_apart_has_one_log_prob(imitator):
    nats = imitator.log_prob(["Set"] * 3, [" cafe\u0301", " caf\u00e9 \n", " cafe"]).nats

    assert nats[0] == nats[1] != nats[2]


def test_conversations_are_answered_and_scored_through_their_template(tiny_chat_model_dir):
    imitator = Imitator.from_pretrained(tiny_chat_model_dir, device="cpu")

    answers = imitator.answer(CHAT, num_answers=2, max_new_tokens=5)

    assert [len(of_question) for of_question in answers] == [2, 2, 2]
    text = imitator.tokenizer.apply_chat_template(CHAT[0], add_generation_prompt=True, tokenize=False)
    as_text = imitator.log_prob([text], ["yes"]).nats
    torch.testing.assert_close(imitator.log_prob(CHAT[:1], ["yes"]).nats, as_text, atol=1e-5, rtol=0)


def test_human_logit_is_that_of_the_saved_distinguisher(imitator, saved):
    answers = [" a", "return", ""]

    logits = imitator.human_logit(QUESTIONS, answers, text_only=True)

    expected = Distinguisher.from_pretrained(saved, device="cpu").score(QUESTIONS, [Answer(a, True) for a in answers])
    torch.testing.assert_close(logits, expected)
    assert logits.std() > 0


def test_checks_add_their_weights_whatever_their_order(imitator):
    answers = [" a", "return", "other"]
    text = imitator.human_logit(QUESTIONS, answers, text_only=True)
    wanted = [" a", None, "return"]

    for checks in itertools.permutations([is_short, is_wanted]):
        added = imitator.human_logit(QUESTIONS, answers, checks=checks, wanted=wanted) - text
        # is_short: pass, fail, fail at weight 2. is_wanted: pass, not applicable, fail at weight 8.
        torch.testing.assert_close(added, torch.tensor([1.0 + 4.0, -1.0, -1.0 - 4.0]))


def test_a_loaded_imitator_resamples_by_its_own_distinguisher_and_checks(imitator):
    law = {"resample": 3, "checks": [is_wanted, is_short], "wanted": ["r", None, "list"]}
    plain = imitator.answer(QUESTIONS, num_answers=6, seed=5)

    answers = imitator.answer(QUESTIONS, num_answers=6, seed=5, **law)

    assert answers != plain
    assert imitator.verify(QUESTIONS, answers, seed=5, **law).verified
    assert not imitator.verify(QUESTIONS, plain, seed=5, **law).verified
    estimated = imitator.log_prob(QUESTIONS, ["r", "b", "c"], **law)
    assert (estimated.lower_bound < estimated.nats).all()
    # Scoring switched adapters on the shared base, and back.
    assert imitator.answer(QUESTIONS, num_answers=6, seed=5) == plain


def test_conversations_are_resampled_through_their_template(tiny_chat_model_dir):
    seen = []

    def is_short(prompts, completions, completion_ids=None, **columns):
        seen.extend(completions)
        return [len(completion[0]["content"]) < 5 for completion in completions]

    model = AutoModelForCausalLM.from_pretrained(tiny_chat_model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model_dir)
    distinguisher = Distinguisher.from_causal_lm(model, tokenizer, checks=[is_short])
    imitator = Imitator(model, tokenizer, distinguisher=distinguisher, max_new_tokens=4)

    answers = imitator.answer(CHAT, resample=3, checks=[is_short])

    assert {completion[0]["role"] for completion in seen} == {"assistant"}
    assert imitator.verify(CHAT, answers, resample=3, checks=[is_short]).verified
    assert imitator.log_prob(CHAT, ["a", "b", "c"], resample=2, checks=[is_short]).nats.isfinite().all()


def test_conversational_checks_see_messages(saved, tiny_chat_model_dir):
    seen = []

    def is_short(prompts, completions, completion_ids=None, **columns):
        seen.extend(completions)
        return [True] * len(completions)

    model = AutoModelForCausalLM.from_pretrained(tiny_chat_model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model_dir)
    distinguisher = Distinguisher.from_causal_lm(model, tokenizer, checks=[is_short])

    Imitator(model, tokenizer, distinguisher=distinguisher).human_logit(CHAT[:1], ["yes"], checks=[is_short])

    assert seen == [[{"role": "assistant", "content": "yes"}]]


@pytest.mark.parametrize("checks", [None, [], [is_short]])
def test_missing_checks_are_named(imitator, checks):
    with pytest.raises(ValueError, match=r"is_short.*is_wanted.*text_only=True"):
        imitator.human_logit(QUESTIONS, ["a", "b", "c"], checks=checks)


def test_checks_and_text_only_exclude_each_other(imitator):
    with pytest.raises(ValueError, match="text_only"):
        imitator.human_logit(QUESTIONS, ["a", "b", "c"], checks=[is_short, is_wanted], text_only=True)


def test_a_column_of_the_wrong_length_is_named(imitator):
    with pytest.raises(ValueError, match="`wanted` has 1 values for 3 answers"):
        imitator.human_logit(QUESTIONS, ["a", "b", "c"], checks=[is_short, is_wanted], wanted=["a"])


def test_an_imitator_without_distinguisher_says_where_one_comes_from(plain):
    with pytest.raises(FileNotFoundError, match=r"distinguisher/"):
        plain.human_logit(QUESTIONS, ["a", "b", "c"])


def test_nothing_asked_is_nothing_answered(imitator):
    assert imitator.answer([]) == []
    assert imitator.log_prob([], []).nats.shape == (0,)
    assert imitator.verify([], []).verified
    assert imitator.human_logit([], [], text_only=True).shape == (0,)


@pytest.mark.parametrize(
    ("questions", "answers", "error", "message"),
    [
        ("secret", ["a"], TypeError, "is one string"),
        (["secret"], "a", ValueError, "1 questions and one string"),
        (["secret", "b"], ["a"], ValueError, "2 questions and 1 answers"),
        (["secret", None], ["a", "b"], TypeError, r"questions\[1\] is a NoneType"),
        (["secret", CHAT[0]], ["a", "b"], TypeError, r"questions\[1\] is messages"),
        (["secret", "b"], ["a", ["b", "c"]], TypeError, r"answers\[1\] is a list"),
    ],
)
def test_rows_that_do_not_fit_are_named_without_their_text(plain, questions, answers, error, message):
    with pytest.raises(error, match=message) as raised:
        plain.log_prob(questions, answers)

    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_a_confidence_out_of_range_is_named(plain, confidence):
    with pytest.raises(ValueError, match=f"`confidence` is {confidence}"):
        plain.log_prob(["a"], ["b"], confidence=confidence)


def test_a_folder_without_weights_says_what_was_found_and_needed(tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "adapter_model.bin").touch()

    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors.*Found.*adapter_model\.bin.*notes\.txt"):
        Imitator.from_pretrained(tmp_path)


@pytest.mark.parametrize("repo", ["nobody/no-such-imitator-is-cached", "./no such folder", "a/b/c"])
def test_a_repo_that_cannot_be_reached_is_named(repo):
    with pytest.raises(FileNotFoundError, match="neither a local folder nor a Hub repo"):
        Imitator.from_pretrained(repo)


def test_a_distinguisher_is_not_taken_for_an_imitator(saved):
    with pytest.raises(ValueError, match=r"SEQ_CLS.*Distinguisher\.from_pretrained"):
        Imitator.from_pretrained(saved / "distinguisher", device="cpu")


def test_an_adapter_that_names_no_base_is_an_error(saved, tmp_path):
    config = json.loads((saved / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": ""}))
    shutil.copy(saved / "adapter_model.safetensors", tmp_path)

    with pytest.raises(ValueError, match="names no base"):
        Imitator.from_pretrained(tmp_path, device="cpu")


def test_weights_that_would_be_random_are_an_error(tiny_model_dir, tmp_path):
    classifier = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1)
    classifier.config.tie_word_embeddings = False
    classifier.save_pretrained(tmp_path)

    with pytest.raises(ValueError, match=r"1 weights are missing, among them lm_head\.weight"):
        Imitator.from_pretrained(tmp_path, device="cpu")


def test_code_in_a_repo_is_not_run(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")

    with pytest.raises(ValueError, match="trust_remote_code"):
        Imitator.from_pretrained(tmp_path, device="cpu")

    assert not (tmp_path / "ran").exists()
