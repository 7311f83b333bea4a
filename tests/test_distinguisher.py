import contextlib

import pytest
import torch
from distinguishers import (
    ANSWERS,
    LORA,
    QUESTIONS,
    causal_lm,
    imitator_model,
    is_short,
    is_wanted,
    make,
    marked_pairs,
    trained,
)
from peft import LoraConfig
from transformers import AutoTokenizer

from hf_imitate.candidates import logits_of
from hf_imitate.distinguisher import ADAPTER_NAME, Distinguisher, fit
from hf_imitate.pairs import Learner, Pair
from hf_imitate.rendering import Answer, Renderer
from hf_imitate.surface import audit_surface


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture(scope="module")
def separate(tiny_model_dir, tokenizer):
    return make("adapter", tiny_model_dir, tokenizer)


@pytest.fixture
def shared(tiny_model_dir, tokenizer):
    return make("shared", tiny_model_dir, tokenizer)


# --- one text, one score


def test_identical_text_gets_an_identical_score_in_any_company(separate):
    alone = [separate.score([q], [a]) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]

    together = separate.score(QUESTIONS, ANSWERS)
    reversed_pairs = separate.score(QUESTIONS[::-1], ANSWERS[::-1], batch_size=3).flip(0)

    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    torch.testing.assert_close(together, reversed_pairs, atol=1e-5, rtol=0)
    assert together.std() > 0.01


def test_a_question_alone_has_its_score_also_beside_its_answers(separate):
    """An answer that was cut before its first token."""
    questions, answers = ["items of many words"] * 3, [Answer("of items", True), Answer("", False), Answer("no", True)]
    alone = torch.cat([separate.score([q], [a]) for q, a in zip(questions, answers, strict=True)])
    torch.testing.assert_close(separate.score(questions, answers), alone, atol=1e-5, rtol=0)


