"""What a campaign counts: a line for each try, kept in a file as soon as the try has ended."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

# Words that a message for users never has: they show that a fault reached the top by accident.
_RAW = ("Traceback (most recent call last)",)


@dataclass
class Try:
    """One fault and what came of it.

    Attributes:
        kind: The group that it is counted in.
        name: What was done, enough to do it again.
        lost: Finished trials or cells that are gone.
        doubled: Results that stand there twice.
        left: Processes, locks, temporary files and RUNNING runs that stayed behind.
        unclear: What ended otherwise than it should, or without a message that helps.
        tracebacks: Commands that showed one.
        note: What to look at when a count is not 0.
    """

    kind: str
    name: str
    lost: int = 0
    doubled: int = 0
    left: int = 0
    unclear: int = 0
    tracebacks: int = 0
    note: str = ""

    @property
    def clean(self) -> bool:
        return not (self.lost or self.doubled or self.left or self.unclear or self.tracebacks)

    def remark(self, text: str) -> None:
        self.note = f"{self.note}; {text}" if self.note else text

    def read(self, output: str) -> None:
        """Count a traceback in what a command printed."""
        if any(word in output for word in _RAW):
            self.tracebacks += 1
            self.remark(output[output.rindex(_RAW[0]) :].strip().splitlines()[-1])


COUNTS = ("lost", "doubled", "left", "unclear", "tracebacks")


@dataclass
class Tally:
    """The tries of a campaign in ``path``, one JSON line each; those that stand there are not repeated."""

    path: Path
    tries: list[Try] = field(default_factory=list)

    def __post_init__(self):
        if self.path.exists():
            # A kill may have torn the last line.
            lines = self.path.read_text().split("\n")[:-1]
            self.tries = [Try(**json.loads(line)) for line in lines]
            self.path.write_text("".join(f"{line}\n" for line in lines))

    def has(self, kind: str, name: str) -> bool:
        return any((done.kind, done.name) == (kind, name) for done in self.tries)

    def begins(self, kind: str, name: str) -> bool:
        """Whether a try of this kind is there whose name begins so."""
        return any(done.kind == kind and done.name.startswith(name) for done in self.tries)

    def add(self, done: Try) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(asdict(done)) + "\n")
        self.tries.append(done)

    def table(self) -> str:
        """A Markdown table of the counts by kind, and a line for each try that was not clean."""
        return "\n".join([*_table(self.tries), *_faults(self.tries)])


def _table(tries: list[Try]) -> Iterator[str]:
    yield "| kind | tried | lost | doubled | left behind | unclear | tracebacks |"
    yield "|---|---|---|---|---|---|---|"
    kinds = list(dict.fromkeys(done.kind for done in tries))
    for kind, group in [(kind, [done for done in tries if done.kind == kind]) for kind in kinds] + [("all", tries)]:
        sums = [sum(getattr(done, count) for done in group) for count in COUNTS]
        yield f"| {kind} | {len(group)} | {' | '.join(map(str, sums))} |"


def _faults(tries: list[Try]) -> Iterator[str]:
    for done in tries:
        if not done.clean:
            counts = ", ".join(f"{count} {getattr(done, count)}" for count in COUNTS if getattr(done, count))
            yield f"{done.kind}, {done.name}: {counts}: {done.note}"
