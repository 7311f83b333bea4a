"""A distinguisher without a language model: it learns pairs as the others do, at its own rate, and can be stored."""

import json

import numpy as np
import pytest
import torch
from distinguishers import is_short, marked_pairs
from scipy import sparse
from sklearn.linear_model import LogisticRegression
from tiny_runs import logged, make, rows, run, train
from transformers import AutoTokenizer

from hf_imitate import Distinguisher, Imitator
from hf_imitate.ngram_distinguisher import NGRAM_LEARNING_RATE, NgramDistinguisher
from hf_imitate.ngram_features import ngram_features
from hf_imitate.pairs import Learner, Pair
from hf_imitate.rendering import Answer


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir):
    return AutoTokenizer.from_pretrained(str(tiny_model_dir))


def ngram(tokenizer, **settings):
    return NgramDistinguisher(tokenizer, [tokenizer.eos_token_id], **settings)


def test_a_logit_is_the_sum_of_weights_times_features(tokenizer):
    distinguisher = ngram(tokenizer)
    torch.manual_seed(0)
    with torch.no_grad():
        distinguisher.model.weight.normal_()
    prompts, answers = ["a b", "c", "d e f"], [Answer("a c", True), Answer("", True), Answer("x" * 50, False)]
    expected = ngram_features(prompts, answers) @ distinguisher.model.weight.detach().numpy()
    found = distinguisher.score(prompts, answers, batch_size=2)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_it_says_nothing_until_it_has_learned(tokenizer):
    assert ngram(tokenizer).score(["q", "r"], [Answer("a", True), Answer("b", True)]).tolist() == [0.0, 0.0]


def test_a_step_is_a_plain_gradient_step_at_its_own_rate_whatever_the_others_is(tokenizer):
    found = []
    for rate in (1e-5, 1e-2):
        distinguisher = ngram(tokenizer)
        learner = Learner(distinguisher, rate)
        pair = marked_pairs(1)
        learner.step(pair, lr_scale=0.1)
        found.append(distinguisher.model.weight.detach().clone())
    human, imitator = (
        ngram_features([pair[0].prompt], [answer]).toarray()[0] for answer in (pair[0].human, pair[0].imitator[0])
    )
    assert torch.equal(*found)
    gradient = -0.5 * (human - imitator)  # of -log sigmoid at 0, where the centring has none
    gradient /= max(1.0, np.linalg.norm(gradient))
    expected = -0.1 * NGRAM_LEARNING_RATE * gradient / (np.abs(gradient) + 1)
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-4, atol=1e-6)


def noisy_pairs(number, seed):
    """Humans prefer some words, imitators others, and both use all of them."""
    rng = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(30)]
    tilt = np.linspace(-0.7, 0.7, 30)

    def text(sign):
        p = np.exp(sign * tilt)
        return " ".join(rng.choice(words, 8, p=p / p.sum()))

    return [Pair(f"q{i}", Answer(text(1), True), (Answer(text(-1), True),)) for i in range(number)]


def test_learning_online_comes_close_to_the_best_logistic_regression(tokenizer):
    pairs, tests = noisy_pairs(600, 0), noisy_pairs(400, 1)
    distinguisher = ngram(tokenizer)
    learner = Learner(distinguisher, 1e-5)
    for _ in range(2):
        for start in range(0, len(pairs), 20):
            learner.step(pairs[start : start + 20])
    online = np.mean([float(seen.human > seen.imitator) for seen in learner.score(tests)])

    def differences(some):
        prompts = [pair.prompt for pair in some]
        sides = [[pair.human for pair in some], [pair.imitator[0] for pair in some]]
        human, imitator = (ngram_features(prompts, side) for side in sides)
        return human - imitator

    seen = differences(pairs)
    batch = LogisticRegression(fit_intercept=False, max_iter=500)
    batch.fit(sparse.vstack([seen, -seen]), np.repeat([1, 0], len(pairs)))
    best = np.mean(differences(tests) @ batch.coef_[0] > 0)
    assert best > 0.85
    assert online > best - 0.03


