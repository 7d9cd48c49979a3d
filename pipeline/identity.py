"""Which code a result belongs to: a digest of the sources that compute it and of the libraries they call.

A result is kept under the digest of its settings and of its code. An edit of any module that computes it changes the
digest, so nothing computed before the edit is used or mixed with what comes after. An edit of a comment, of a docstring
or of the layout changes nothing.

What computes a result is found in the sources alone: the modules that its root modules import, those that these import,
and so on, within this package. ``dvc.yaml`` lists the same files for each stage, and the file that pins the libraries;
print it with

    python -m pipeline.identity

and mend the list with

    python -m pipeline.identity --write
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGE = "pipeline"
ROOT = Path(__file__).parent.parent
_CODE = f"      - {PACKAGE}/"  # how a line of dvc.yaml begins that lists code
_PINS = "      - requirements.txt"  # the libraries' versions, as far as DVC can see them
_UNPINNED = ("pareto", "report")  # they arrange what others computed
LIBRARIES = ("torch", "transformers", "bitsandbytes", "peft", "lm-eval")

# Modules and packages that compute no result, with the reason. Nothing is followed through them.
NOT_COMPUTING = {
    "pipeline.tracking": "records results",
    "pipeline.console": "shows progress",
    "pipeline.errors": "names errors",
    "pipeline.paths": "names places",
    "pipeline.locks": "keeps processes apart",
    "pipeline.storage": "writes files and compares them with their checksums",
    "pipeline.identity": "names results",
    "pipeline.params": "reads settings, whose values are part of a result's settings",
    "pipeline.checks": "refuses settings",
    "pipeline.fits": "refuses settings",
    "pipeline.documents": "reads YAML",
    "pipeline.overrides": "reads settings",
    "pipeline.doctor": "describes the machine",
    "pipeline.runtime": "sets up a process",
    "pipeline.sources": "reads settings",
    "pipeline.repro": "starts DVC",
    "pipeline.signals": "hears signals",
    "pipeline.results": "shows results",
    "pipeline.workers": "hands out what is computed",
    "pipeline.stages": "calls what computes; a stage's own file counts where it is a root",
}

TRIAL = ("pipeline.trial.trial", "pipeline.stages.trials")  # what the result of a trial depends on

# The roots of a stage, where they are not its own file alone, and packages that compute its output though no other's.
_ROOTS = {
    "search": ("pipeline.stages.search", *TRIAL),
    "build": ("pipeline.stages.build", *TRIAL),
    "register": ("pipeline.stages.register", "pipeline.stages.served", "pipeline.stages.serving"),
}
_COMPUTING = {"report": ("pipeline.results",), "export": ("pipeline.export.remote",)}


@dataclass(frozen=True)
class Identity:
    """What a study is named by.

    Attributes:
        settings: Digest of the models, the data and the settings.
        code: Digest of the code.
    """

    settings: str
    code: str

    @property
    def name(self) -> str:
        """Return the name of the study."""
        return f"{self.settings}-{self.code}"


@cache
def code(*roots: str, root: Path = ROOT) -> str:
    """Return twelve hex digits that name the code behind some modules and the versions of the libraries.

    Args:
        roots: Names of modules, such as ``pipeline.trial.trial``.
        root: The folder that holds the package.
    """
    value = hashlib.sha256()
    for name in closure(*roots, root=root):
        value.update(f"{name}\n{_plain(_tree(_file(name, root)))}\n".encode())
    for library in LIBRARIES:
        value.update(f"{library}=={_version(library)}\n".encode())
    return value.hexdigest()[:12]


def closure(*roots: str, computing: tuple[str, ...] = (), root: Path = ROOT) -> list[str]:
    """Return the modules that some modules rest on, sorted: themselves and all they import within the package.

    Args:
        roots: Names of modules; they always count.
        computing: Packages of ``NOT_COMPUTING`` that count here.
        root: The folder that holds the package.
    """
    names: set[str] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in names:
            continue
        names.add(name)
        waiting += [other for other in _imported(name, root) if _computes(other, computing)]
    return sorted(names)


def stage_files(stage: str, root: Path = ROOT) -> list[str]:
    """Return the files that a stage's output depends on, relative to the project's root, as ``dvc.yaml`` lists them."""
    roots = _ROOTS.get(stage, (f"{PACKAGE}.stages.{stage}",))
    names = closure(*roots, computing=_COMPUTING.get(stage, ()), root=root)
    files = [_file(name, root) for name in names]
    return sorted(str(file.relative_to(root)) for file in files if not _is_empty(file))


def with_code(pipeline: str) -> str:
    """Return the text of a ``dvc.yaml`` with the code that each stage depends on, and the pinned libraries, in place.

    Each stage must list its dependencies a line each, under ``deps:``.
    """
    lines: list[str] = []
    stage = ""
    for line in pipeline.splitlines():
        if line.startswith("  ") and line[2:3].isalpha():
            stage = line.strip().rstrip(":")
        if line.startswith(_CODE) or line == _PINS:
            continue
        lines.append(line)
        if line == "    deps:":
            lines += [f"      - {file}" for file in stage_files(stage)] + [_PINS] * (stage not in _UNPINNED)
    return "\n".join(lines) + "\n"


def _computes(name: str, computing: tuple[str, ...]) -> bool:
    """Return whether a module that is imported counts."""
    return not _within(name, tuple(NOT_COMPUTING)) or _within(name, computing)


def _within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@cache
def _imported(name: str, root: Path) -> tuple[str, ...]:
    """Return the modules of the package that a module imports anywhere, with the packages that they lie in."""
    names: set[str] = set(_parents(name))
    for target in _targets(_tree(_file(name, root))):
        if target.partition(".")[0] == PACKAGE and _exists(target, root):
            names |= {target, *_parents(target)}
    return tuple(sorted(names))


def _targets(tree: ast.AST) -> Iterator[str]:
    """Yield all that a tree's imports may name; ``from a import b`` names ``a`` and perhaps a module ``a.b``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError("imports within the package are written in full, so that they can be followed")
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from _targets(node)


def _parents(name: str) -> list[str]:
    """Return the packages that a module lies in: their ``__init__`` runs before it."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _file(name: str, root: Path) -> Path:
    path = root.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _exists(name: str, root: Path) -> bool:
    return _file(name, root).is_file()


@cache
def _parsed(source: str) -> ast.Module:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0].value if isinstance(node.body[0], ast.Expr) else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                del node.body[0]
    return tree


def _tree(file: Path) -> ast.Module:
    """Return a file's syntax tree without docstrings."""
    return _parsed(file.read_text(encoding="utf-8"))


def _is_empty(file: Path) -> bool:
    return not _tree(file).body


def _plain(node: object) -> str:
    """Return a tree as text that is the same for all versions of Python: ``ast.dump`` differs in empty fields."""
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
        return f"{type(node).__name__}({','.join(f'{name}={_plain(value)}' for name, value in fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(_plain, node))}]"
    return repr(node)


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "missing"


def main() -> None:
    """Print the files that each stage of ``dvc.yaml`` must list; with ``--write``, put them there."""
    path = ROOT / "dvc.yaml"
    mended = with_code(path.read_text(encoding="utf-8"))
    if sys.argv[1:] == ["--write"]:
        path.write_text(mended, encoding="utf-8")
    else:
        print(mended)


if __name__ == "__main__":
    main()
