"""The graph of artifacts: order, fingerprints, what is run again and what is not."""

import json

import pytest
from rich.console import Console

from mm.common.errors import UserError
from stages.pipeline import Node, NodeFailed, Pipeline, latest_run


class Recipe:
    """a -> b -> c, with d from a and c; notes each call."""

    def __init__(self, folder):
        self.folder, self.calls, self.params, self.fail = folder, [], {"a": 1, "b": 1, "c": 1, "d": 1}, ""

    def run(self, name):
        def inner(folder, inputs):
            self.calls.append(name)
            (folder / "half").write_text(name)
            if name == self.fail:
                raise RuntimeError("a cable was pulled")
            out = folder / "made"
            out.mkdir(exist_ok=True)
            (out / "text").write_text(name + "".join((p / "text").read_text() for p in inputs.values()))
            return out

        return inner

    def pipeline(self, **kwargs):
        inputs = {"d": ("a", "c"), "c": ("b",), "b": ("a",), "a": ()}  # not in order on purpose
        nodes = [Node(n, self.run(n), i, {"x": self.params[n]}) for n, i in inputs.items()]
        return Pipeline(nodes, self.folder, **kwargs)

    def go(self, *targets):
        self.calls.clear()
        self.pipeline().run(*targets)
        return "".join(self.calls)


@pytest.fixture
def recipe(tmp_path):
    return Recipe(tmp_path / "run")


def test_runs_in_order_once(recipe, capsys):
    assert recipe.go() == "abcd"
    assert (recipe.folder / "d" / "made" / "text").read_text() == "dacba"
    assert recipe.go() == ""
    assert "d: up to date" in capsys.readouterr().out


def test_a_change_reaches_what_comes_after_and_nothing_else(recipe):
    recipe.go()
    recipe.params["c"] = 2
    assert [recipe.pipeline().status(n) for n in "abcd"] == ["done", "done", "stale", "stale"]
    assert recipe.go() == "cd"
    (recipe.folder / "b" / "made" / "text").unlink()
    (recipe.folder / "b" / "made").rmdir()
    assert recipe.go() == "b"  # what was lost is made again; what it made before is the same


def test_only_what_a_target_needs(recipe):
    assert recipe.go("b") == "ab"
    with pytest.raises(UserError, match="'bb' is not in this pipeline; did you mean 'b'"):
        recipe.go("bb")


def test_a_failing_node_is_named_and_an_interrupted_one_goes_on(recipe):
    recipe.fail = "c"
    with pytest.raises(NodeFailed, match="c failed: RuntimeError: a cable was pulled"):
        recipe.go()
    assert recipe.pipeline().status("c") == "interrupted" and recipe.pipeline().status("d") == "to do"
    recipe.fail = ""
    assert recipe.go() == "cd"
    assert (recipe.folder / "c" / "half").exists()  # the half-done folder was handed back to the node


def test_half_done_work_of_other_settings_is_set_aside(recipe):
    recipe.fail = "c"
    with pytest.raises(NodeFailed):
        recipe.go()
    (recipe.folder / "c" / "left over").write_text("")
    recipe.fail, recipe.params["c"] = "", 5
    recipe.go()
    assert not (recipe.folder / "c" / "left over").exists()
    assert (recipe.folder / ".old" / "c-0" / "left over").exists()
    assert json.loads((recipe.folder / "c" / "config.json").read_text()) == {"x": 5}


def test_mistakes_in_the_graph():
    run = lambda folder, inputs: None
    with pytest.raises(UserError, match="two nodes are called 'a'"):
        Pipeline([Node("a", run), Node("a", run)], "x")
    with pytest.raises(UserError, match="b needs 'aa', which nothing makes; did you mean 'a'"):
        Pipeline([Node("a", run), Node("b", run, ("aa",))], "x")
    with pytest.raises(UserError, match="a -> b -> a is a circle"):
        Pipeline([Node("a", run, ("b",)), Node("b", run, ("a",))], "x")


def test_shown_as_a_tree(recipe):
    recipe.go("c")
    console = Console(width=100)
    with console.capture() as captured:
        console.print(recipe.pipeline().show())
    text = captured.get()
    assert "a  [done]" in text and "d  [to do]" in text and "also from a" in text
    assert text.index(" a ") < text.index(" b ") < text.index(" c ") < text.index(" d ")


def test_given_artifacts_and_the_newest_run(recipe, tmp_path):
    recipe.go()
    found = latest_run(tmp_path, "c")
    assert found == recipe.folder / "c" / "made"
    with pytest.raises(UserError, match=r"no run below .* has made 'z'"):
        latest_run(tmp_path, "z")
    node = Node("e", recipe.run("e"), ("c",))
    second = Pipeline([node], tmp_path / "second", given={"c": found})
    second.run()
    assert (tmp_path / "second" / "e" / "made" / "text").read_text() == "ecba"
    assert second.status("e") == "done"
    recipe.params["a"] = 9
    recipe.go()  # the given artifact was made anew: what came from it is stale
    assert Pipeline([node], tmp_path / "second", given={"c": found}).status("e") == "stale"
