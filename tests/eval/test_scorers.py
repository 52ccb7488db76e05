"""Answers out of responses, nasty ones included; truths written by hand."""

import numpy as np
import pytest

from eval import scorers
from eval.floors import (
    Probe,
    chance_box,
    chance_order,
    colour_features,
    from_class,
    majority_classes,
    probe_answers,
)
from eval.task import Item, Task, extract_answer
from eval.world import first_object, parse_order, same, score_box


@pytest.mark.parametrize(
    "response, answer",
    [
        ("red", "red"),
        ("<analysis>easy, /no_think</analysis>red", "red"),
        ("<think>is it <answer>blue</answer>?</think> <answer>red</answer>", "red"),
        ("<answer>blue</answer> no: <answer>red</answer> done", "red"),
        ("<think>a</think><answer>It is \\boxed{red}</answer>", "red"),
        ("\\boxed{1} then \\boxed{\\text{a {b} c}}", "\\text{a {b} c}"),
        ("\\boxed{red", "red"),
        ("<answer>red", "red"),
        ("<think>never closed", "<think>never closed"),
        ("", ""),
    ],
)
def test_extract_answer(response, answer):
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("是", "yes"), ("否。", "no"), ("Yes.", "yes"), ("no, it is not", "no"), ("【是】", "yes"), ("**No**", "no"),
        ("是的", None), ("yes and no", None), ("", None), ("maybe", None), ("不是", None), ("yesterday", None),
        ("答案： 否", "no"), ("NO!!!", "no"),
    ],
)  # fmt: skip
def test_yes_no_stands_alone(text, verdict):
    assert scorers.yes_no(text) == verdict


@pytest.mark.parametrize(
    "text, found",
    [
        ("[是, 否, 是]", ["yes", "no", "yes"]), ("是_否", ["yes", "no"]), ("Result: [yes,no]", ["yes", "no"]),
        ("[1, 2] so [否、是]", ["no", "yes"]), ("['是', '否']", ["yes", "no"]), ("【否，否】", ["no", "no"]),
        ("the first is yes, the second no", None), ("[]", None), ("", None), ("[是, maybe]", None),
    ],
)  # fmt: skip
def test_yes_no_list(text, found):
    assert scorers.yes_no_list(text.replace("_", " ")) == found


@pytest.mark.parametrize(
    "text, order",
    [
        ("[Video 3, Video 1, Video 2]", [3, 1, 2]), ("3,1,2", [3, 1, 2]), ("[视频2，视频1]", [2, 1]),
        ("Of 3 videos: [2, 3, 1]", [2, 3, 1]), ("[1, 1, 2]", None), ("none", None), ("[]", None),
        ("3>1>2", [3, 1, 2]), ("９,８", [9, 8]),
    ],
)  # fmt: skip
def test_sequences(text, order):
    assert scorers.parse_sequence(text) == order


@pytest.mark.parametrize(
    "text, n",
    [
        ("3", 3), ("There are three balls.", 3), ("一共有三个", 3), ("两个", 2), ("3 (three) of them", 3),
        ("3 or 4", None), ("no idea", None), ("someone", None), ("", None), ("0", 0), ("1 2 3 4 5", None), ("９", 9),
    ],
)  # fmt: skip
def test_counts(text, n):
    assert scorers.parse_count(text) == n


@pytest.mark.parametrize(
    "text, box",
    [
        ("<|box_start|>[[100,200,300,400]]<|box_end|>", [100, 200, 300, 400]),
        ("<|object_ref_start|>red ball<|object_ref_end|><|box_start|>[[1, 2, 3, 4]]<|box_end|>", [1, 2, 3, 4]),
        ("[[300,400,100,200]]", [100, 200, 300, 400]),
        ("(10, 20, 30.5, 40)", [10, 20, 30.5, 40]),
        ("[[1,2,3]]", None), ("[[1,2,3,4000]]", None), ("[[-5,2,3,4]]", None), ("<|box_start|>", None), ("", None),
        ("[[[[[[" * 500, None), ("[1,2,3,4,5]", None),
    ],
)  # fmt: skip
def test_boxes(text, box):
    assert scorers.parse_box(text) == box


def test_iou_by_hand():
    assert scorers.iou([0, 0, 10, 10], [5, 0, 15, 10]) == pytest.approx(1 / 3)
    assert scorers.iou([0, 0, 10, 10], [0, 0, 10, 10]) == 1.0
    assert scorers.iou([0, 0, 10, 10], [10, 0, 20, 10]) == 0.0
    assert scorers.iou([5, 5, 5, 5], [5, 5, 5, 5]) == 0.0
    row = item("grounding", answer="<|box_start|>[[0,0,100,100]]<|box_end|>")
    assert score_box(row, [0, 0, 100, 50]) == 1.0 and score_box(row, [0, 0, 100, 49]) == 0.0


