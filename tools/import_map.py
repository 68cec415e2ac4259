"""The map of the package: its rooms, the floors they stand on, and the arrows between them.

A room is a module or a package at the top of ``ksm_ext``; an arrow leads from a room to another
whose modules it imports, at its top or inside a function. ``python tools/import_map.py`` prints
the rooms by floors (a room stands above all that it imports); ``tests/house`` holds the numbers.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "ksm_ext"

Graph = dict[str, set[str]]


def module_graph(package: Path = PACKAGE) -> Graph:
    """Modules, by dotted name below the package, and what each of them imports of the others."""
    files = {name_of(path, package): path for path in package.rglob("*.py")}
    del files[""]  # ksm_ext/__init__.py, which loads names when they are asked for
    return {
        name: {module for module in _imported(path, files.keys()) if module != name}
        for name, path in sorted(files.items())
    }


def name_of(path: Path, package: Path = PACKAGE) -> str:
    """``surrogates.fit`` of ksm_ext/surrogates/fit.py; a package is its ``__init__``."""
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(path: Path, modules: set[str]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ksm_ext":
            here = node.module.removeprefix("ksm_ext").removeprefix(".")
            for alias in node.names:
                inner = f"{here}.{alias.name}".removeprefix(".")
                found = inner if inner in modules else here
                if found in modules:
                    yield found


def room_graph(modules: Graph) -> Graph:
    """The same between rooms."""
    rooms: Graph = {}
    for module, imported in modules.items():
        room = module.split(".")[0]
        rooms.setdefault(room, set()).update(name.split(".")[0] for name in imported)
        rooms[room].discard(room)
    return rooms


def floors(graph: Graph) -> list[list[str]]:
    """Names by floors, the lowest first.

    Raises:
        ValueError: If some import each other in a circle.
    """
    rest, result = dict(graph), []
    while rest:
        floor = sorted(name for name, below in rest.items() if not below & rest.keys())
        if not floor:
            raise ValueError(f"`imports` must not go in a circle, got one among {sorted(rest)}.")
        result.append(floor)
        rest = {name: below for name, below in rest.items() if name not in floor}
    return result


if __name__ == "__main__":
    modules = module_graph()
    rooms = room_graph(modules)
    for floor in reversed(floors(rooms)):
        print("  ".join(floor))
    arrows = sum(len(below) for below in rooms.values())
    print(f"{len(rooms)} rooms, {len(floors(rooms))} floors, {arrows} arrows between rooms,")
    print(f"{len(modules)} modules, no circle among them on {len(floors(modules))} floors")
