"""Measure the source tree: lines, files, floors and import arrows.

    python benchmarks/house.py [ROOT]

A module stands one floor above the highest module that it imports; modules that import each other
share a floor and are printed as circles. Lines are those of files, comments and docstrings
included.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping
from pathlib import Path

PRODUCT = ("glua_bench", "methods", "datasets", "sweeps", "reports")


def modules(root: Path) -> dict[str, Path]:
    """Return each module of the product by its dotted name, as it is called once installed."""
    found = {}
    for folder in PRODUCT:
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts if folder == "glua_bench" else ("glua_bench", *parts))
            found[name.removesuffix(".__init__")] = path
    return found


def arrows(found: Mapping[str, Path]) -> dict[str, set[str]]:
    """Return the modules of the product that each module imports, wherever the import stands.

    Imports for the type checker alone do not count.
    """
    reached: dict[str, set[str]] = {}
    for name, path in found.items():
        named: set[str] = set()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        tree.body = [node for node in tree.body if not _for_types(node)]
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = {f"{node.module}.{alias.name}" for alias in node.names}
                named |= (whole & found.keys()) or {node.module}
        reached[name] = (named & found.keys()) - {name}
    return reached


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def floors(reached: Mapping[str, set[str]]) -> tuple[dict[str, int], list[list[str]]]:
    """Return the floor of each module, from 0, and the circles among the imports."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    floor: dict[str, int] = {}
    circles: list[list[str]] = []

    def visit(name: str) -> None:  # Tarjan's strongly connected components
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(reached[name]):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            members = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            below = {other for member in members for other in reached[member]} - {*members}
            level = max((floor[other] + 1 for other in below), default=0)
            floor.update(dict.fromkeys(members, level))
            if len(members) > 1:
                circles.append(sorted(members))

    for name in sorted(reached):
        if name not in index:
            visit(name)
    return floor, circles


def lines(path: Path) -> int:
    """Return the number of lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def main() -> None:
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent)
    found = modules(root)
    length = {path.relative_to(root): lines(path) for path in found.values()}
    folders: dict[Path, int] = {}
    for path in length:
        folders[path.parent] = folders.get(path.parent, 0) + 1
    reached = arrows(found)
    floor, circles = floors(reached)
    longest = sorted(length.items(), key=lambda item: -item[1])[:5]
    largest = sorted(folders.items(), key=lambda item: -item[1])[:3]
    tests = sum(map(lines, (root / "tests").rglob("*.py")))
    print(f"lines       {sum(length.values()):,} in {len(length)} files; tests {tests:,}")
    print("longest    ", ", ".join(f"{path.as_posix()} {count:,}" for path, count in longest))
    print("largest    ", ", ".join(f"{path.as_posix()}/ {count} files" for path, count in largest))
    print(f"floors      {max(floor.values()) + 1}")
    print(f"arrows      {sum(map(len, reached.values()))} between modules")
    packages: set[tuple[str, str]] = set()
    for name, others in reached.items():
        homes = {other: found[other].parent for other in others}
        packages |= {
            (str(found[name].parent), str(home))
            for home in homes.values()
            if home != found[name].parent
        }
    print(f"            {len(packages)} between folders")
    print("circles    ", "; ".join(" ↔ ".join(circle) for circle in circles) or "none")


if __name__ == "__main__":
    main()
