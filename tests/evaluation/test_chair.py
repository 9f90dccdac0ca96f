"""Tests of CHAIR, and of the statistics of captions that need no references."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import llava_simplified
from llava_simplified.evaluation.bootstrap import score_metrics
from llava_simplified.evaluation.chair import (
    annotated_objects,
    chair_metrics,
    load_vocabulary,
    mentioned_objects,
    read_instances,
)
from llava_simplified.evaluation.comparison import compare_runs
from llava_simplified.evaluation.evaluate_command import main
from llava_simplified.evaluation.metrics import Sample, evaluate
from llava_simplified.evaluation.text_statistics import describe_texts


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        ("Two hot dogs on a bun.", ["hot dog"]),
        ("a hot, dog", ["dog"]),
        ("a baby elephant with its mother", ["elephant", "person"]),
        ("adult zebras and a baby", ["zebra", "person"]),
        ("an animal: a baby animal", []),
        ("a passenger train; a passenger", ["train", "person"]),
        ("a passenger jet", ["airplane"]),
        ("the toilet seat is up", ["toilet"]),
        ("the seats of the toilets", ["toilet"]),
        ("the seats of a car", ["chair", "car"]),
        ("wine glasses, glasses and a glass", ["wine glass"]),
        ("a train on train tracks", ["train"]),
        ("a batter at home plate", []),
        ("a bow tie", ["tie"]),
        ("skis and a ski", ["skis", "skis"]),
        ("women, men, children, policemen and ladies", ["person"] * 5),
        (
            "geese, mice, knives, calves, sheep, ponies",
            ["bird", "mouse", "knife", "cow", "sheep", "horse"],
        ),
        ("buses, benches, sandwiches, buffaloes", ["bus", "bench", "sandwich", "cow"]),
        ("the man's dog", ["person", "dog"]),
        ("a man-made lake with a t-shirt", []),
        ("a teddy bear beside a bear", ["teddy bear", "bear"]),
        ("a coffee table", ["dining table"]),
        ("scissors and a bus", ["scissors", "bus"]),
        ("a street light, a fire hydrant", ["traffic light", "fire hydrant"]),
        ("", []),
    ],
)
def test_mentioned_objects_follows_the_rules(caption: str, objects: list[str]) -> None:
    assert mentioned_objects(caption) == objects


def test_vocabulary_has_the_80_categories_and_no_ambiguous_plural() -> None:
    vocabulary = load_vocabulary()
    assert len(set(vocabulary.category_of.values())) == 80
    for category in set(vocabulary.category_of.values()):
        assert vocabulary.category_of[category] == category
    assert vocabulary.category_of["sofa"] == "couch"
    # A plural that is also another word must not be read as that word.
    assert not set(vocabulary.singular_of) & set(vocabulary.category_of)


# ---- scores ----

CAPTIONS = [
    ["a man with two hot dogs on a bench", "a man and a man"],
    ["a street at night", "a dog and a cat"],
    ["a bus, a bus and a dog", "a puppy"],
]
REFERENCES = [["someone eats a hot dog"], ["a street"], ["a dog beside a bus", "a bus stop"]]
ANNOTATED = [["person", "dining table"], ["cat"], []]


def test_chair_equals_an_example_computed_by_hand() -> None:
    trials = [list(captions) for captions in zip(*CAPTIONS)]
    table = score_metrics(chair_metrics(trials, REFERENCES, ANNOTATED), resamples=0, seed=0)
    # First trial: "bench" is hallucinated; 3 + 0 + 3 mentions. Second trial: "dog" is hallucinated; 2 + 2 + 1 mentions.
    assert [scores["CHAIRs"].value for scores in table.trials] == [1 / 3, 1 / 3]
    assert [scores["CHAIRi"].value for scores in table.trials] == [1 / 6, 1 / 5]
    # The best caption of an image is the one with the fewest hallucinations. Here, it has none.
    assert table.best["CHAIRs"].value == table.best["CHAIRi"].value == 0


def reference_mentions(caption: str, plurals: dict[str, str], nodes: dict[str, str]) -> list[str]:
    """Find the objects in a caption by the steps of the authors' code: tokens, singulars, double words, synonyms."""
    doubles = {}
    for pair in (
        *("motor bike", "motor cycle", "air plane", "traffic light", "street light"),
        *("traffic signal", "stop light", "fire hydrant", "stop sign", "parking meter"),
        *("suit case", "sports ball", "baseball bat", "baseball glove", "tennis racket"),
        *("wine glass", "hot dog", "cell phone", "mobile phone", "teddy bear", "hair drier"),
        *("potted plant", "laptop computer", "home plate", "train track"),
    ):
        doubles[pair] = pair
    for animal in [
        "bird",
        "cat",
        "dog",
        "horse",
        "sheep",
        "cow",
        "elephant",
        "bear",
        "zebra",
        "giraffe",
        "animal",
        "cub",
    ]:
        doubles["baby " + animal] = animal
        doubles["adult " + animal] = animal
    doubles.update({"passenger jet": "jet", "passenger train": "train"})
    doubles.update({"bow tie": "tie", "toilet seat": "toilet"})

    words = caption.lower().replace(",", " ,").replace(".", " .").split()
    words = [plurals.get(word, word) for word in words]
    joined = []
    while words:
        pair = " ".join(words[:2])
        if pair in doubles:
            joined.append(doubles[pair])
            words = words[2:]
        else:
            joined.append(words[0])
            words = words[1:]
    if "toilet" in joined and "seat" in joined:
        joined = [word for word in joined if word != "seat"]
    return [nodes[word] for word in joined if word in nodes]


