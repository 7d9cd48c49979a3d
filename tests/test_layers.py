"""The walls of the house: who may import whom. docs/architecture.md has the reasons.

Every import statement counts: at the top of a file, inside a function, and under ``TYPE_CHECKING``. A module that
names another one's type in an annotation knows that module, whether or not Python loads it.
"""

import ast
import re
import sys
from dataclasses import dataclass
from importlib.metadata import packages_distributions

import pytest
from conftest import ROOT

# Lowest first. A module may import from its own room and from the rooms before it.
GROUND = (
    "bits", "console", "cores", "device", "doctor", "documents", "errors", "identity", "locks", "overrides", "params",
    "paths", "runtime", "signals", "sources", "storage", "",
)  # fmt: skip
ROOMS = [
    GROUND,
    ("architecture", "families", "fits"),
    ("checkpoint",),
    ("data",),
    ("compress",),
    ("trial",),
    ("export",),
    ("settings", "checks"),  # params turned into what algorithms take; params judged by a model
    ("search",),
    ("workers",),
    ("tracking",),
    ("results",),
    ("stages",),
    ("project", "repro", "__main__"),
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}

# Libraries that one room hides from all others. MLflow itself runs the file that serves a registered model.
HIDDEN = {
    "mlflow": ("tracking", "stages.served"),
    "optuna": ("search",),
    "matplotlib": ("results",),
    "plotly": ("results",),
    "ray": ("workers",),
}


@dataclass(frozen=True)
class Import:
    """One imported name: ``module`` (without "pipeline.") imports ``target`` (dotted, "pipeline..." or a library's)."""

    file: str
    line: int
    module: str
    target: str

    @property
    def local(self):
        """Name of the imported module in this package, without "pipeline."; None for a library."""
        top, _, rest = self.target.partition(".")
        return rest if top == "pipeline" else None

    def says(self, rule):
        return f"{self.file}:{self.line}: imports {self.target}; {rule}"


def module_name(path, package):
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(root):
    """Every import statement of the package ``root/pipeline``, and the names of its modules."""
    package = root / "pipeline"
    paths = sorted(package.rglob("*.py"))
    modules = {module_name(path, package) for path in paths}

    def resolved(base, name):
        inside = f"{base}.{name}".removeprefix("pipeline.")
        return f"{base}.{name}" if base.split(".")[0] == "pipeline" and inside in modules else base

    imports = []
    for path in paths:
        module = module_name(path, package)
        folder = ["pipeline", *path.relative_to(package).parts[:-1]]  # what a relative import starts from
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = folder[: len(folder) - node.level + 1] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                targets = sorted({resolved(base, alias.name) for alias in node.names})
            else:
                continue
            file = str(path.relative_to(root))
            imports += [Import(file, node.lineno, module, target) for target in targets]
    return imports, modules


def room(module):
    return module.split(".")[0]


def unknown_rooms(imports, modules):
    return [
        f"pipeline/{name}: stands in no room; add it to ROOMS" for name in sorted(modules) if room(name) not in LEVEL
    ]


def upward(imports, modules):
    return [
        each.says(f"{room(each.module)} stands below {room(each.local)}")
        for each in imports
        if each.local is not None and LEVEL.get(room(each.module), 0) < LEVEL.get(room(each.local), 0)
    ]


def circles(imports, modules):
    """One line a group of modules that import each other, with the imports that hold the group together."""
    targets = {name: {each.local for each in imports if each.module == name} & modules for name in modules}

    def reachable(start):
        seen, ahead = set(), [start]
        while ahead:
            ahead += targets[here := ahead.pop()] - seen
            seen |= targets[here]
        return seen

    reach = {name: reachable(name) for name in modules}
    groups = {frozenset(other for other in reach[name] if name in reach[other]) for name in modules}
    faults = []
    for group in sorted(map(sorted, groups - {frozenset()})):
        within = [each for each in imports if each.module in group and each.local in group]
        places = ", ".join(f"{each.file}:{each.line} ({each.local})" for each in within)
        faults.append(f"a circle of {len(group)}: {' <-> '.join(group)}; imports: {places}")
    return faults


def escaped_libraries(imports, modules):
    def allowed(module, homes):
        return any(module == home or module.startswith(f"{home}.") for home in homes)

    return [
        each.says(f"only {' and '.join(HIDDEN[library])} may")
        for each in imports
        if (library := each.target.split(".")[0]) in HIDDEN and not allowed(each.module, HIDDEN[library])
    ]