def test_an_answer_is_cut_where_the_imitators_are(tokenizer):
    distinguisher = ngram(tokenizer, max_answer_tokens=3)
    with torch.no_grad():
        distinguisher.model.weight.normal_(generator=torch.Generator().manual_seed(0))
    ids = tokenizer("number of items")["input_ids"][:3]
    cut = Answer(tokenizer.decode(ids), False)
    whole, same = distinguisher.score(["q", "q"], [Answer("number of items", True), cut])
    assert whole == same
    assert (
        ngram(tokenizer).encode(["q"], [cut])[0].indices.tolist()
        != ngram(tokenizer).encode(["q"], [Answer("number of items", True)])[0].indices.tolist()
    )


def test_it_comes_back_from_disk_without_a_pickle(tmp_path, tokenizer):
    distinguisher = ngram(tokenizer, max_answer_tokens=7, checks=[is_short])
    learner = Learner(distinguisher, 1e-3)
    for _ in range(3):
        learner.step([Pair("q", Answer("abc", True), (Answer("defgh", True),), 1.0, (1.0,), ((0.0,),))])
    distinguisher.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert {"ngram.safetensors", "checks.json"} < files
    assert not any(name.endswith((".bin", ".pkl", ".pt")) for name in files)
    again = Distinguisher.from_pretrained(tmp_path, checks=[is_short])
    assert isinstance(again, NgramDistinguisher)
    assert again.renderer.max_answer_tokens == 7
    prompts, texts = ["q", "Item"], ["abc", "list of things"]
    assert again(prompts, texts) == distinguisher(prompts, texts)
    assert again.check_weights.tolist() == distinguisher.check_weights.tolist() != [0.0]


def test_weights_of_other_features_are_an_error(tmp_path, tokenizer):
    from safetensors.torch import save_file

    ngram(tokenizer).save_pretrained(tmp_path)
    save_file({"weight": torch.zeros(10)}, tmp_path / "ngram.safetensors")
    with pytest.raises(ValueError, match="holds 10 weights for"):
        Distinguisher.from_pretrained(tmp_path)
    save_file({"other": torch.zeros(10)}, tmp_path / "ngram.safetensors")
    with pytest.raises(ValueError, match="holds 0 weights for"):
        Distinguisher.from_pretrained(tmp_path)
    save_file({"weight": ngram(tokenizer).model.weight.detach() * float("nan")}, tmp_path / "ngram.safetensors")
    with pytest.raises(ValueError, match="numbers that are none"):
        Distinguisher.from_pretrained(tmp_path)


def test_a_run_by_name_learns_saves_and_resamples(tmp_path, tiny_model_dir):
    trainer = run(tmp_path, tiny_model_dir, arguments={"distinguisher": "ngram"}, distinguisher_warmup_steps=6)
    losses = logged(trainer, "distinguisher/loss")
    assert losses[5] < 0.3 * losses[0]
    folder = tmp_path / "saved"
    trainer.save_model(str(folder))
    assert (folder / "distinguisher" / "ngram.safetensors").is_file()
    assert json.loads((folder / "distinguisher" / "checks.json").read_text())["kind"] == "ngram"
    imitator = Imitator.from_pretrained(folder)
    questions = rows()["prompt"][:2]
    torch.testing.assert_close(
        imitator.human_logit(questions, ["abc", "zz"]),
        trainer.distinguisher.score(questions, [Answer("abc", True), Answer("zz", True)]),
    )
    assert len(imitator.answer(questions, resample=3)) == 2
    assert imitator.log_prob(questions, ["abc", "de"], resample=3).nats.isfinite().all()


def test_a_run_goes_on_from_a_checkpoint_to_the_same_bits(tmp_path, tiny_model_dir):
    def build(folder, **changes):
        return make(
            folder, tiny_model_dir, arguments={"distinguisher": "ngram"}, distinguisher_warmup_steps=2, **changes
        )

    whole = build(tmp_path / "whole", save_strategy="steps", save_steps=1)
    train(whole)
    again = build(tmp_path / "again")
    train(again, resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert torch.equal(again.distinguisher.model.weight, whole.distinguisher.model.weight)
