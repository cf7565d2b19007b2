"""What docs/architecture.md says of the layout, read from the source by `ast`.

A room is a folder. In a folder that contains rooms, each module next to them is a room by itself.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"blip_kernels": ROOT / "kernels/blip_kernels", "blip_fast": ROOT / "blip_fast",
            # arrows go up
            "blip_train": ROOT / "train/blip_train", "blip_bench": ROOT / "benchmarks/blip_bench"}
PRODUCT = ("blip_kernels", "blip_fast", "blip_train")
MOST_FILES = 15
Arrows = Mapping[str, set[str]]


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if path.name == "__init__.py" else parts)] = path
    return found


MODULES = modules()
ROOMS = {name for name, path in MODULES.items() if path.name == "__init__.py"}
WITH_ROOMS = {room.rpartition(".")[0] for room in ROOMS}


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules that are imported, at the top or within functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in MODULES else node.module


def arrows_between_modules() -> Arrows:
    return {name: {target for target in imported(ast.parse(path.read_text()))
                   if target in MODULES and target != name}
            for name, path in MODULES.items()}


def room_of(module: str) -> str:
    folder = module.rpartition(".")[0]
    return module if module in ROOMS or folder in WITH_ROOMS else folder


def arrows_between_rooms(arrows: Arrows) -> Arrows:
    found = defaultdict(set)
    for module, targets in arrows.items():
        found[room_of(module)] |= {room_of(target) for target in targets} - {room_of(module)}
    return found


def circle(arrows: Arrows) -> list[str]:
    """A circle of arrows, or an empty list if there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name):]
        if name in done:
            return []
        for target in sorted(arrows.get(name, ())):
            if found := walk(target, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(arrows) if (found := walk(name, []))), [])


ARROWS = arrows_between_modules()


def test_a_circle_would_be_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"d", "b"}, "d": set()}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_modules_import_each_other():
    assert circle(ARROWS) == []


def test_no_rooms_import_each_other():
    assert circle(arrows_between_rooms(ARROWS)) == []


def test_imports_go_one_way():
    order = list(PACKAGES)
    upward = [(module, target) for module, targets in ARROWS.items() for target in targets
              if order.index(target.split(".")[0]) > order.index(module.split(".")[0])]
    assert upward == []


def test_no_library_imports_a_command():
    def is_command(module: str) -> bool:
        return "commands" in module.split(".") or module == "blip_bench.command"

    found = [(module, target) for module, targets in ARROWS.items() for target in targets
             if is_command(target) and not is_command(module)]
    assert found == []


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_a_room_is_small_and_says_what_it_is(room):
    assert len(list(MODULES[room].parent.glob("*.py"))) - 1 <= MOST_FILES
    assert ast.get_docstring(ast.parse(MODULES[room].read_text()))


def test_modules_have_names_of_their_own():
    """All except commands, whose modules are named as they are typed."""
    places = defaultdict(list)
    for name, path in MODULES.items():
        is_command = "commands" in name.split(".")
        if path.stem not in ("__init__", "__main__") and name.startswith(PRODUCT) and not is_command:
            places[path.stem].append(name)
    assert {stem: names for stem, names in places.items() if len(names) > 1} == {}


def test_public_classes_have_names_of_their_own():
    places = defaultdict(list)
    for name, path in MODULES.items():
        if name.startswith(PRODUCT):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    places[node.name].append(name)
    assert {stem: names for stem, names in places.items() if len(names) > 1} == {}
