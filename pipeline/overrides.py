"""Which params are used: ``params.yaml`` or a preset, with what the command line changed.

An entry point keeps both choices in its environment, so that the stages that it starts read the same params.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel

from pipeline import documents
from pipeline.documents import DocumentError
from pipeline.errors import shown
from pipeline.params import Params, ParamsError

DEFAULT = "params.yaml"  # also what an entry point is given for "as the file says"
PRESETS = Path("presets")
BASED_ON = "base"  # key of a preset: the preset that it changes
PRESET, OVERRIDES = "QPRUNER_PRESET", "QPRUNER_OVERRIDES"  # variables: a preset's name; a JSON object of dotted keys
_ASSIGNMENT = re.compile(r"(?:^|\s+)([A-Za-z_][\w.]*)=")


def adopt(preset: str, text: str, named: Mapping[str, tuple[str, str]]) -> list[str]:
    """Keep a preset and changed values for this process and those that it starts.

    Args:
        preset: A preset's name, or ``params.yaml``.
        text: Changed keys, such as ``prune.ratios=0.3 evaluate.tasks=[boolq, piqa]``.
        named: Name of a parameter -> (dotted key that it sets, value as YAML); ``params.yaml`` stands for the value in
            the file.

    Returns:
        What is wrong with the values, a line each, to be told with the faults of the params. Unknown keys are kept;
        see ``unknown``.

    Raises:
        ParamsError: There is no such preset.
    """
    os.environ.pop(PRESET, None)
    os.environ.pop(OVERRIDES, None)
    given, faults = _assignments(text)
    for name, (key, value) in named.items():
        if key in given and value != DEFAULT:
            faults.append(f"{key}: set twice, by set and by {name}; give it once")
        else:
            given.setdefault(key, value)
    changed: dict[str, object] = {}
    for key, value in given.items():
        if value == DEFAULT:
            continue
        try:
            changed[key] = documents.parse(value)
        except DocumentError as error:
            faults.append(f"{key}: {shown(value)} is no YAML value ({error})")
    if changed:
        os.environ[OVERRIDES] = json.dumps(changed)
    if preset != DEFAULT:
        try:
            _preset_path(preset)
        except ParamsError as error:
            raise ParamsError("\n".join([str(error), *faults, *unknown()])) from None
        os.environ[PRESET] = preset
    return faults


def _assignments(text: str) -> tuple[dict[str, str], list[str]]:
    """Split ``prune.ratios=0.3 recover.steps=8`` into keys and their values as text; return faults, too."""
    if text.strip() in ("", DEFAULT):
        return {}, []
    first, *parts = _ASSIGNMENT.split(text.strip())
    names = parts[::2]
    faults = []
    if first or not parts:
        faults.append(f"set: {shown(first)} is not of the form key=value; write for example prune.ratios=0.3")
    if repeated := {name for name in names if names.count(name) > 1}:
        faults.append(f"set: {', '.join(sorted(repeated))} stands there twice; give each key once")
    return dict(zip(names, parts[1::2], strict=True)), faults


def active() -> dict[str, object]:
    """Return what the command line changed: dotted key -> value.

    Raises:
        ParamsError: The variable was set by hand and is no JSON object.
    """
    text = os.environ.get(OVERRIDES) or "{}"
    try:
        changed = json.loads(text)
    except ValueError:
        changed = None
    if not isinstance(changed, dict):
        raise ParamsError(f'{OVERRIDES}: {shown(text)} is no JSON object, such as {{"prune.ratios": 0.3}}; unset it')
    return changed


def path() -> Path:
    """Return the file that the params come from.

    Raises:
        ParamsError: There is no such preset.
    """
    preset = os.environ.get(PRESET)
    return _preset_path(preset) if preset else Path(DEFAULT)


def read(file: str | Path | None = None) -> object:
    """Return the document of the params that are used, not yet judged. Unknown keys of overrides are left out.

    Args:
        file: Another file than ``path`` returns; it is overridden likewise.

    Raises:
        ParamsError: The file is missing or no valid YAML.
    """
    file = path() if file is None else Path(file)
    if not file.exists():
        raise ParamsError(
            f"{file} does not exist here ({Path.cwd()}); run from the project's root or copy presets/default.yaml"
        )
    raw = _whole(file)
    known = set(keys())
    for key, value in active().items():
        if key not in known:
            continue
        *sections, name = key.split(".")
        target = raw
        for section in sections:
            target = target.setdefault(section, {}) if isinstance(target, dict) else None
        if isinstance(target, dict):  # else the section is at fault, and the checks say so
            target[name] = value
    return raw


def _whole(file: Path, above: tuple[str, ...] = ()) -> object:
    """Return a file's document; a preset's is laid over that of the preset that its key ``base`` names.

    Args:
        file: The file.
        above: The presets that are based on it.
    """
    try:
        raw = documents.read(file)
    except DocumentError as error:
        raise ParamsError(str(error)) from None
    if not isinstance(raw, dict) or BASED_ON not in raw:
        return raw
    name = raw.pop(BASED_ON)
    if file.parent.name != PRESETS.name:  # DVC reads params.yaml by itself, too, and knows no such key
        raise ParamsError(
            f"{file}: only a file in {PRESETS}/ may have a base; write all its keys out, or take a preset"
        )
    below = file.parent / f"{name}.yaml"
    if file.stem in above or not isinstance(name, str) or not below.is_file():
        raise ParamsError(f"{file}: base {shown(name)} is no other preset; name one in {file.parent}")
    return _over(raw, _whole(below, (*above, file.stem)))


def _over(changes: object, document: object) -> object:
    """Return a document with changes of it, key by key."""
    if not isinstance(changes, dict) or not isinstance(document, dict):
        return changes
    return document | {key: _over(value, document.get(key)) for key, value in changes.items()}


def keys(section: type[BaseModel] | None = None, prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every value that the params hold, such as ``prune.ratios``."""
    for name, field in (section or Params).model_fields.items():
        key = f"{prefix}{field.alias or name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from keys(field.annotation, f"{key}.")
        else:
            yield key


def unknown() -> list[str]:
    """Return a line for each overridden key that the params do not have, with the keys that are spelled alike."""
    known = list(keys())
    return [_unknown(key, known) for key in active() if key not in known]


def _unknown(key: str, known: list[str]) -> str:
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f"{key}: is a section; name a key in it, such as {inside[0]}"
    return f"{key[:80]}: unknown key; {did_you_mean(key, known) or 'params.yaml has them all'}"


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """Return a question that names the known keys spelled like this one; empty if there are none."""
    known = list(known)
    by_name = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    close = by_name[:3] or difflib.get_close_matches(key[:80], known)
    return f"did you mean {' or '.join(close)}?" if close else ""


def uses_hub() -> bool:
    """Return whether any source is on a hub, without judging the rest of the params."""
    try:
        raw = read()
    except ParamsError:
        return False
    sources = []
    for section, name in (("model", "source"), ("data", "alpaca"), ("data", "benchmarks")):
        values = raw.get(section) if isinstance(raw, dict) else None
        sources.append(values.get(name) if isinstance(values, dict) else None)
    return any(isinstance(source, str) and source.partition(":")[0] == "hub" for source in sources)


def _preset_path(name: str) -> Path:
    names = sorted(preset.stem for preset in PRESETS.glob("*.yaml"))
    if name not in names:
        raise ParamsError(f"preset: {shown(name)} is no preset; there are {', '.join(names)}")
    return PRESETS / f"{name}.yaml"