def test_the_side_an_answer_stands_on_does_not_change_its_logit(separate):
    learner = Learner(separate, 1e-3)
    one, other = ANSWERS[0], ANSWERS[2]

    seen = learner.score([Pair("q", one, (other, one)), Pair("q", other, (one,))])

    torch.testing.assert_close(seen[0].human, seen[0].imitator[1].expand(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[1].human, seen[0].imitator[:1], atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[0].human[:1], separate.score(["q"], [one]), atol=1e-5, rtol=0)


def test_a_tokenizer_that_pads_left_changes_nothing(separate, tiny_model_dir):
    left = AutoTokenizer.from_pretrained(tiny_model_dir, padding_side="left")

    same = Distinguisher(separate.model, left)

    torch.testing.assert_close(same.score(QUESTIONS, ANSWERS), separate.score(QUESTIONS, ANSWERS), atol=1e-5, rtol=0)


def test_a_tokenizer_without_a_pad_token_scores_the_same(separate, tiny_model_dir):
    padless = AutoTokenizer.from_pretrained(tiny_model_dir)
    padless.pad_token = None

    same = Distinguisher(separate.model, padless)

    torch.testing.assert_close(same.score(QUESTIONS, ANSWERS), separate.score(QUESTIONS, ANSWERS), atol=1e-5, rtol=0)


def test_an_answer_that_ended_and_one_that_was_cut_differ(separate):
    ended, cut = separate.score(["q", "q"], [Answer("of items", True), Answer("of items", False)])

    assert (ended - cut).abs() > 1e-3


def test_dropout_never_changes_a_score(tiny_model_dir, tokenizer):
    model = causal_lm(tiny_model_dir)
    model.config.attention_dropout = 0.5
    lora = LoraConfig(target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    distinguisher = Distinguisher.from_causal_lm(type(model)(model.config), tokenizer, peft_config=lora)
    distinguisher.model.train()

    torch.testing.assert_close(distinguisher.score(QUESTIONS, ANSWERS), distinguisher.score(QUESTIONS, ANSWERS))


def test_the_logit_is_the_one_that_a_plain_classifier_gives(separate):
    rows = separate.encode(QUESTIONS, ANSWERS)

    expected = [
        separate.model(input_ids=torch.tensor([row.prompt_ids + row.answer_ids])).logits[0, 0].item() for row in rows
    ]

    assert separate.score(QUESTIONS, ANSWERS).tolist() == pytest.approx(expected, abs=1e-5)


# --- both sides through one renderer


def test_sampled_ids_reach_it_as_the_human_rendering_of_the_same_string(separate, tokenizer):
    """A policy may spell a text in ids that no tokenizer would choose; that is not a sign of the imitator."""
    text = "Return the name"
    letters = [tokenizer(letter)["input_ids"][0] for letter in text]
    usual = tokenizer(text)["input_ids"]
    assert letters != usual
    assert tokenizer.decode(letters) == text
    renderer = Renderer(tokenizer, [tokenizer.eos_token_id])

    sampled = renderer.read([*letters, tokenizer.eos_token_id])
    human = renderer.read(renderer.human(["q"], [text])[0].answer_ids)

    assert sampled == human
    assert separate.encode(["q"], [sampled]) == separate.encode(["q"], [human])
    assert separate.encode(["q"], [sampled])[0].answer_ids == [*usual, tokenizer.eos_token_id]


@pytest.mark.parametrize("limit", [1, 3, 5])
def test_a_human_answer_over_the_limit_is_cut_exactly_like_a_sampled_one(tiny_model_dir, tokenizer, limit):
    distinguisher = Distinguisher.from_causal_lm(causal_lm(tiny_model_dir), tokenizer, max_answer_tokens=limit)
    renderer = Renderer(tokenizer, [tokenizer.eos_token_id], max_answer_tokens=limit)
    text = "xyzxyz"
    sampled_ids = tokenizer(text)["input_ids"][:limit]  # as generation stops: no end token, `limit` ids

    human = renderer.read(renderer.human(["q"], [text])[0].answer_ids)
    sampled = renderer.read(sampled_ids)

    assert human == sampled == Answer(text[:limit], False)
    assert distinguisher.encode(["q"], [human]) == distinguisher.encode(["q"], [sampled])
    assert distinguisher.encode(["q"], [human])[0].answer_ids == sampled_ids


def test_text_that_spells_a_special_token_stays_text(separate, tokenizer):
    row = separate.encode(["q"], [Answer("a<|endoftext|>b<|reserved_0|>", True)])[0]

    special = set(tokenizer.all_special_ids) | set(tokenizer.convert_tokens_to_ids(["<|reserved_0|>", "<|im_end|>"]))
    assert special.isdisjoint(row.answer_ids[:-1])
    assert tokenizer.decode(row.answer_ids[:-1]) == "a<|endoftext|>b<|reserved_0|>"


@pytest.mark.parametrize(
    "leak",
    [
        lambda text: text.replace("\u00e9", "e\u0301"),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text + " \n",
        lambda text: " " + text,
        lambda text: text.replace("\n", " \t\n"),
    ],
    ids=["not NFC", "CRLF", "trailing blanks", "leading space", "blanks at a line's end"],
)
def test_a_planted_surface_leak_vanishes_for_the_distinguisher(separate, tokenizer, leak):
    """What the audit of the raw answers sees at once, the distinguisher never gets to see."""
    texts = [f"caf\u00e9 {number % 7}\nnumber {number % 5}" for number in range(60)]
    raw = ([Answer(leak(text), True) for text in texts], [Answer(text, True) for text in texts[::-1]])

    read = [
        [Answer(tokenizer.decode(row.answer_ids[:-1]), row.ended) for row in separate.encode(["q"] * len(side), side)]
        for side in raw
    ]

    assert audit_surface(*raw).auc > 0.9
    assert audit_surface(*read).auc <= 0.55
    assert audit_surface(*read).leaks == ()


# --- TRL's reward signature


def test_as_a_reward_it_reads_messages_and_ends(tiny_chat_model_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_chat_model_dir)
    distinguisher = trained(Distinguisher.from_causal_lm(str(tiny_chat_model_dir)))
    prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
    completions = [[{"role": "assistant", "content": answer.text}] for answer in ANSWERS]
    end, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|pad|>"])
    ids = [[20, end], [20], [20, end, pad, 21], [end]]

    rewards = distinguisher(prompts=prompts, completions=completions, completion_ids=ids, trainer_state=None)

    assert rewards == distinguisher.score(prompts, ANSWERS).tolist()
    assert all(isinstance(reward, float) for reward in rewards)


def test_as_a_reward_an_answer_of_no_ids_did_not_end(separate):
    with_ids = separate(
        prompts=["q", "q"], completions=["", ""], completion_ids=[[], [separate.tokenizer.eos_token_id]]
    )
    without = separate(prompts=["q"], completions=[""])

    assert with_ids == pytest.approx(separate.score(["q"] * 2, [Answer("", False), Answer("", True)]).tolist())
    assert without == pytest.approx(with_ids[1:])
    assert separate(prompts=[], completions=[], completion_ids=[]) == []


def test_as_a_reward_it_adds_its_checks_and_asks_for_missing_ones(tiny_model_dir, tokenizer):
    distinguisher = make("adapter", tiny_model_dir, tokenizer, checks=[is_short, is_wanted])
    text = distinguisher.score(["q"] * 3, [Answer(t, True) for t in ("abc", "abcdef", "x")])

    rewards = distinguisher(prompts=["q"] * 3, completions=["abc", "abcdef", "x"], wanted=["abc", "no", None])

    # Weights 1 and 2: pass and pass, fail and fail, pass and not applicable.
    torch.testing.assert_close(torch.tensor(rewards) - text, torch.tensor([0.5 + 1.0, -0.5 - 1.0, 0.5]))
    distinguisher.checks = ()
    with pytest.raises(ValueError, match=r"is_short.*is_wanted.*checks="):
        distinguisher(prompts=["q"], completions=["abc"], wanted=["abc"])


# --- checks


def test_checks_read_an_answer_in_the_spelling_that_they_read_in_training(tiny_model_dir, tokenizer):
    """A blank at its end would have failed a check of the whole answer, though training passed it."""
    d = make("adapter", tiny_model_dir, tokenizer, checks=[is_wanted])
    as_written, canonical = ["it \n", "it"]

    paid = d(["q", "q"], [as_written, canonical], wanted=["it", "it"])
    messages = [[{"role": "assistant", "content": text}] for text in (as_written, canonical)]
    kept = logits_of(
        *(d, d.renderer, ["q", "q"], [Answer(as_written, True), Answer(canonical, True)]),
        *([is_wanted], {"wanted": ["it", "it"]}),
    ).tolist()

    assert paid[0] == pytest.approx(paid[1], abs=1e-5)
    assert kept[0] == pytest.approx(kept[1], abs=1e-5)
    assert d.renderer.tidy(messages) == [messages[1], messages[1]]


def test_a_check_that_does_not_apply_adds_nothing(tiny_model_dir, tokenizer):
    distinguisher = make("adapter", tiny_model_dir, tokenizer, checks=[is_short, is_wanted])

    added = distinguisher.check_logits(torch.tensor([[1.0, 0.0], [torch.nan, 0.25], [torch.nan, torch.nan]]))

    torch.testing.assert_close(added, torch.tensor([0.5 - 1.0, -0.5, 0.0]))


def test_checks_must_be_those_it_was_trained_with_in_any_order(tiny_model_dir, tokenizer):
    distinguisher = make("adapter", tiny_model_dir, tokenizer, checks=[is_short, is_wanted])

    distinguisher.set_checks([is_wanted, is_short])

    assert distinguisher.checks == (is_short, is_wanted)
    for wrong in ([], [is_short], [is_short, is_wanted, test_a_check_that_does_not_apply_adds_nothing]):
        with pytest.raises(ValueError, match="was trained with the checks"):
            distinguisher.set_checks(wrong)


def test_two_checks_of_one_name_are_an_error(tiny_model_dir, tokenizer):
    with pytest.raises(ValueError, match="is_short"):
        Distinguisher.from_causal_lm(causal_lm(tiny_model_dir), tokenizer, checks=[is_short, is_short])


def test_new_checks_start_at_weight_zero(tiny_model_dir, tokenizer):
    distinguisher = Distinguisher.from_causal_lm(causal_lm(tiny_model_dir), tokenizer)

    distinguisher.set_checks([is_short])

    assert distinguisher.check_names == ("is_short",)
    assert distinguisher.check_weights.tolist() == [0.0]


# --- a shared base


def test_switching_leaves_flags_and_active_adapter_as_found(shared):
    model = shared.model
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert any(before.values())

    with contextlib.suppress(RuntimeError), shared.active():
        assert model.active_adapter == ADAPTER_NAME
        raise RuntimeError("even if something fails")
    Learner(shared, 1e-3).step([Pair("q", ANSWERS[0], (ANSWERS[2],))])
    shared.score(QUESTIONS, ANSWERS)

    assert model.active_adapter == "default"
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before


def test_adding_it_to_a_frozen_imitator_and_asking_it_thaws_nothing(tiny_model_dir, tokenizer):
    """PEFT makes an adapter trainable whenever it is switched to."""
    model = imitator_model(tiny_model_dir).requires_grad_(False)

    distinguisher = Distinguisher.on_shared_base(model, tokenizer, LORA)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    distinguisher.score(QUESTIONS, ANSWERS)

    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]], ids=str)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_its_adapter_on_any_layer_is_its_own_and_starts_frozen(tiny_model_dir, tokenizer, targets):
    """An embedding's adapter is named `lora_embedding_A.distinguisher`, without a dot behind."""
    model = imitator_model(tiny_model_dir)
    distinguisher = Distinguisher.on_shared_base(
        model, tokenizer, LoraConfig(r=2, target_modules=targets), end_ids=[tokenizer.eos_token_id]
    )

    own = distinguisher.trainable_parameters()

    assert len(own) == 2 * 2 + 2 * (len(targets) - 1) + 1  # A and B in two layers, of the embedding, and the head
    assert not any(parameter.requires_grad for parameter in own[:-1])


