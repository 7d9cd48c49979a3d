"""Generated params: each is either refused with one message or gives params that make sense."""

import itertools
import math
import random
import signal
from contextlib import contextmanager
from pathlib import Path

import yaml

from pipeline import checks
from pipeline.params import ParamsError
from tests.faults.tally import Try

_SECONDS = 10  # for one file; a billion laughs must not take a minute
_LONGEST = 6000  # characters of a message

# Values that somebody may type, paste or generate.
VALUES = [
    None, True, False, 0, -1, 1, 2, 3, 10**6, 10**9, 10**18, 2**31, 2**63, 10**30, 0.0, -0.0, 0.5, 1e-9, 1e30, 1e308,
    math.nan, math.inf, -math.inf, "", " ", "0", "1", "0.2", "1e-5", "3e-4", "yes", "no", "null", "~", "auto", "cuda",
    "x" * 5000, "ä€𝔘\u202e", "a\nb", "a\0b", "../../etc/passwd", "path:", "path:.", "hub:", "hub:a/b@main",
    "hub:a/b@../..", "package:-r==1", "package:a==1\n", "~/model", "path:~/model", "$HOME", "{}", "[]", [], {}, [[]],
    [None], [1, 1], ["piqa", "piqa"], {"a": 1}, {"first": 0}, {"first": 0, "last": 10**9}, [0.2, 0.2], ["4" * 30],
    ["8" * 5000], ["444x"], "²", "١٢",
]  # fmt: skip
KEYS = [None, True, 0, 1.5, "", " ", "x" * 5000, "ratio", "a.b", "__class__", "ä€𝔘\u202e", "self"]

_NINE_TIMES = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghij"))

# Texts that are no ordinary YAML, or that YAML 1.1 reads in its own way. `{text}` stands for the whole of a good file.
TEXTS = [
    "", "\n", "---\n", "--- {}\n--- {}\n", "[]", "42", "text", "!!binary aGVsbG8=", "&a " * 10,
    "seed: 042\n", "seed: 1:30\n", "seed: 0x1f\n", "seed: 1_000\n", "seed: 2026-11-28\n", f"seed: {'9' * 5000}\n",
    f"seed: {'[' * 20000}", f"seed: {'{a: ' * 5000}", "seed: &a [*a]\n", f"x: '{'y' * 10**6}'\n",
    'seed: "\\ud800"\n', f"a: &a [{', '.join('x' * 9)}]\n{_NINE_TIMES}",
    "\ufeff{text}", "{text}\0", "%YAML 9.9\n---\n{text}", "{text}\n#" + "#" * 10**6,
    *("{text}\n" + more for more in (
        "seed: 1\n", "prune: {}\n", "\tseed: 1\n", "- a\n", "? [a, b]\n: 1\n", "1: 2\n", "<<: *gone\n",
        "number: 0.1e\n", "seed: !!python/object/apply:os.getcwd []\n",
    )),
]  # fmt: skip


def texts(count: int, seed: int) -> list[tuple[str, str]]:
    """``count`` pairs of a name and a file's text."""
    good = Path("params.yaml").read_text()
    made = [(f"text {number}", text.replace("{text}", good)) for number, text in enumerate(TEXTS)]
    draw = random.Random(seed)
    while len(made) < count:
        raw = yaml.safe_load(good)
        changes = [_change(raw, draw) for _ in range(draw.choice((1, 1, 1, 2, 5)))]
        made.append((f"{len(made)}: " + ", ".join(changes), yaml.safe_dump(raw, allow_unicode=draw.random() < 0.5)))
    return made[:count]


def _change(raw: dict, draw: random.Random) -> str:
    """Change one key somewhere in the params; return what was done."""
    section, key = raw, draw.choice(list(raw))
    while isinstance(section[key], dict) and section[key] and draw.random() < 0.9:
        section = section[key]
        key = draw.choice(list(section))
    before = section[key]
    action = draw.randrange(6)
    if action == 0:
        del section[key]
        return f"no {key}"
    if action == 1:
        section[draw.choice([*KEYS, f"{key}s"])] = draw.choice([before, 1])
        return f"another key beside {key}"
    if action == 2 and isinstance(before, (int, float)) and not isinstance(before, bool):
        section[key] = draw.choice((-before, before * 10, before / 3, before + 1, before * 10**6, str(before)))
    elif action == 3 and isinstance(before, list):
        section[key] = before * 2 if draw.random() < 0.5 else [*before, draw.choice(VALUES)]
    elif action == 4:
        section[key] = {"deeper": before}
    else:
        section[key] = draw.choice(VALUES)
    return f"{key} = {str(section[key])[:60]!r}"


@contextmanager
def _limit(seconds: int):
    def late(*_):
        raise TimeoutError(f"not read in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(name: str, text: str, path: Path) -> Try:
    """Read one file in this process and judge what comes of it."""
    done = Try("params", name)
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        with _limit(_SECONDS):
            problems = strange(checks.load(path).model_dump())
    except ParamsError as error:
        message = str(error)
        problems = [f"a message of {len(message)} characters"] if len(message) > _LONGEST else []
        problems += ["a message without words"] if not message.strip() else []
    except Exception as error:
        done.tracebacks += 1
        done.remark(f"{type(error).__name__}: {str(error)[:200]}")
        problems = []
    if problems:
        done.unclear += 1
        done.remark("; ".join(problems))
    return done


def strange(values, key: str = "") -> list[str]:
    """What params that were accepted should not hold."""
    if isinstance(values, dict):
        return [problem for name, value in values.items() for problem in strange(value, f"{key}.{name}".strip("."))]
    if isinstance(values, (list, tuple)):
        repeated = len({repr(value) for value in values}) < len(values)
        problems = [f"{key} names something more than once: {values}"] if repeated else []
        return problems + [problem for value in values for problem in strange(value, key)]
    if isinstance(values, bool):
        return []
    if isinstance(values, (int, float)) and (not math.isfinite(values) or abs(values) > 1e10):
        return [f"{key} is {values}"]
    if isinstance(values, str) and (len(values) > 1000 or "\0" in values or "\n" in values):
        return [f"{key} is a text of {len(values)} characters, {values[:20]!r}..."]
    return []
