"""Rewards, compared with pycocoevalcap, and the errors of functions of one's own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from llava_simplified.evaluation.metrics import word_f1
from llava_simplified.evaluation.ptb_tokenizer import tokenize
from llava_simplified.training.rewards import CiderScorer, Reward, length_reward, parse_rewards

REFERENCES = [
    ["A red car parked on the street.", "a car, red, in a street"],
    ["two dogs run over a green field", "Dogs running in a field!", "two dogs"],
    ["a man reads a book on a bench"],
    ["the street is empty", "an empty street in the rain"],
]
CAPTIONS = ["a red red car on a street", "two dogs in a field", "a man's bench", "a red car"]
IDS = ["train.json row 1", "train.json row 2", "train.json row 3", "train.json row 4"]


def stock_scores(scorer: object, column: int | None = None) -> list[float]:
    references = {i: [tokenize(text) for text in group] for i, group in enumerate(REFERENCES)}
    captions = {i: [tokenize(text)] for i, text in enumerate(CAPTIONS)}
    _, scores = scorer.compute_score(references, captions)
    return list(scores if column is None else scores[column])


def reward_of(text: str, captions: list[str] = CAPTIONS) -> list[float]:
    return Reward(text, REFERENCES)(IDS, [""] * 4, REFERENCES, captions)


def test_cider_equals_pycocoevalcap() -> None:
    assert reward_of("cider") == pytest.approx(stock_scores(Cider()), abs=1e-12)


def test_cider_of_a_batch_uses_the_frequencies_of_all_training_records() -> None:
    """The score of a caption must not depend on the other images of its step."""
    alone = CiderScorer(REFERENCES).score(CAPTIONS[3], REFERENCES[0])
    reward = Reward("cider", REFERENCES)
    assert reward(IDS[:1], [""], REFERENCES[:1], CAPTIONS[3:]) == [alone]
    assert alone > 0


def test_bleu4_and_rouge_l_equal_pycocoevalcap(capsys: pytest.CaptureFixture[str]) -> None:
    assert reward_of("bleu4") == pytest.approx(stock_scores(Bleu(4), 3), abs=1e-12)
    assert reward_of("rouge_l") == pytest.approx(stock_scores(Rouge()), abs=1e-12)


def test_weighted_sum_adds_the_rewards() -> None:
    expected = []
    for caption, group, cider in zip(CAPTIONS, REFERENCES, reward_of("cider")):
        expected.append(0.5 * cider + word_f1(caption, group) - 2 * length_reward(caption, group))
    assert reward_of("cider=0.5, word_f1,length=-2") == pytest.approx(expected)


def test_length_is_highest_at_the_length_of_a_reference() -> None:
    references = ["one two three four", "one two"]
    assert length_reward("a b c d", references) == length_reward("a b", references) == 1
    assert length_reward("a b c d e", references) == 0.75
    assert length_reward("", references) == length_reward("a " * 8, references) == 0


def test_every_reward_accepts_an_empty_caption() -> None:
    assert reward_of("cider,bleu4,rouge_l,word_f1,length", [""] * 4) == pytest.approx([0] * 4)


@pytest.mark.parametrize("text", ["", "cidre", "cider=x", "cider=nan", "cider,cider", "length=inf"])
def test_malformed_reward_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="--reward"):
        parse_rewards(text)


def test_own_function_gets_paths_references_and_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
def words(images, references, captions):
    assert images == ["a.jpg", "b.jpg"] and len(references) == 2
    return [len(caption.split()) for caption in captions]

def broken(images, references, captions):
    raise KeyError("no such word")

def not_a_number(images, references, captions):
    return [0.0, float("nan")]

def too_few(images, references, captions):
    return [1.0]
"""
    (tmp_path / "own_reward_module.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = (IDS[:2], ["a.jpg", "b.jpg"], REFERENCES[:2], CAPTIONS[:2])
    assert Reward("own_reward_module:words=2", REFERENCES)(*arguments) == [14.0, 10.0]
    for name, record in (("broken", IDS[0]), ("not_a_number", IDS[1]), ("too_few", IDS[0])):
        reward = Reward(f"own_reward_module:{name}", REFERENCES)
        with pytest.raises(ValueError, match=record) as error:
            reward(*arguments)
        assert name in str(error.value)
    for missing in ("own_reward_module:nothing", "no_such_module:function"):
        with pytest.raises(ValueError, match=missing):
            Reward(missing, REFERENCES)


def test_cider_of_a_single_record_is_refused() -> None:
    with pytest.raises(ValueError, match="word_f1"):
        CiderScorer(REFERENCES[:1])
    assert math.isfinite(CiderScorer(REFERENCES[:2]).score("a", REFERENCES[0]))