def test_learning_leaves_the_imitator_and_its_optimizer_alone(shared):
    model = shared.model
    own = {id(parameter) for parameter in shared.trainable_parameters()}
    others = {name: p for name, p in model.named_parameters() if id(p) not in own}
    optimizer = torch.optim.AdamW([p for p in others.values() if p.requires_grad], lr=1e-3)
    model(input_ids=torch.tensor([[20, 21]])).logits.float().square().sum().backward()
    optimizer.step()
    weights = {name: p.detach().clone() for name, p in others.items()}
    gradients = {name: p.grad.clone() for name, p in others.items() if p.grad is not None}
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    logits = model(input_ids=torch.tensor([[20, 21]])).logits
    head = shared.head.weight.detach().clone()

    Learner(shared, 1e-2).step([Pair("q", ANSWERS[0], (ANSWERS[2],))])

    assert not torch.equal(shared.head.weight, head)
    assert all(torch.equal(p, weights[name]) for name, p in others.items())
    assert all(torch.equal(others[name].grad, gradient) for name, gradient in gradients.items())
    assert all(torch.equal(s["exp_avg"], m) for s, m in zip(optimizer.state.values(), moments, strict=True))
    assert torch.equal(model(input_ids=torch.tensor([[20, 21]])).logits, logits)