def test_json_found_in_talk_and_compared_without_order():
    truth = scorers.canonical(scorers.parse_json('{"颜色": "红色", "sizes": ["S", "M"], "n": 2}'))
    for text in (
        '{"n": "2", "sizes": ["m", "s"], "颜色": " 红色 "}',
        "Sure!\n```json\n{'颜色': '红色', 'sizes': ('M', 'S'), 'n': 2.0}\n```",
        '{not json} {"note": 1} and finally {"n": 2, "sizes": ["S", "M"], "颜色": "红色"} {oops',
    ):
        assert scorers.canonical(scorers.parse_json(text)) == truth
    assert scorers.parse_json('{"a": "}{"}') == {"a": "}{"}
    for garbage in ("", "{" * 5000, "{}}}", '{"a": }', "[1, 2]", "{1}", "{'a': 1" * 300):
        assert scorers.parse_json(garbage) in (None, {})
    assert scorers.canonical({"a": "x"}) != scorers.canonical({"a": "x", "b": "y"})


COLOURS, MOTIONS, NOUNS = ("red", "blue", "红色"), ("slides left", "falls", "落下"), ("ball", "cube", "球")


@pytest.mark.parametrize(
    "caption, choices, found",
    [
        ("On a blue field a red ball falls", COLOURS, "red"),
        ("red", COLOURS, "red"),
        ("falls", MOTIONS, "falls"),
        ("A large red glass ball falls while a blue cube slides left.", COLOURS, "red"),
        ("A large red glass ball falls while a blue cube slides left.", MOTIONS, "falls"),
        ("A ball, then a blue cube slides left.", COLOURS, None),  # the second object's colour is not the first's
        ("A red ball and a cube that slides left", MOTIONS, None),
        ("一个红色的球落下", COLOURS, "红色"),
        ("一个红色的球落下", MOTIONS, "落下"),
        ("bored reds fall", COLOURS, None),  # whole words only
        ("", COLOURS, None),
    ],
)
def test_the_first_object_counts(caption, choices, found):
    task = "caption_colour" if choices is COLOURS else "caption_motion"
    assert first_object(task, caption, choices, NOUNS) == found
    assert first_object("caption_shape", "A red cube hits a ball", NOUNS, NOUNS) == "cube"


def test_choices():
    row = item("order", answer="the red ball", choices=("the red ball", "the blue cube"))
    assert parse_order("The red ball.", row) == "the red ball"
    assert parse_order("the red ball, not the blue cube", row) is None
    assert same(row, "The Red Ball") == 1.0
    assert scorers.first_choice("slides left and up", ("slides", "slides left")) == "slides left"


def test_chance_of_boxes_and_orders():
    assert chance_order(3) == pytest.approx(1 / 6)
    # P(W H >= 1/2) with W, H distances of two uniform points: 2 (1.25 - 0.375 - 1.25 ln 2) = 0.0171
    assert chance_box([0, 0, 1000, 1000]) == pytest.approx(0.0171, abs=0.006)
    assert chance_box([500, 500, 510, 510]) < 0.002


def item(task: str, *, answer: str, choices=None, kind="t", split="train", number=0) -> Item:
    return Item(f"{task}-{number}", task, kind, split, [{"role": "user", "content": "?"}], answer, choices)


def test_majority_knows_the_type_of_question():
    rows = [item("c", answer=a, kind=k) for k, a in [("x", "1"), ("x", "1"), ("x", "2"), ("y", "2"), ("y", "2")]]
    task = Task("c", [], rows, None, lambda text, i: text, same, lambda i, r: 0.0)  # type: ignore[arg-type]
    assert majority_classes(task, rows) == {"x": "1", "y": "2"}


def test_choices_that_change_are_compared_by_place():
    rows = [item("o", answer=a, choices=c) for a, c in [("a", ("a", "b")), ("d", ("c", "d")), ("f", ("e", "f"))]]
    task = Task("o", [], rows, None, parse_order, same, lambda i, r: 0.5)  # type: ignore[arg-type]
    best = majority_classes(task, rows)["t"]
    assert [from_class(task, r, best) for r in rows] == ["b", "d", "f"]


def test_probe_learns_colour_and_nothing_else():
    rng = np.random.default_rng(0)

    def clip(colour: int, size: int) -> np.ndarray:
        frames = rng.integers(0, 60, (2, 32, 32, 3), dtype=np.uint8)
        frames[:, 4 : 4 + size, 4:12, colour] = 250
        return frames

    rows, features, coins = [], [], []
    for i in range(120):
        colour = i % 3
        rows.append(item("c", answer=("red", "green", "blue")[colour], number=i))
        coins.append(item("c", answer=str(rng.integers(2)), number=i))
        features.append(colour_features([clip(colour, 8)]))
    right = lambda found, test: np.mean([a == r.answer for a, r in zip(found, test, strict=True)])
    x, task = np.array(features), Task("c", [], rows, None, lambda t, i: t, same, lambda i, r: 0.0)  # type: ignore[arg-type]
    assert x.shape == (120, 128) and x[0].sum() == pytest.approx(1.0, abs=1e-5)
    assert right(probe_answers(task, rows[:60], x[:60], rows[60:], x[60:]), rows[60:]) == 1.0
    assert right(probe_answers(task, [], [], rows, x), rows) == 1.0  # cross-validated without training rows
    assert right(probe_answers(task, coins[:60], x[:60], coins[60:], x[60:]), coins[60:]) < 0.75
    assert Probe(["t"] * 4, x[:4], ["1", "2", "3", "4"]).predict(["t"], x[:1])  # open answers
