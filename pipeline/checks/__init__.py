"""All that is asked of the params before anything starts, every fault in one message.

``pipeline.params`` judges each value alone. Here are the checks that need more: two keys at once, lm-eval's list of
tasks, files, the machine, and the model's config where that is at hand. A check names the keys that it reads and runs
only if they are all sound, so that it neither stumbles over another fault nor hides one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TypedDict, cast

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from pipeline import overrides
from pipeline.checks import machine, model, pairs
from pipeline.checks.check import Check
from pipeline.errors import shown
from pipeline.params import Params, ParamsError, Section


class _Fault(TypedDict):
    """What is read of an entry of pydantic's ``ValidationError.errors()``."""

    loc: tuple[int | str, ...]
    type: str
    msg: str
    input: object


def load(path: str | Path | None = None, more: Sequence[str] = ()) -> Params:
    """Read and check the params.

    Args:
        path: A file; None: what the entry point was given, else ``params.yaml``.
        more: Faults that are known already, to be told with those of the file.

    Raises:
        ParamsError: The file is missing, is no YAML, or has faults.
    """
    raw = overrides.read(path)
    return parse(raw, str(overrides.path() if path is None else path), [*more, *overrides.unknown()])


def parse(raw: object, origin: str = overrides.DEFAULT, more: Sequence[str] = ()) -> Params:
    """Turn a document into params.

    Args:
        raw: What the YAML file holds.
        origin: What to call it in messages.
        more: Faults that are known already.

    Raises:
        ParamsError: With one line for each fault: the key, the value received, what is allowed.
    """
    if not isinstance(raw, dict):
        raise ParamsError(f"{origin} must be a mapping of sections; copy presets/default.yaml over it")
    faults, wrong = list(more), set()
    try:
        whole = Params.model_validate(raw)
    except ValidationError as error:
        places = [fault["loc"] for fault in error.errors()]
        # A list all of whose items are at fault is, to pydantic, also too short.
        emptied = [place for place in places if any(place == other[: len(place)] != other for other in places)]
        faults += [_line(fault) for fault in error.errors() if fault["loc"] not in emptied]
        wrong = {tuple(map(str, place[:2])) for place in places}
    values = _sound_values(raw, wrong)
    faults += [fault for check in _checks(values) for fault in _judge(check, values)]
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise ParamsError("\n".join([f"{origin} has {count}:", *(f"  {fault}" for fault in faults)]))
    return whole


def _checks(values: dict[str, object]) -> Iterable[Check]:
    yield from pairs.CHECKS
    yield from machine.CHECKS
    config = model.at_hand(cast("str | None", values.get("model.source")))
    if config is not None:
        yield from model.checks(config)


def _judge(check: Check, values: dict[str, object]) -> Iterator[str]:
    """Yield the faults that a check finds; none if a key that it reads is itself at fault."""
    if not all(key in values for key in check.keys):
        return
    given = SimpleNamespace()
    for key in check.keys:
        section, _, name = key.partition(".")
        if not name:
            setattr(given, section, values[key])
            continue
        if not hasattr(given, section):
            setattr(given, section, SimpleNamespace())
        setattr(getattr(given, section), name, values[key])
    yield from check.judge(given)


def _sound_values(raw: dict[str, object], wrong: set[tuple[str, ...]]) -> dict[str, object]:
    """Return the typed values without fault by their keys (``seed``, ``prune.ratios``), and each section without any.

    Args:
        raw: The document.
        wrong: The places of the faults: (section,), (section, key) or (key,).
    """
    values: dict[str, object] = {}
    for name, field in Params.model_fields.items():
        key = field.alias or name
        kind = field.annotation
        if (key,) in wrong or (key not in raw and field.is_required()):
            continue
        if not (isinstance(kind, type) and issubclass(kind, Section)):
            values[key] = _typed(field, raw[key] if key in raw else field.get_default(call_default_factory=True))
            continue
        section = cast("dict[str, object]", raw[key])  # any other has a fault
        sound = {
            inner: inner_field
            for inner, inner_field in kind.model_fields.items()
            if (key, inner) not in wrong and (inner in section or not inner_field.is_required())
        }
        for inner, inner_field in sound.items():
            default = inner_field.get_default(call_default_factory=True)
            values[f"{key}.{inner}"] = _typed(inner_field, section.get(inner, default))
        if len(sound) == len(kind.model_fields):
            values[key] = kind.model_validate({inner: section[inner] for inner in sound if inner in section})
    return values


def _typed(field: FieldInfo, value: object) -> object:
    return TypeAdapter(field.rebuild_annotation()).validate_python(value)


def _line(fault: _Fault) -> str:
    key = ".".join(shown(part)[1:-1] if isinstance(part, str) else str(part) for part in fault["loc"])
    key = key or "(whole file)"
    message = fault["msg"].removeprefix("Value error, ")
    received = fault["input"]
    if fault["type"] == "missing":
        return f"{key}: missing; add it (see presets/default.yaml)"
    if fault["type"] == "extra_forbidden":
        meant = overrides.did_you_mean(key, overrides.keys()) or "remove it or correct its spelling"
        return f"{key}: unknown key (value {shown(received)}); {meant}"
    value = "" if isinstance(received, (dict, BaseModel)) else f" (value {shown(received)})"
    return f"{key}: {message}{value}"
