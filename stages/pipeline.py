"""A pipeline: nodes from artifacts to artifacts. What did not change is not run again.

    RUN/<node>/config.json    the node's parameters
    RUN/<node>/done.json      written last: fingerprint, seconds, what was handed on
    RUN/.old/                 what nodes had made before their inputs or settings changed
    RUN/<node>/...            whatever the node makes (a stage: log.jsonl, tb/, checkpoints/, model/)

A node's fingerprint covers its parameters, its code version and its inputs' fingerprints, so a change reaches
everything after it. A node that was interrupted is called again on the folder it left and goes on by itself.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.tree import Tree

from mm.common import dist
from mm.common.config import nearest, to_dict
from mm.common.errors import UserError
from mm.common.files import disk_trouble, read_json, write_json
from mm.common.progress import duration
from stages.stage import FailedElsewhere, Stopped

VERSION = 1  # raise it when what nodes write changes its meaning

Run = Callable[[Path, dict[str, Path]], Path | None]


@dataclass(frozen=True)
class Node:
    """One step of a pipeline.

    run: called as run(folder, inputs) with inputs = artifact name -> path; returns the path it hands on (its
        folder, when None). It may be called again on a folder it left half done.
    params: all that shapes the result, as a dataclass or JSON values.
    inputs: names of nodes or of artifacts given to the pipeline.
    everywhere: run on all ranks (a stage that trains); else on rank 0 while the others wait.
    version: of the node's own code.
    """

    name: str
    run: Run
    inputs: tuple[str, ...] = ()
    params: Any = field(default_factory=dict)
    everywhere: bool = False
    version: int = VERSION


class NodeFailed(Exception):
    """A node ended with an error that is not the user's; says which."""


