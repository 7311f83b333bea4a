"""How adversarial games are known to fail, each played out on a model small enough that its whole law can be read.

The settings were found on seeds 1 to 5; the tests run on another.
"""

import copy
import logging
from functools import cache

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_runs import AtEveryStep, Watched, train
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hf_imitate import AdversarialConfig, AdversarialTrainer
from hf_imitate.contest import Scores
from hf_imitate.rendering import Renderer, collate
from hf_imitate.scoring import score_answers
from hf_imitate.trainers import adversarial_game

QUESTION = "say it"
WORDS = ["red", "blue", "green", "black", "white"]
SEED = 6


@cache
def tokenizer(words=tuple(WORDS)):
    """One token per word."""
    ids = {word: i for i, word in enumerate(["<end>", "<pad>", "<unk>", *QUESTION.split(), *words])}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")


def new_model(seed, words=tuple(WORDS)):
    """An untrained model of about 10 000 parameters."""
    config = Qwen3Config(
        vocab_size=len(tokenizer(words)),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer(words).eos_token_id,
        pad_token_id=tokenizer(words).pad_token_id,
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def rendered(answers):
    return Renderer(tokenizer(), [tokenizer().eos_token_id]).human([QUESTION] * len(answers), answers)


@cache
def _fitted(answers, law, seed):
    model = new_model(seed)
    batch = collate(rendered(answers), tokenizer().pad_token_id)
    labels = batch.input_ids.masked_fill(batch.answer_mask == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, 400)
    for _ in range(400):
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none").sum(1)
        (torch.tensor(law, dtype=torch.float32) * nats).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def fitted(answers, law, seed=SEED):
    """A model whose law is (nearly) the one given, by its full cross-entropy."""
    return copy.deepcopy(_fitted(tuple(answers), tuple(law), seed))


def exact_law(model, answers):
    """The model's probability of each answer; what is missing to 1 is other text."""
    return np.exp(np.asarray(score_answers(model, rendered(answers), tokenizer().pad_token_id), dtype=float))


def total_variation(law, human):
    return (np.abs(law - human).sum() + 1 - law.sum()) / 2


def human_rows(answers, law, seed=SEED, number=1000):
    """Rows in the very proportions of the law, in any order."""
    ids = np.repeat(np.arange(len(answers)), np.round(number * np.asarray(law)).astype(int))
    drawn = np.random.default_rng([seed, 1]).permutation(ids)
    return Dataset.from_dict({"prompt": [QUESTION] * len(ids), "completion": [answers[i] for i in drawn]})


def play(
    folder,
    base,
    dataset,
    at_every_step=lambda trainer: None,
    kind=AdversarialTrainer,
    words=tuple(WORDS),
    **changes,
):
    """A game on the policy term alone, by plain gradient descent: its steps shrink with the reward, as in theory."""
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "seed": SEED,
        "max_steps": 50,
        "per_device_train_batch_size": 128,
        "num_generations": 4,
        "distinguisher_generations": 2,
        "max_completion_length": 5,
        "optim": "sgd",
        "learning_rate": 6e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "distinguisher_learning_rate": 5e-3,
        "distinguisher_steps": 3,
        "replay_ratio": 0.0,  # old answers slow the distinguisher down, and so short a game then ends in mid-swing
        "imitator_warmup_steps": 0,
        "distinguisher_lm_warmup_steps": 0,
        "distinguisher_warmup_steps": 20,
        "retrodictive_coef": 0.0,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if changes.get("beta"):
        base.save_pretrained(folder / "start")
        base.config._name_or_path = str(folder / "start")  # where TRL finds the law to anchor to
    trainer = kind(
        model=base,
        args=AdversarialConfig(**{**settings, **changes}),
        train_dataset=dataset,
        distinguisher=copy.deepcopy(base),
        processing_class=tokenizer(words),
    )
    trainer.add_callback(AtEveryStep(lambda: at_every_step(trainer)))
    train(trainer)
    return trainer


def fresh_accuracy(trainer):
    """One reading for every five steps of the game."""
    return [e["distinguisher/accuracy_fresh"] for e in trainer.state.log_history if e.get("phase") == "game"]


# --- two modes, and lengths


LENGTHS = [" ".join(["red"] * n) for n in range(1, 21)]
HUMP = np.array([0.25, 0.5, 0.25])


def two_modes(curt):
    """Some answer in two to four words, others in eight to ten."""
    return np.r_[0, curt * HUMP, np.zeros(3), (1 - curt) * HUMP, np.zeros(10)]


def entropy(law):
    return -(law * np.log(np.where(law > 0, law, 1))).sum()


def last_laws(folder, base, human, read, **changes):
    """What `read` says of the imitator, averaged over the last twenty steps: it swings around where it goes."""
    found = []

    def note(trainer):
        if trainer.state.global_step > trainer.phases.total - 20:
            found.append(read(base))

    trainer = play(folder, base, human_rows(LENGTHS, human), at_every_step=note, **changes)
    return np.mean(found, axis=0), trainer


def test_a_game_keeps_both_modes_of_the_human_and_their_variety(tmp_path):
    base, human = fitted(LENGTHS, two_modes(0.15)), two_modes(0.6)
    start = total_variation(exact_law(base, LENGTHS), human)

    law, trainer = last_laws(
        tmp_path,
        base,
        human,
        lambda model: exact_law(model, LENGTHS),
        max_completion_length=12,
        distinguisher_learning_rate=1e-2,
    )

    assert start > 0.4
    assert total_variation(law, human) <= 0.4 * start
    assert abs(law[:6].sum() - 0.6) <= 0.1
    assert abs(law[6:].sum() - 0.4) <= 0.1
    assert 0.85 <= entropy(law) / entropy(human) <= 1.15
    assert 0.45 <= np.mean(fresh_accuracy(trainer)[-4:]) <= 0.6


TEXTS = ["red", "blue", "green", "red blue", "blue red", "white", "black", "white white", "black black", "white black"]
WITHIN = np.array([0.3, 0.25, 0.2, 0.15, 0.1])


def test_against_a_frozen_distinguisher_the_imitator_leaves_the_human(tmp_path):
    """What pay by a reward model that no longer learns does: the imitator finds what it wrongly takes for human."""
    base, human = fitted(TEXTS, np.r_[0.15 * WITHIN, 0.85 * WITHIN]), np.r_[0.6 * WITHIN, 0.4 * WITHIN]
    start = total_variation(exact_law(base, TEXTS), human)

    def freeze(trainer):
        trainer.args.distinguisher_steps = 3 if trainer.state.global_step < trainer.phases.game_start else 0

    play(tmp_path, base, human_rows(TEXTS, human), at_every_step=freeze, max_steps=80)

    assert total_variation(exact_law(base, TEXTS), human) > start


HUMAN_LENGTHS = np.r_[[0.02, 0.08, 0.15, 0.2, 0.2, 0.15, 0.1, 0.06, 0.03, 0.01], np.zeros(10)]
LONG = np.exp(-0.5 * ((np.arange(1, 21) - 8) / 3) ** 2)
LONG = LONG / LONG.sum()


def law_of_lengths(model, limit):
    """Probabilities of 1 to `limit` - 1 words, and of being cut: the end token, too, counts as a token."""
    cut = [row._replace(answer_ids=row.answer_ids[:limit]) for row in rendered(LENGTHS[limit - 1 : limit])]
    law = exact_law(model, LENGTHS[: limit - 1])
    law = np.r_[law, np.exp(float(score_answers(model, cut, tokenizer().pad_token_id)[0]))]
    assert law.sum() > 0.97  # the rest has words that no human of this world uses
    return law / law.sum()


def play_lengths(folder, limit):
    """The law of lengths at the start and at the end of a game, and the human's."""
    base = fitted(LENGTHS, LONG)
    start = law_of_lengths(base, limit)
    law, trainer = last_laws(
        folder, base, HUMAN_LENGTHS, lambda model: law_of_lengths(model, limit), max_completion_length=limit
    )
    return start, law, np.r_[HUMAN_LENGTHS[: limit - 1], HUMAN_LENGTHS[limit - 1 :].sum()], trainer


def test_a_game_matches_the_lengths_of_the_human_where_the_imitator_began_too_long(tmp_path):
    start, law, human, _ = play_lengths(tmp_path, limit=14)

    words = np.arange(1, 15)
    assert start @ words > 1.4 * (human @ words)
    assert law @ words == pytest.approx(human @ words, rel=0.05)
    assert np.abs(np.cumsum(law - human)).max() <= 0.1
    assert start[-1] > 0.02
    assert human[-1] < 1e-9
    assert law[-1] < 0.005  # no human answer is cut


def test_with_a_limit_below_the_humans_tail_answers_are_cut_as_often_as_the_humans_are(tmp_path):
    """A human who is cut has no end token either: a matched law is cut as often, not never."""
    start, law, human, trainer = play_lengths(tmp_path, limit=7)

    assert human[-1] == pytest.approx(0.2)
    assert start[-1] > human[-1] + 0.4
    assert -0.05 <= law[-1] - human[-1] <= 0.02
    assert np.abs(np.cumsum(law - human)).max() <= 0.1
    assert trainer.game.pause is None


# --- at equilibrium


WORD_LAW = np.array([0.4, 0.3, 0.15, 0.1, 0.05])


def play_words(folder, base, last=20, **changes):
    """The exact laws of one-word answers at the last steps of a game."""
    laws = []
    play(
        folder,
        base,
        human_rows(WORDS, WORD_LAW),
        at_every_step=lambda trainer: laws.append(exact_law(base, WORDS)),
        max_completion_length=2,
        per_device_train_batch_size=64,
        distinguisher_warmup_steps=0,
        distinguisher_steps=1,
        **changes,
    )
    return laws[-last:]


def test_at_the_humans_own_law_noise_moves_the_imitator_less_where_rewards_keep_their_scale(tmp_path):
    """Nothing is left to learn: what the distinguisher says is noise, and dividing it by its spread makes it loud."""
    drift = {}
    for scale in ("none", "group"):
        laws = play_words(
            tmp_path, fitted(WORDS, WORD_LAW), scale_rewards=scale, learning_rate=2.5e-3, max_grad_norm=0.0
        )
        drift[scale] = np.mean([total_variation(law, WORD_LAW) for law in laws])
    assert drift["none"] < 0.5 * drift["group"]
    assert drift["none"] < 0.03


def test_an_anchor_biases_the_law_as_its_closed_form_says_the_more_the_stronger_it_is(tmp_path, monkeypatch):
    """With `beta` the optimum is p_human^(1/(1+beta)) start^(beta/(1+beta)), normalised, and not p_human.

    The distinguisher scores as the best one would, log p_human - log p_imitator, so that what is left is the anchor.
    TRL's default estimate of it has the gradient of another divergence; `use_bias_correction_kl` gives this one's.
    """
    start = [0.03, 0.03, 0.04, 0.3, 0.6]
    distance, bias = {}, {}
    for beta in (0.0, 0.05, 0.5):
        base = fitted(WORDS, start)
        reference = exact_law(base, WORDS)

        def ideal(learner, batch, base=base, **lesson):
            ratio = dict(zip(WORDS, np.log(WORD_LAW) - np.log(exact_law(base, WORDS)), strict=True))
            imitator = torch.tensor([ratio.get(answer.text, -5.0) for answer in batch.answers], dtype=torch.float32)
            human = torch.tensor([ratio[human.answer.text] for human in batch.humans], dtype=torch.float32)
            return Scores(imitator, human, 0.0)

        monkeypatch.setattr(adversarial_game, "score_then_update", ideal)
        changes = {"beta": beta, "use_bias_correction_kl": True, "learning_rate": 0.1, "max_steps": 80}
        law = np.mean(play_words(tmp_path, base, **changes), axis=0)
        expected = WORD_LAW ** (1 / (1 + beta)) * reference ** (beta / (1 + beta))
        bias[beta], distance[beta] = total_variation(law, WORD_LAW), total_variation(law, expected / expected.sum())
    assert bias[0.0] < bias[0.05] < bias[0.5]
    assert max(distance.values()) <= 0.03


# --- a distinguisher that is too good


@pytest.mark.parametrize("bf16", [False, True])
def test_a_saturated_distinguisher_pays_finite_rewards_that_still_differ_or_pauses_the_game(tmp_path, bf16):
    """The human always says what the imitator never does: nothing is easier to tell apart."""
    base = fitted(WORDS, [0.0, 0.4, 0.3, 0.2, 0.1])
    dataset = human_rows(["red"], [1.0], number=200)

    trainer = play(
        tmp_path,
        base,
        dataset,
        kind=Watched,
        bf16=bf16,
        max_completion_length=2,
        per_device_train_batch_size=32,
        distinguisher_warmup_steps=40,
        distinguisher_learning_rate=3e-2,
        max_steps=5,
        logging_steps=1,
    )

    game = trainer.batches[-5:]
    margins = [e["distinguisher/margin"] for e in trainer.state.log_history if e.get("phase") == "game"]
    assert margins[0] > 5
    assert fresh_accuracy(trainer)[0] > 0.99
    for batch in game:
        assert batch["rewards"].isfinite().all()
        assert batch["advantages"].isfinite().all()
    spread = game[0]["rewards"][:, 0].view(-1, 4).std(dim=1).mean()
    assert spread > 1e-3 or trainer.game.pause is not None
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


@pytest.mark.parametrize("number", [64, 2000])
def test_a_distinguisher_that_knows_its_few_human_answers_by_heart_is_named(tmp_path, caplog, number):
    """Humans of the imitator's own law: nothing but memory tells the sides apart. Many rows leave nothing to keep."""
    words = tuple(f"w{i}" for i in range(300))
    base = new_model(SEED, words)
    ids = tokenizer(words)([QUESTION], return_tensors="pt")["input_ids"]
    law = base(input_ids=ids).logits[0, -1].softmax(-1).detach().double().numpy()[-300:]
    drawn = np.random.default_rng(SEED).choice(words, number, p=law / law.sum())
    dataset = Dataset.from_dict({"prompt": [QUESTION] * number, "completion": drawn.tolist()})

    with caplog.at_level(logging.WARNING):
        trainer = play(
            tmp_path,
            base,
            dataset,
            words=words,
            heldout_fraction=0.5,
            max_completion_length=1,
            per_device_train_batch_size=32,
            distinguisher_warmup_steps=50,
            distinguisher_learning_rate=1e-2,
            learning_rate=1e-9,
            max_steps=5,
        )

    said = [record.getMessage() for record in caplog.records if "by heart" in record.getMessage()]
    memory = trainer.game.memory
    assert len(said) == (number == 64)
    assert memory.num > 100
    assert memory.num_heldout > 50
    assert trainer.game.pause is None