# Words of the generated captions, with the object that they mean, or None.
NOUNS: dict[str, str | None] = {
    "man": "person",
    "baby": "person",
    "passenger": "person",
    "dog": "dog",
    "elephant": "elephant",
    "train": "train",
    "jet": "airplane",
    "seat": "chair",
    "toilet": "toilet",
    "sofa": "couch",
    "hot dog": "hot dog",
    "wine glass": "wine glass",
    "teddy bear": "teddy bear",
    "bear": "bear",
    "tie": "tie",
    "bow tie": "tie",
    "bus": "bus",
    "fire hydrant": "fire hydrant",
    "mouse": "mouse",
    "street light": "traffic light",
    "train track": None,
    "home plate": None,
    "tree": None,
    "table": "dining table",
    "goose": "bird",
    "knife": "knife",
    "light": None,
    "glass": None,
}
PLURALS = {
    "men": "man",
    "babies": "baby",
    "passengers": "passenger",
    "dogs": "dog",
    "jets": "jet",
    "elephants": "elephant",
    "trains": "train",
    "seats": "seat",
    "toilets": "toilet",
    "sofas": "sofa",
    "glasses": "glass",
    "bears": "bear",
    "ties": "tie",
    "buses": "bus",
    "hydrants": "hydrant",
    "mice": "mouse",
    "lights": "light",
    "tracks": "track",
    "geese": "goose",
    "knives": "knife",
    "tables": "table",
    "trees": "tree",
    "plates": "plate",
}


def random_caption(random_: random.Random) -> str:
    plural_of = {singular: plural for plural, singular in PLURALS.items()}
    words = []
    for _ in range(random_.randint(1, 6)):
        words.append(random_.choice(["a", "the", "baby", "adult", "passenger", "toilet", "hot"]))
        first, _, last = random_.choice(sorted(NOUNS)).rpartition(" ")
        if random_.random() < 0.4:
            last = plural_of[last]
        words.append(f"{first} {last}".strip() + random_.choice(["", "", ","]))
    return " ".join(words).capitalize() + "."


def test_chair_equals_the_published_procedure_on_generated_captions() -> None:
    random_ = random.Random(0)
    nodes = {word: node for word, node in NOUNS.items() if node is not None}
    nodes.update({"adult": "person", "hydrant": "fire hydrant"})
    captions = [random_caption(random_) for _ in range(50)]
    references = [[random_caption(random_) for _ in range(3)] for _ in range(50)]
    annotated = [random_.sample(sorted(set(nodes.values())), 6) for _ in range(50)]

    sentences = 0
    hallucinated = 0
    mentioned = 0
    for caption, group, objects in zip(captions, references, annotated):
        present = set(objects)
        for reference in group:
            present |= set(reference_mentions(reference, PLURALS, nodes))
        mentions = reference_mentions(caption, PLURALS, nodes)
        assert mentioned_objects(caption) == mentions, caption
        wrong = [node for node in mentions if node not in present]
        hallucinated += len(wrong)
        mentioned += len(mentions)
        sentences += bool(wrong)

    table = score_metrics(chair_metrics([captions], references, annotated), resamples=200, seed=0)
    assert table.mean["CHAIRs"].value == pytest.approx(sentences / 50)
    assert table.mean["CHAIRi"].value == pytest.approx(hallucinated / mentioned)
    assert 10 < sentences < 50, "captions with and without hallucinations are compared"
    assert table.mean["CHAIRi"].low < table.mean["CHAIRi"].value < table.mean["CHAIRi"].high


