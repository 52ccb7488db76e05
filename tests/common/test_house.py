"""The floors of design: imports go down only, and no file imports in a circle."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FLOOR = {"vision": 0, "audio": 0, "mm": 1, "data_mix": 2, "eval": 3, "stages": 4}


def imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append(node.module)
            found += [f"{node.module}.{a.name}" for a in node.names]
    return found


def files() -> list[Path]:
    return [p for top in FLOOR for p in sorted((ROOT / top).rglob("*.py"))]


def test_imports_go_down_only():
    wrong = []
    for path in files():
        top = path.relative_to(ROOT).parts[0]
        ground = path.is_relative_to(ROOT / "mm" / "common")
        for name in imports(path):
            other = name.split(".")[0]
            if other not in FLOOR or name.startswith("mm.common"):
                continue
            upward = FLOOR[other] > FLOOR[top] or (FLOOR[other] == FLOOR[top] and other != top)
            if upward or (ground and other in FLOOR):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_no_file_imports_in_a_circle():
    modules = {str(p.relative_to(ROOT).with_suffix("")).replace("/", "."): p for p in files()}
    graph = {m: {n for n in imports(p) if n in modules and n != m} for m, p in modules.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"circle: {' -> '.join([*trail, module])}"
        if module not in done:
            for other in graph[module]:
                visit(other, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())
    assert len(graph) > 10  # the walk really saw the tree


def test_nothing_is_unpickled_and_no_archive_is_extracted():
    """torch.load, pickle and tar extraction have no place in code that meets files from outside."""
    banned = {"load": {"pickle", "torch", "joblib", "cPickle"}, "loads": {"pickle", "marshal"}}
    wrong = []
    for path in files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                owner = node.func.value
                bad = isinstance(owner, ast.Name) and owner.id in banned.get(node.func.attr, set())
                if bad or node.func.attr in ("extractall", "unpack_archive"):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong, "\n".join(wrong)