class Pipeline:
    """A graph of nodes under one run folder.

    Args:
        given: artifacts from elsewhere, name -> path (a folder another run made, or a user's own).
    Raises UserError for a name that is there twice or not at all, or a circle.
    """

    def __init__(self, nodes: Iterable[Node], folder: str | Path, *, given: dict[str, Path] | None = None):
        self.folder, self.given = Path(folder), dict(given or {})
        nodes = list(nodes)
        self.nodes = {n.name: n for n in nodes}
        if len(self.nodes) < len(nodes):
            names = [n.name for n in nodes]
            raise UserError(f"pipeline: two nodes are called {next(n for n in names if names.count(n) > 1)!r}")
        self.order = self._sorted()

    def _sorted(self) -> list[str]:
        order: list[str] = []

        def visit(name: str, trail: tuple[str, ...]) -> None:
            if name in trail:
                raise UserError(f"pipeline: {' -> '.join([*trail, name])} is a circle")
            if name in order or name in self.given:
                return
            if name not in self.nodes:
                known = [*self.nodes, *self.given]
                raise UserError(f"pipeline: {trail[-1]} needs {name!r}, which nothing makes{nearest(name, known)}")
            for other in self.nodes[name].inputs:
                visit(other, (*trail, name))
            order.append(name)

        for name in self.nodes:
            visit(name, ())
        return order

    # what is there

    def fingerprint(self, name: str) -> str:
        """16 hex digits of parameters, version and, through them, all inputs of a node or given artifact."""
        if name in self.given:
            return given_fingerprint(self.given[name])
        node = self.nodes[name]
        parts = [node.name, node.version, to_dict(node.params), [self.fingerprint(i) for i in node.inputs]]
        return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8).hexdigest()

    def path(self, name: str) -> Path:
        """Where an artifact lies. Raises UserError where its node is not done."""
        if name in self.given:
            return self.given[name]
        done = self._done(name)
        if done is None:
            raise UserError(f"{name} is not made yet in {self.folder}")
        return self.folder / name / done["artifact"]

    def _done(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name / "done.json"
        if not path.exists():
            return None
        done = read_json(path)
        return done if (path.parent / done["artifact"]).exists() else None

    def status(self, name: str) -> str:
        """given, done, stale (made from what has changed since), interrupted, or to do."""
        if name in self.given:
            return "given"
        done = self._done(name)
        if done is not None:
            return "done" if done["fingerprint"] == self.fingerprint(name) else "stale"
        return "interrupted" if (self.folder / name).exists() else "to do"

    def seconds(self, name: str) -> float | None:
        """How long a node took when it was made; None where it is not done."""
        done = self._done(name)
        return done["seconds"] if done else None

    # running

    def run(self, *targets: str, quiet: bool = False) -> None:
        """Make `targets` (all nodes, if none are named) and what they need, in order.

        Raises UserError and what stops a run as they come, with the node's name; NodeFailed for the rest.
        """
        for name in self.order if not targets else self.needed(targets):
            node = self.nodes[name]
            status = dist.broadcast_object(self.status(name))
            if status == "done":
                self._say(f"{name}: up to date", quiet)
                continue
            self._say(f"{name}: {'going on' if status == 'interrupted' else 'running'}", quiet)
            self._make(node, status)

    def needed(self, targets: Iterable[str]) -> list[str]:
        """Names of the nodes that `targets` need, themselves too, in order."""
        needed: set[str] = set()

        def visit(name: str) -> None:
            if name in self.given:
                return
            if name not in self.nodes:
                raise UserError(f"{name!r} is not in this pipeline{nearest(name, self.nodes)}")
            needed.add(name)
            for other in self.nodes[name].inputs:
                visit(other)

        for name in targets:
            visit(name)
        return [name for name in self.order if name in needed]

    def _make(self, node: Node, status: str) -> None:
        folder = self.folder / node.name
        inputs = {i: self.path(i) for i in node.inputs}
        self._alone(node.name, lambda: self._prepare(node, folder, status))
        begun = time.time()
        artifact = self._call(node, folder, inputs)
        self._alone(node.name, lambda: write_json(folder / "done.json", {
            "node": node.name, "fingerprint": self.fingerprint(node.name), "artifact": artifact,
            "seconds": round(time.time() - begun, 3), "ended": time.time(),
            "inputs": {i: str(p) for i, p in inputs.items()},
        }))  # fmt: skip

    def _prepare(self, node: Node, folder: Path, status: str) -> None:
        """Set aside what was made from other inputs or settings; note what the folder now holds the work of."""
        mark = folder / "started.json"
        begun = read_json(mark)["fingerprint"] if mark.exists() else None
        if status == "stale" or (begun is not None and begun != self.fingerprint(node.name)):
            self._set_aside(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "done.json").unlink(missing_ok=True)
        write_json(mark, {"fingerprint": self.fingerprint(node.name)})
        if not (folder / "config.json").exists():
            write_json(folder / "config.json", to_dict(node.params))

    def _set_aside(self, folder: Path) -> None:
        """Nothing that took hours is deleted because a setting changed."""
        old = self.folder / ".old"
        old.mkdir(exist_ok=True)
        place = next(p for i in range(10**6) if not (p := old / f"{folder.name}-{i}").exists())
        folder.rename(place)
        self._say(f"{folder.name}: its inputs or settings have changed; what was there is now {place}", False)

    def _call(self, node: Node, folder: Path, inputs: dict[str, Path]) -> str:
        """Run the node where it belongs; the artifact's path below its folder, the same on all ranks."""
        artifact = "."

        def work() -> None:
            nonlocal artifact
            made = node.run(folder, inputs)
            artifact = "." if made is None else str(Path(made).relative_to(folder))

        if node.everywhere:
            _named(node.name, work)
        else:
            self._alone(node.name, work)
        return artifact

    def _alone(self, name: str, work: Callable[[], None]) -> None:
        """Work of rank 0. The ranks that wait must not go on where it has failed."""
        trouble: Exception | None = None
        if dist.is_main():
            try:
                _named(name, work)
            except Exception as e:
                trouble = e
        code = 2 if isinstance(trouble, UserError) else 1
        failed = dist.broadcast_object((str(trouble), code) if trouble else None)
        if trouble is not None:
            raise trouble
        if failed is not None:
            raise FailedElsewhere(*failed)

    def _say(self, text: str, quiet: bool) -> None:
        if dist.is_main() and not quiet:
            print(text, flush=True)

    # showing

    def show(self) -> Tree:
        """The graph as a tree to print: below each artifact what is made from it, with status and times."""
        tree = Tree(str(self.folder))
        places: dict[str, Tree] = {}
        for name in [*self.given, *self.order]:
            inputs = self.nodes[name].inputs if name in self.nodes else ()
            # Below its latest input: by then all the others are there too.
            latest = max(inputs, key=[*self.given, *self.order].index, default=None)
            others = [i for i in inputs if i != latest]
            label = f"{name}  [{self.status(name)}]".replace("[", r"\[")
            done = self._done(name) if name in self.nodes else None
            if done is not None:
                label += f"  {duration(done['seconds'])}"
            label += f"  (also from {', '.join(others)})" if others else ""
            places[name] = (places[latest] if latest else tree).add(label)
        return tree


def _named(name: str, work: Callable[[], None]) -> None:
    """Do `work`; what goes wrong is told with the node's name, and the user's mistakes from ours apart."""
    try:
        work()
    except Stopped:  # asked to: whoever stopped has said what there is to say
        raise
    except UserError as e:
        raise UserError(f"{name}: {e}") from e
    except Exception as e:
        trouble = disk_trouble(e)
        if trouble is not None:
            raise UserError(f"{name}: {trouble}") from e
        raise NodeFailed(f"{name} failed: {type(e).__name__}: {e}") from e


def given_fingerprint(path: Path) -> str:
    """Of an artifact that another run made: its own; of a foreign folder: its place, names, sizes and times,
    without what reading it leaves there (hidden files, token counts beside an index)."""
    for folder in (path, path.parent):
        if (folder / "done.json").exists():
            return str(read_json(folder / "done.json")["fingerprint"])
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and not _derived(p))
    if not files:
        raise UserError(f"{path} is empty or not there")
    facts = [(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.blake2b(json.dumps([str(path.resolve()), facts]).encode(), digest_size=8).hexdigest()


def _derived(path: Path) -> bool:
    return path.name.startswith(".") or (path.suffix == ".npy" and ".counts-" in path.name)


def last_model(run: Path) -> Path | None:
    """The model folder that a run handed on last; None where it has none."""
    found = []
    for path in run.glob("*/done.json"):
        done = read_json(path)
        model = path.parent / done["artifact"]
        if (model / "processor.json").exists():
            found.append((done["ended"], model))
    return max(found)[1] if found else None


def latest_run(runs: str | Path, artifact: str) -> Path:
    """The newest finished `artifact` (a node's name) in any run below `runs`.

    Raises UserError where no run has made it.
    """
    found = []
    for path in Path(runs).glob(f"*/{artifact}/done.json"):
        done = read_json(path)
        if (path.parent / done["artifact"]).exists():
            found.append((done["ended"], path.parent / done["artifact"]))
    if not found:
        raise UserError(f"no run below {runs} has made {artifact!r}; run it first, or name one with --from RUN")
    return max(found)[1]
