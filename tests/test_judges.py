import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_imitate.audits.distinguishability import judge_pairs
from hf_imitate.audits.judges import lora_judge, ngram_judge
from hf_imitate.pairs import Pair
from hf_imitate.rendering import Answer

WORDS = [f"w{number}" for number in range(40)]


def planted(num_pairs: int, change, seed: int = 0, size: tuple[int, int] = (3, 8)) -> list[Pair]:
    """Both sides draw words; `change` maps the imitator's list of words to its answer."""
    rng = np.random.default_rng(seed)
    pairs = []
    for number in range(num_pairs):
        question = " ".join(rng.choice(WORDS, size=4))
        human, imitator = (list(rng.choice(WORDS, size=rng.integers(*size))) for _ in range(2))
        pairs.append(Pair(f"{question} {number}", Answer(" ".join(human), True), (change(imitator, question),)))
    return pairs


PLANTED = {
    "a word": lambda words, question: Answer(" ".join([*words[:-1], "indeed"]), True),
    "a character": lambda words, question: Answer(" ".join(words).replace("w1", "v1", 1) + "q", True),
    "order": lambda words, question: Answer(" ".join(sorted(words)), True),
    "length": lambda words, question: Answer(" ".join(words + words[::-1] + ["w1", "w7"]), True),
    "end": lambda words, question: Answer(" ".join(words), False),
    "repetition": lambda words, question: Answer(" ".join(w for word in words[:3] for w in (word, word)), True),
    "echo": lambda words, question: Answer(" ".join(question.split()[:4]), True),
    "leading space": lambda words, question: Answer(" " + " ".join(words), True),
}


@pytest.mark.parametrize("name", PLANTED)
def test_the_ngram_judge_finds(name):
    found = judge_pairs(planted(300, PLANTED[name]), ngram_judge, name="ngram")
    assert found.interval.low > 0.6


def test_the_ngram_judge_reads_messages():
    pairs = [
        Pair(
            [{"role": "user", "content": pair.prompt}, {"role": "assistant", "content": None}],
            pair.human,
            pair.imitator,
        )
        for pair in planted(200, PLANTED["echo"])
    ]
    assert judge_pairs(pairs, ngram_judge, name="ngram").interval.low > 0.6


@pytest.mark.parametrize("text", ["", " ", "\n", "\x02\x03", "é\u0301", "a" * 5000])
def test_the_ngram_judge_scores_every_text(text):
    pairs = planted(60, PLANTED["a word"])
    scorer = ngram_judge(pairs[:50], pairs[50:], 0)
    scores = scorer(["", "w1"], [Answer(text, True), Answer(text, False)])
    assert scores.shape == (2,)
    assert np.isfinite(scores).all()


def test_the_ngram_judge_weighs_rows():
    """Half the imitator's answers end in "x", the other half of the humans' do: the heavier half decides the sign."""
    pairs = []
    for number in range(200):
        texts = (f"w{number} x", f"w{number} y") if number % 2 else (f"w{number} y", f"w{number} x")
        pairs.append(Pair(str(number), Answer(texts[0], True), (Answer(texts[1], True),), 9.0 if number % 2 else 1.0))
    scorer = ngram_judge(pairs[:150], pairs[150:], 0)
    human_like, other = scorer(["", ""], [Answer("w x", True), Answer("w y", True)])
    assert human_like > other


# PEFT asks transformers for a property that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_lora_judge_finds_what_depends_on_the_base_alone(tiny_model_dir):
    """By path and LoRA; and by model, all weights: the model that was given stays as it was."""
    torch.set_num_threads(1)  # on tensors this small, two threads mostly wait for each other
    rng = np.random.default_rng(0)
    words = [str(word) for word in rng.choice(WORDS, size=120)]
    pairs = [Pair(f"q{i}", Answer(f"{word} is", True), (Answer(f"{word} a", True),)) for i, word in enumerate(words)]
    settings = {"num_steps": 30, "batch_size": 16}
    by_path = judge_pairs(pairs, lora_judge(str(tiny_model_dir), learning_rate=1e-2, **settings), name="lora")
    assert by_path.interval.low > 0.6

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    judge = lora_judge(model, tokenizer, full=True, learning_rate=3e-3, **settings)
    by_model = judge_pairs(pairs, judge, name="full")
    assert by_model.interval.low > 0.6
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_contradicting_settings_of_the_lora_judge_are_refused(tiny_model_dir):
    with pytest.raises(ValueError, match="one of the two"):
        lora_judge("x", full=True, peft_config=object())
    with pytest.raises(ValueError, match="tokenizer"):
        lora_judge(AutoModelForCausalLM.from_pretrained(tiny_model_dir))