def test_fewer_hallucinations_count_as_better() -> None:
    def samples(caption: str) -> list[Sample]:
        return [Sample("0", "0.jpg", "", ("a dog",), (caption,))]

    first, second = samples("a dog and a cat"), samples("a dog")
    results = []
    for run in (first, second):
        results.append(evaluate(run, annotated=[()], java=False, resamples=10))
    differences = compare_runs(first, results[0], second, results[1]).differences
    assert differences["CHAIRs"].score.value == -1
    assert (differences["CHAIRs"].num_better, differences["CHAIRs"].num_worse) == (1, 0)


# ---- files ----


def write_instances(path: Path, objects: dict[int, list[int]], **changes: Any) -> Path:
    """Write a COCO file of instances with the categories dog (18) and couch (63)."""
    content = {
        "images": [{"id": i, "file_name": f"COCO_val2014_{i:012}.jpg"} for i in objects],
        "annotations": [],
        "categories": [{"id": 18, "name": "dog"}, {"id": 63, "name": "couch"}],
    }
    for image_id, categories in objects.items():
        for category in categories:
            content["annotations"].append({"image_id": image_id, "category_id": category})
    path.write_text(json.dumps(content | changes))
    return path


def test_read_instances_finds_the_objects_of_all_files(tmp_path: Path) -> None:
    first = write_instances(tmp_path / "a.json", {7: [18, 18, 63], 9: []})
    second = write_instances(tmp_path / "b.json", {11: [63]})
    instances = read_instances([first, second])
    names = ["val2014/COCO_val2014_000000000007.jpg", "COCO_val2014_000000000009.jpg"]
    names.append("000000000011.jpg")
    assert annotated_objects(names, instances) == [("dog", "couch"), (), ("couch",)]
    with pytest.raises(ValueError, match=r"--instances: 1 of 2 .*'cat\.jpg'"):
        annotated_objects([names[0], "cat.jpg"], instances)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": [{"id": 18, "name": "dragon"}]}, "dragon"),
        ({"annotations": [{"image_id": 7, "category_id": 5}]}, "not a COCO file of instances"),
        ({"images": None}, "not a COCO file of instances"),
    ],
)
def test_read_instances_refuses_other_files(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write_instances(tmp_path / "a.json", {7: [18]}, **changes)
    with pytest.raises(ValueError, match=message):
        read_instances([path])


def test_evaluate_command_writes_chair_and_text_statistics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for image_id, caption in ((7, "a puppy on a sofa"), (9, "a puppy in a car")):
        row = {"image": f"COCO_val2014_{image_id:012}.jpg", "gt_caption": "a room"}
        rows.append({**row, "pred_output": caption})
    predictions = tmp_path / "predictions.json"
    predictions.write_text(json.dumps(rows))
    instances = write_instances(tmp_path / "instances.json", {7: [18, 63], 9: [18]})
    scores = tmp_path / "scores.json"
    words = [str(predictions), "--instances", str(instances), "--output", str(scores)]
    assert main([*words, "--no-java", "--resamples", "20"]) == 0
    written = json.loads(scores.read_text())["predictions"]
    assert written["mean"]["CHAIRs"][0] == 0.5
    assert written["mean"]["CHAIRi"][0] == 0.25
    assert written["text"]["captions"]["words, mean"] == 5
    assert written["text"]["references"]["words, mean"] == 2
    assert "CHAIRi" in capsys.readouterr().out
    result = llava_simplified.evaluate(predictions, instances=[instances], java=False, resamples=0)
    assert result.mean["CHAIRi"].value == 0.25


# ---- statistics of texts ----


def test_describe_texts_equals_an_example_computed_by_hand() -> None:
    statistics = describe_texts([["a b a b a b", "a b"], ["c", ""]])
    # First trial: lengths 6 and 2, 8 words of 2 kinds; 6 bigrams of 2 kinds; trigrams aba bab aba bab.
    # Second trial: lengths 1 and 0; one word, no bigrams.
    assert statistics["words, mean"] == np.mean([4, 0.5])
    assert statistics["words, standard deviation"] == np.mean([2, 0.5])
    assert statistics["words, shortest"] == 1
    assert statistics["words, longest"] == 3.5
    assert statistics["distinct-1"] == np.mean([2 / 8, 1])
    assert statistics["distinct-2"] == np.mean([2 / 6, 1])
    assert statistics["distinct-3"] == np.mean([2 / 4, 1])
    # The first caption repeats 3 of its 5 bigrams, 2 of 4 trigrams, 1 of 3 4-grams; no other caption repeats any.
    assert statistics["repeated 2-grams"] == pytest.approx(3 / 5 / 4)
    assert statistics["repeated 3-grams"] == pytest.approx(2 / 4 / 4)
    assert statistics["repeated 4-grams"] == pytest.approx(1 / 3 / 4)
