"""What is wrong with a row of Alpaca or an item of a benchmark, one at a time and in its own fields."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

Item = Mapping[str, object]  # of a benchmark, in the raw fields of its data set

ALPACA_FIELDS = ("instruction", "input", "output")

# Raw fields that lm-eval's definitions of the paper's seven tasks read.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "boolq": ("question", "passage", "label"),
    "piqa": ("goal", "sol1", "sol2", "label"),
    "hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "winogrande": ("sentence", "option1", "option2", "answer"),
    "arc_easy": ("question", "choices", "answerKey"),
    "arc_challenge": ("question", "choices", "answerKey"),
    "openbookqa": ("question_stem", "choices", "answerKey"),
}
_MAY_BE_BLANK = ("ctx_b", "activity_label")
_DEEPEST = 8  # objects within objects that are told apart


def of_columns(row: object, names: Mapping[str, str | None]) -> object:
    """Return a row of Alpaca with our names for its fields, further ones left out; what is no object as it is.

    Args:
        row: The row.
        names: Our name of a field -> the row's, where it differs; None: it has no such field, and an empty text.
    """
    if not isinstance(row, dict):
        return row
    theirs = {name: names.get(name, name) for name in ALPACA_FIELDS}
    return {ours: row[name] if name else "" for ours, name in theirs.items() if name is None or name in row}


def alpaca_fault(row: object) -> str:
    """Return why a row of Alpaca teaches nothing; an empty text if it does."""
    wanted = f"needs the texts {', '.join(ALPACA_FIELDS)}"
    if not isinstance(row, dict):
        return f"{wanted}; it is {short(row)}"
    for name in ALPACA_FIELDS:
        if name not in row:
            return f"{wanted}; {name} is missing"
        if not isinstance(row[name], str):
            return f"{wanted}; {name} is {short(row[name])}"
        if has_surrogate(row[name]):
            return f"{name} holds half of a surrogate pair, which is no text"
    for name in ("instruction", "output"):
        if not row[name].strip():
            return f"{name} is empty"
    return ""


def raw_faults(task: str, items: Sequence[object]) -> list[str]:
    """Return the fault of each of a benchmark's items in its own fields; an empty text is none."""
    faults = [_fields_fault(task, item) for item in items]
    sound = [_kinds(item) for item, fault in zip(items, faults, strict=True) if not fault]
    counts: dict[str, Counter[str]] = {}
    for kinds in sound:
        for name, kind in kinds.items():
            counts.setdefault(name, Counter())[kind] += 1
    common = {name: kinds.most_common(1)[0][0] for name, kinds in counts.items()}
    return [fault or _odd_kind(_kinds(item), common) for item, fault in zip(items, faults, strict=True)]


def choices_fault(choices: Sequence[object]) -> str:
    """Return why an item cannot be decided among these choices; an empty text if it can."""
    if len(choices) < 2:
        return f"it has {len(choices)} choice{'' if len(choices) == 1 else 's'}, and needs two at least"
    for number, choice in enumerate(choices, 1):
        if not isinstance(choice, str):
            return f"choice {number} is {short(choice)}, not a text"
        if not choice.strip():
            return f"choice {number} is empty"
    if len(set(choices)) < len(choices):
        twice = Counter(choices).most_common(1)[0][0]
        return f"two of its choices are equal: {short(twice)}"
    return ""


def _fields_fault(task: str, item: object) -> str:
    if not isinstance(item, dict):
        return f"needs an object, not {short(item)}"
    missing = [name for name in FIELDS.get(task, ()) if name not in item]
    if missing:
        return f"lacks {', '.join(missing)}"
    surrogate = next((name for name, value in item.items() if has_surrogate(value)), "")
    if surrogate:
        return f"{surrogate} holds half of a surrogate pair, which is no text"
    return _CHECKS[task](item) if task in _CHECKS else ""


def _texts_fault(item: Item, names: Iterable[str]) -> str:
    for name in names:
        text = item[name]
        if not isinstance(text, str):
            return f"{name} is {short(text)}, not a text"
        if not text.strip() and name not in _MAY_BE_BLANK:
            return f"{name} is empty"
    return ""