def second_yaml_readers(imports, modules):
    readers = [each for each in imports if each.target.split(".")[0] == "yaml"]
    if len({each.file for each in readers}) < 2:
        return []
    return [each.says("one module alone reads YAML") for each in readers]


def normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def undeclared(imports, modules, requirements):
    declared = {
        normalized(re.split(r"[=<>!~;\[ ]", line, maxsplit=1)[0])
        for line in requirements.splitlines()
        if line.strip() and not line.startswith(("#", "-"))
    }
    distributions = packages_distributions()
    faults = []
    for each in imports:
        top = each.target.split(".")[0]
        if top in sys.stdlib_module_names or top in ("pipeline", "_typeshed"):  # the latter: for type checkers alone
            continue
        names = {normalized(name) for name in distributions.get(top, [top])}
        if not names & declared:
            faults.append(each.says(f"requirements.txt lists none of {', '.join(sorted(names))}"))
    return faults


RULES = [unknown_rooms, upward, circles, escaped_libraries, second_yaml_readers]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_package_keeps_the_rule(rule):
    assert rule(*imports_of(ROOT)) == []


def test_every_imported_library_is_declared():
    lists = [(ROOT / name).read_text() for name in ("requirements.txt", "requirements-workers.txt")]
    assert undeclared(*imports_of(ROOT), "\n".join(lists)) == []


# What the rules say of a small package with known faults.


def package(folder, files):
    for name, text in files.items():
        path = folder / "pipeline" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return imports_of(folder)


@pytest.mark.parametrize(
    "text",
    [
        "from pipeline.search import space",
        "import pipeline.search.space",
        "from pipeline.search.space import Space",
        "from ..search.space import Space",
        "def late():\n    from pipeline.search import space",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pipeline.search.space import Space",
    ],
)
def test_import_of_a_higher_room_is_a_fault_wherever_it_stands(tmp_path, text):
    found = package(tmp_path, {"trial/recover.py": text, "search/__init__.py": "", "search/space.py": ""})
    line = len(text.splitlines())
    assert upward(*found) == [
        f"pipeline/trial/recover.py:{line}: imports pipeline.search.space; trial stands below search"
    ]


def test_imports_of_lower_rooms_and_of_the_own_room_are_fine(tmp_path):
    files = {
        "errors.py": "import json",
        "trial/recover.py": "from pipeline import errors\nfrom pipeline.trial import memory",
        "trial/__init__.py": "",
        "trial/memory.py": "import torch",
        "project.py": "from pipeline.trial import recover",
    }
    found = package(tmp_path, files)
    assert [rule(*found) for rule in RULES] == [[]] * len(RULES)
    assert undeclared(*found, "torch==2.13.0") == []


def test_circle_names_its_modules_and_not_those_that_only_lead_into_it(tmp_path):
    files = {
        "data/fetch.py": "from pipeline.data import rows",
        "data/rows.py": "def late():\n    from pipeline.data import tasks",
        "data/tasks.py": "import pipeline.data.rows",
    }
    (fault,) = circles(*package(tmp_path, files))
    assert fault.startswith("a circle of 2: data.rows <-> data.tasks; ")
    assert "pipeline/data/rows.py:2 (data.tasks)" in fault and "fetch" not in fault


def test_hidden_libraries_second_readers_and_strangers_are_named(tmp_path):
    files = {
        "params.py": "import yaml",
        "data/tasks.py": "def read():\n    import yaml",
        "stages/search.py": "from mlflow import MlflowClient",
        "stages/served.py": "import mlflow.pyfunc",
        "tracking/store.py": "import mlflow",
        "trial/trial.py": "import optuna",
        "attic.py": "import surely_nothing_of_this_name",
    }
    found = package(tmp_path, files)
    assert escaped_libraries(*found) == [
        "pipeline/stages/search.py:1: imports mlflow; only tracking and stages.served may",
        "pipeline/trial/trial.py:1: imports optuna; only search may",
    ]
    assert [fault.split(": ")[0] for fault in second_yaml_readers(*found)] == [
        "pipeline/data/tasks.py:2",
        "pipeline/params.py:1",
    ]
    assert unknown_rooms(*found) == ["pipeline/attic: stands in no room; add it to ROOMS"]
    (fault,) = undeclared(*found, "PyYAML==6\nmlflow==3 # tracked\noptuna==5")
    assert fault.startswith("pipeline/attic.py:1: imports surely_nothing_of_this_name; ")
