"""The one reader of YAML, by the core rules of YAML 1.2.

By those rules ``no`` and ``on`` are words, ``1e-05`` and ``042`` are numbers, ``1:30`` and ``2026-01-01`` are text.
Aliases, repeated keys, deep nesting and large files are refused: a settings file needs none of them, and a hostile one
uses them to exhaust the memory of its reader.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NoReturn, cast

import yaml

from pipeline.errors import UserError

LARGEST = 256 * 1024  # bytes of a file
_DEEPEST = 20  # levels of nesting
_MOST_DIGITS = 40  # of a whole number; a longer one stays text, which no key accepts as a number


class DocumentError(UserError):
    """A YAML file that cannot be read; says where and why."""


def read(path: str | Path, functions: bool = False) -> Any:
    """Return what a YAML file holds: dictionaries, lists, strings, numbers, booleans and None.

    Args:
        path: The file.
        functions: Whether it is a definition of lm-eval's: the tag ``!function`` is read as its text, and of a key
            that stands there twice the last value counts.

    Raises:
        DocumentError: The file cannot be read, is too large or is no valid YAML.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise DocumentError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > LARGEST:
        raise DocumentError(f"{path} is larger than {LARGEST // 1024} KiB, so it is no settings file; name another one")
    try:
        return parse(content.decode("utf-8-sig"), functions)
    except UnicodeDecodeError as error:
        raise DocumentError(f"{path} is no valid YAML: byte {error.start} is not UTF-8; save it as UTF-8") from None
    except DocumentError as error:
        raise DocumentError(f"{path} is no valid YAML: {error}") from None


def parse(text: str, functions: bool = False) -> Any:
    """Return what a YAML text holds; see ``read``.

    Raises:
        DocumentError: It is no valid YAML; the message gives the line.
    """
    try:
        return (_WithFunctions if functions else _Loader)(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise DocumentError(f"{where}{error.problem or error.context}") from None
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise DocumentError(" ".join(str(error).split())[:200]) from None


def write(value: object) -> str:
    """Return a value as YAML that ``parse`` reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """PyYAML's, without aliases for what stands there twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _refuse(problem: str, at: yaml.Event | yaml.Node) -> NoReturn:
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=cast("yaml.Mark", at.start_mark))


class _Loader(yaml.reader.Reader, yaml.scanner.Scanner, yaml.parser.Parser, yaml.composer.Composer,
              yaml.constructor.BaseConstructor, yaml.resolver.BaseResolver):  # fmt: skip
    """PyYAML's parser with the resolver and the constructors of YAML 1.2's core schema."""

    repeated_keys = False

    def __init__(self, text: str):
        yaml.reader.Reader.__init__(self, text)
        yaml.scanner.Scanner.__init__(self)
        yaml.parser.Parser.__init__(self)
        yaml.composer.Composer.__init__(self)
        yaml.constructor.BaseConstructor.__init__(self)
        yaml.resolver.BaseResolver.__init__(self)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            _refuse(f"alias *{str(event.anchor)[:40]} is not allowed; write the value out", event)
        if self._depth == _DEEPEST:
            _refuse(f"nested more than {_DEEPEST} levels deep", event)
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def _mapping(self, node: yaml.MappingNode) -> dict[object, object]:
        values: dict[object, object] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                _refuse("a key must be a word", key_node)
            key = self.construct_object(key_node)
            if key in values and not self.repeated_keys:
                _refuse(f"key {str(key)[:40]!r} stands here twice; remove one", key_node)
            values[key] = self.construct_object(value_node, deep=True)
        return values

    def _integer(self, node: yaml.ScalarNode) -> int | str:
        text = str(self.construct_scalar(node))
        if len(text) > _MOST_DIGITS:
            return text
        try:
            return int(text, 0) if text.startswith(("0x", "0o")) else int(text)
        except ValueError:  # tagged !!int, and is none
            return text

    def _float(self, node: yaml.ScalarNode) -> float | str:
        text = str(self.construct_scalar(node))
        try:
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            return text

    def _boolean(self, node: yaml.ScalarNode) -> bool:
        return str(self.construct_scalar(node)).lower() == "true"

    def _undefined(self, node: yaml.Node) -> NoReturn:
        _refuse(f"tag {node.tag[:60]} is not allowed", node)


class _WithFunctions(_Loader):
    """The same for lm-eval's definitions: a tag for the name of a function, and keys that stand there twice."""

    repeated_keys = True


_CORE = "tag:yaml.org,2002:"
_SCALARS = {  # tag -> (what YAML 1.2's core schema recognizes, the characters that it starts with)
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
for _name, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):  # what is written is quoted where version 1.1 or 1.2 would read no text
        _class.add_implicit_resolver(_CORE + _name, re.compile(rf"(?:{_pattern})\Z"), _first)
_BASE: Any = _Loader  # whose type yaml's stubs do not know as a loader
for _tag, _constructor in {
    "null": lambda loader, node: None,
    "bool": _Loader._boolean,
    "int": _Loader._integer,
    "float": _Loader._float,
    "str": lambda loader, node: loader.construct_scalar(node),
    "seq": lambda loader, node: [loader.construct_object(item, deep=True) for item in node.value],
    "map": _Loader._mapping,
}.items():
    _BASE.add_constructor(_CORE + _tag, _constructor)
_BASE.add_constructor(None, _Loader._undefined)
_WithFunctions.add_constructor("!function", lambda loader, node: str(node.value))