def _number_fault(answer: object, count: int) -> str:
    if type(answer) is int and 0 <= answer < count:
        return ""
    return f"its answer {short(answer)} is none of its {count} choices (0 to {count - 1})"


def _boolq(item: Item) -> str:
    return _texts_fault(item, ("question", "passage")) or _number_fault(item["label"], 2)


def _piqa(item: Item) -> str:
    return (
        _texts_fault(item, ("goal", "sol1", "sol2"))
        or choices_fault([item["sol1"], item["sol2"]])
        or _number_fault(item["label"], 2)
    )


def _hellaswag(item: Item) -> str:
    fault = _texts_fault(item, ("activity_label", "ctx_a", "ctx_b"))
    if fault:
        return fault
    if not isinstance(item["endings"], list):
        return f"endings is {short(item['endings'])}, not a list of texts"
    label, count = item["label"], len(item["endings"])
    number = int(label) if isinstance(label, str) and label.isdecimal() and len(label) < 4 else label
    return choices_fault(item["endings"]) or _number_fault(number, count)


def _winogrande(item: Item) -> str:
    fault = _texts_fault(item, ("sentence", "option1", "option2"))
    if fault:
        return fault
    if "_" not in str(item["sentence"]):
        return "sentence has no gap (_)"
    if item["answer"] not in ("1", "2"):
        return f"its answer {short(item['answer'])} is none of its 2 choices ('1' or '2')"
    return choices_fault([item["option1"], item["option2"]])


def _labelled(question: str) -> Callable[[Item], str]:
    def fault(item: Item) -> str:
        wrong = _texts_fault(item, (question,))
        if wrong:
            return wrong
        choices = item["choices"]
        texts, labels = (choices.get(name) if isinstance(choices, dict) else None for name in ("text", "label"))
        if not isinstance(texts, list) or not isinstance(labels, list):
            return "choices needs two lists, text and label"
        if len(texts) != len(labels):
            return f"choices has {len(texts)} texts and {len(labels)} labels"
        wrong = choices_fault(texts)
        if wrong:
            return wrong
        if len({str(label) for label in labels}) < len(labels) or not all(isinstance(label, str) for label in labels):
            return f"the labels of its choices are {short(labels)}, and need to be different texts"
        if item["answerKey"] not in labels:
            return f"its answer {short(item['answerKey'])} is none of its {len(labels)} choices ({', '.join(labels)})"
        return ""

    return fault


_CHECKS: Mapping[str, Callable[[Item], str]] = {
    "boolq": _boolq,
    "piqa": _piqa,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "arc_easy": _labelled("question"),
    "arc_challenge": _labelled("question"),
    "openbookqa": _labelled("question_stem"),
}


def _kinds(item: object, prefix: str = "", depth: int = 0) -> dict[str, str]:
    """Return field -> kind of its value, in dotted names; what is null or empty has none."""
    if not isinstance(item, dict):
        return {}
    kinds: dict[str, str] = {}
    for name, value in item.items():
        if isinstance(value, dict) and depth < _DEEPEST:
            kinds |= _kinds(value, f"{prefix}{name}.", depth + 1)
            kinds[prefix + name] = "object"
        elif kind := _kind(value):
            kinds[prefix + name] = kind
    return kinds


def _kind(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        inside = {kind for element in value if (kind := _kind(element))}
        return f"list of {' and '.join(sorted(inside))}" if inside else ""
    names = {bool: "true or false", int: "number", float: "number", str: "text", dict: "object"}
    return names.get(type(value), type(value).__name__)


def _odd_kind(kinds: Mapping[str, str], common: Mapping[str, str]) -> str:
    """Return in which field an item differs from most others: a table has one type a column."""
    for name, kind in kinds.items():
        if kind != common.get(name, kind):
            return f"{name} is of kind {kind}, and of kind {common[name]} in most items"
        if " and " in kind:
            return f"{name} is a {kind}; all of its entries need one kind"
    return ""


def has_surrogate(value: object) -> bool:
    """Return whether a value is a text with half of a surrogate pair in it."""
    return isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value)


def short(value: object) -> str:
    """Return a value as a message shows it."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
