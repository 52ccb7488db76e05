"""The whole road: a world's clips, a tiny Keye with random weights, scores that are complete; and a talk with it."""

import io
import json

import pytest

from eval import world
from eval.chat import chat
from eval.evaluate import evaluate_kc, evaluate_world
from eval.scores import FLOORS
from mm.common.errors import UserError

KC = {"CPV", "Hot_Videos_Aggregation", "Collection_Order", "Pornographic_Comment", "High_like", "SPU"}


def test_right_answers_of_every_task_score_one(micro_world):
    """Each item's own answer, in the form the model is taught, is parsed and found right; noise is not."""
    tasks = {t.name: t for t in world.load_tasks(micro_world)}
    assert set(tasks) == set(world.TASKS) | KC
    for task in tasks.values():
        assert {i.split for i in task.items} == {"seen", "unseen"} and task.train
        for item in task.items:
            said = item.meta["caption"] if task.name.startswith("caption") else item.answer
            assert task.check(item, said)[1] == 1.0, (item, said)
            assert task.check(item, f"<think>hm</think><answer>{said}</answer>")[1] == 1.0
            for noise in ("", "asdf", "<|im_end|>", "{[(", "\\boxed{"):
                assert task.check(item, noise)[1] == 0.0
            assert 0.0 <= task.chance_of(item) <= 0.5
    assert tasks["High_like"].ceiling("seen") < 1.0 == tasks["SPU"].ceiling("unseen")
    questions = [i.messages[0]["content"][-1]["text"] for i in tasks["SPU"].items]
    assert all(("请直接给出结论" in q) != ("Answer yes or no directly" in q) for q in questions)


def test_scores_are_complete(micro_world, checkpoint, tmp_path):
    result = evaluate_world(checkpoint, micro_world, tmp_path / "out", limit=1, quiet=True)
    names = {f"{t}/{s}" for t in (*world.TASKS, *KC) for s in ("seen", "unseen")}
    assert set(result["tasks"]) == names
    for entry in result["tasks"].values():
        assert set(entry) == {"value", "n", "ci95", "ceiling", "split", *FLOORS}
        assert all(entry[f] is not None for f in FLOORS) and entry["n"] == 1
    assert result["run"]["checkpoint"] == str(checkpoint) and result["run"]["skipped"] == {}
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == result
    more = evaluate_world(checkpoint, micro_world, tmp_path / "out", tasks=["order"], limit=2, splits=["unseen"],
                          quiet=True)  # fmt: skip
    assert more["tasks"]["order/unseen"]["n"] == 2  # what was answered before stays


def test_official_folder(micro_world, checkpoint, tmp_path):
    result = evaluate_kc(checkpoint, micro_world / "kc", tmp_path / "out", limit=1, tasks=["SPU"], probe=False,
                         blind=False, max_new_tokens=4, quiet=True)  # fmt: skip
    assert set(result["tasks"]) == {"SPU/seen", "SPU/unseen"} and result["run"]["judge"] is None
    assert result["tasks"]["SPU/seen"]["blind"] is None


def test_mistakes_name_the_fix(micro_world, checkpoint, tmp_path):
    with pytest.raises(UserError, match="did you mean 'order'"):
        evaluate_world(checkpoint, micro_world, tmp_path / "o", tasks=["ordr"])
    with pytest.raises(UserError, match="mm data make-world"):
        world.load_tasks(tmp_path)
    with pytest.raises(UserError):
        evaluate_world(tmp_path, micro_world, tmp_path / "o")
    with pytest.raises(UserError, match="splits"):
        evaluate_world(checkpoint, micro_world, tmp_path / "o", splits=["unsen"])


def test_a_talk(micro_world, checkpoint):
    clip = next(micro_world.glob("clips/test/*.mp4"))
    picture = next(micro_world.glob("kc/images/*/*.jpg"))
    out = io.StringIO()
    typed = [f"/video {clip}", "Describe the video.", f"/image '{picture}'", "And this?", "/image",
             "/image /gone.jpg", "/what", "", "/reset", "Hello", "/quit", "never asked"]  # fmt: skip
    chat(checkpoint, lines=typed, out=out, max_new_tokens=3)
    said = out.getvalue()
    for text in ("frames of", "px", "needs a path", "/gone.jpg is no image", "/what is not known", "begun anew"):
        assert text in said
    once = chat(checkpoint, [("video", str(clip))], "Describe the video.", max_new_tokens=3, out=io.StringIO())
    assert once in said  # the same question in the terminal had the same answer
    with pytest.raises(UserError, match="no video that can be read"):
        chat(checkpoint, [("video", str(picture))], "?", out=io.StringIO())