def test_gradients_of_both_adapters_are_equal_with_checkpointing_on_and_off(tiny_model_dir, tokenizer):
    """With checkpointing a forward is computed again in its backward: under the wrong adapter, if it was switched."""

    def gradients(is_checkpointed):
        distinguisher = make("shared", tiny_model_dir, tokenizer)
        model = distinguisher.model.train()
        if is_checkpointed:
            model.activation_checkpointing_enable()
            model.enable_input_require_grads()
        calls = []
        layer = model.get_base_model().model.layers[0]
        layer.input_layernorm.register_forward_pre_hook(lambda *_: calls.append(1))
        own = {id(parameter) for parameter in distinguisher.trainable_parameters()}
        imitators = [p for p in model.parameters() if p.requires_grad and id(p) not in own]
        learner = Learner(distinguisher, 1e-3, max_grad_norm=1e9)
        seen = []
        learner.optimizer.register_step_pre_hook(
            lambda *_: seen.extend(parameter.grad.clone() for parameter in learner.parameters)
        )
        model(input_ids=torch.tensor([[20, 21, 22]])).logits.float().square().mean().backward()
        learner.step([Pair("q", ANSWERS[0], (ANSWERS[2], ANSWERS[1]))])
        return [p.grad for p in imitators], seen, len(calls)

    (imitator_off, own_off, num_off), (imitator_on, own_on, num_on) = gradients(False), gradients(True)

    assert (num_off, num_on) == (2, 4)  # checkpointing was really on
    assert max(g.abs().max() for g in imitator_off) > 1e-3
    assert max(g.abs().max() for g in own_off) > 1e-3
    for one, other in zip(imitator_off + own_off, imitator_on + own_on, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_a_separate_distinguisher_is_really_checkpointed_where_asked(tiny_model_dir, tokenizer):
    distinguisher = make("adapter", tiny_model_dir, tokenizer)
    pair = Pair("q", ANSWERS[0], (ANSWERS[2],))
    expected = Learner(distinguisher, 1e-3).score([pair])[0]
    calls = []
    distinguisher.model.get_base_model().model.layers[0].input_layernorm.register_forward_pre_hook(
        lambda *_: calls.append(1)
    )

    distinguisher.place(torch.device("cpu"), contextlib.nullcontext, gradient_checkpointing=True)
    seen = Learner(distinguisher, 1e-3).step([pair]).logits[0]

    assert len(calls) == 2
    torch.testing.assert_close(seen.imitator, expected.imitator, atol=1e-6, rtol=0)


def test_a_model_without_a_head_says_what_to_pass(tiny_model_dir, tokenizer):
    with pytest.raises(ValueError, match="AutoModelForSequenceClassification"):
        Distinguisher(causal_lm(tiny_model_dir), tokenizer)


def test_the_language_model_it_starts_from_is_left_alone(tiny_model_dir, tokenizer):
    model = causal_lm(tiny_model_dir)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    fit(Distinguisher.from_causal_lm(model, tokenizer), marked_pairs(4), num_steps=2)

    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
