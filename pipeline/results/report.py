"""What the report says: the tables of methods and of the front, the glossary, and the page as Markdown and HTML."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline import GIB, bits, storage
from pipeline.results import figures, labels, pages, tables
from pipeline.results.figures import COMPARED, Bars
from pipeline.results.labels import UNTOUCHED
from pipeline.results.pages import Section
from pipeline.results.tables import Cell, Table
from pipeline.search import pareto
from pipeline.search.pareto import Point

MIB = 2**20
TITLE = "QPruner report"
_ORDER = (UNTOUCHED, "llm_pruner", "uniform8", "smallest", "uniform", "qpruner1", "qpruner2", "sensitivity")
_BUDGETS = 5

GLOSSARY = (
    ("trial", "A pruning ratio and bits: the model pruned and quantized by them, recovered with LoRA and scored. "
     "Trials count from 1."),
    ("pruned", "Share of the model's parameters that was removed (prune.ratios)."),
    ("reference", "A model measured in the same way for comparison. It is never on the front."),
    ("bits", "How many bits the weights of each unit have. “30 of 120 at 8” means 30 units at 8 bits, the rest at 4; "
     "“all 16” that nothing is quantized."),
    ("same bits everywhere", "All units at one width, at a ratio that no other method tries so."),
    ("unit", "What one choice of bits covers (search.granularity): a block, a group of linears or a single linear."),
    ("score", "What the search raises (search.objective). Higher is better, also where it is negative."),
    ("response", "Mean log-probability of a response token on held-out rows of Alpaca, in nats."),
    ("gold answer", "Mean log-probability of the right choice of a benchmark's items, in nats."),
    ("accuracy", "Mean zero-shot accuracy over the benchmarks, on the items that trials are scored on."),
    ("±", "One standard error. Of a score on the front: of its difference to other trials."),
    ("expected", "The score that the search's model, fitted on all trials, expects of the bit vector. The measured "
     "score of the best trial is partly luck, so the choice goes by this one."),
    ("P(front)", "Probability that no other trial is better in both score and memory, if other items were drawn."),
    ("Pareto front", "The trials that no other trial beats in score without taking more memory."),
    ("training, GiB", "Peak memory of recovery. The untouched model is not trained, so it has none."),
    ("inference, MiB", "Peak memory of scoring a batch of evaluate.batch_tokens tokens."),
    ("untouched", "The model before pruning."),
    ("LLM-Pruner (16-bit)", "Pruned and recovered at 16 bits, not quantized."),
    ("uniform 8-bit", "Pruned, all units at 8 bits."),
    ("QPruner1", "Pruned, all units at 4 bits."),
    ("QPruner2", "Pruned, 8 bits where the mutual information with the output is highest."),
    ("sensitivity", "Pruned, 8 bits where 4 bits change the output most."),
    ("smallest", "Pruned most, with the lowest bits everywhere."),
    ("QPruner3, best of all", "The best trial of the whole search, by its expected score. QPruner3 where all are "
     "pruned alike."),
    ("sampler, random, seed_bits", "Where a trial's bits come from: proposed by the search's model, drawn, or given."),
)  # fmt: skip


# --- tables ------------------------------------------------------------------------------------------------------


def methods(points: Sequence[Point], members: Sequence[Point]) -> list[tuple[str, Point]]:
    """Return the rows of the table of methods: references, QPruner1 and 2, then QPruner3.

    QPruner3 is the best vector that the search as a whole found (paper section 4), whichever step proposed it.
    """
    rows = [(labels.method(name), point) for name in _ORDER for point in points if point.method == name]
    if members:
        alike = len({member.ratio for member in members}) == 1
        rows.append((labels.method(labels.QPRUNER3 if alike else "best"), pareto.best(members)))
    return rows


def budgets(members: Sequence[Point], objective: str) -> Table:
    """Return what to choose at a handful of memory budgets: of the members that fit the best by its expected score.

    Args:
        members: The front, lowest memory first.
        objective: What they were judged by.
    """
    factor, _ = labels.scale(objective)
    digits = 1 if factor == 100 else 3
    memories = [member.memory for member in members]
    steps = [memories[0] + (memories[-1] - memories[0]) * step / (_BUDGETS - 1) for step in range(_BUDGETS)]
    body: list[list[Cell]] = []
    for budget in dict.fromkeys(steps):
        chosen = pareto.best([member for member in members if member.memory <= budget])
        expected = chosen.score if chosen.expected is None else chosen.expected
        body.append([f"{budget / GIB:.3f}", labels.number(chosen), f"{factor * expected:.{digits}f}", *_costs(chosen)])
    columns = ["budget, GiB", "trial", f"{labels.short(objective)}, expected", *_COSTS]
    return Table("What to choose at a memory budget", columns, body)


def method_table(rows: Sequence[tuple[str, Point]]) -> Table:
    """Return the table of methods: mean accuracy in per cent, log-probabilities in nats, peak memory."""
    columns = ["method", "trial", "accuracy, %", "gold answer, nats", "response, nats", *_COSTS]
    body: list[list[Cell]] = []
    for label, point in rows:
        metrics = point.metrics
        body.append(
            [
                label,
                "-" if point.reference else labels.number(point),
                tables.percent(metrics["accuracy"], metrics["accuracy_stderr"]),
                tables.figure(metrics["gold_logprob"], metrics["gold_logprob_stderr"]),
                tables.figure(metrics["response_logprob"], metrics["response_logprob_stderr"]),
                *_costs(point),
            ]
        )
    return Table("Methods", columns, body)


def benchmark_table(rows: Sequence[tuple[str, Point]], tasks: Sequence[str]) -> Table:
    """Return the methods' accuracies in each benchmark, in per cent."""
    body: list[list[Cell]] = [
        [label, *(tables.percent(point.metrics[task], point.metrics[f"{task}_stderr"]) for task in tasks)]
        for label, point in rows
    ]
    return Table("Accuracy in each benchmark, %", ["method", *map(labels.task, tasks)], body)


def front_table(members: Sequence[Point], objective: str, title: str = "Pareto front: lowest memory first") -> Table:
    """Return a table of points: score, what is expected of it, how probably it belongs on the front, and its cost.

    Args:
        members: The front, or any other points.
        objective: What they were judged by.
        title: Of the table.
    """
    factor, _ = labels.scale(objective)
    digits = 1 if factor == 100 else 3
    columns = ["trial", "method", labels.short(objective), "expected", "accuracy, %", "P(front)", *_COSTS]
    body: list[list[Cell]] = [
        [
            "-" if point.reference else labels.number(point),
            labels.method(point.method),
            tables.figure(point.score, labels.error(point), factor, digits),
            "-" if point.expected is None else f"{factor * point.expected:.{digits}f}",
            tables.percent(point.metrics["accuracy"], point.metrics["accuracy_stderr"]),
            "-" if point.probability is None else f"{point.probability:.2f}",
            *_costs(point),
        ]
        for point in members
    ]
    return Table(title, columns, body)


_COSTS = ("training, GiB", "inference, MiB", "pruned, %", "bits")


def _costs(point: Point) -> list[Cell]:
    training, inference = (point.metrics.get(key) for key in pareto.PEAKS.values())
    return [
        "-" if training is None else f"{training / GIB:.3f}",
        "-" if inference is None else f"{inference / MIB:.0f}",
        f"{100 * point.ratio:g}",
        bits.summary(point.bits),
    ]


def bars_of(rows: Sequence[tuple[str, Point]], tasks: Sequence[str]) -> list[Bars]:
    """Return figure 1's bars from the table of methods: 16-bit LoRA, uniform 4-bit, and mixed bits by two rules."""
    wanted = {labels.method(name) for name in COMPARED}
    return [
        Bars(label, {task: (point.metrics[task], point.metrics[f"{task}_stderr"]) for task in tasks}, point.memory)
        for label, point in rows
        if label in wanted
    ]


# --- files -------------------------------------------------------------------------------------------------------


def write_front(
    points: Sequence[Point], members: Sequence[Point], objective: str, folder: Path, memory: str = "training"
) -> list[Path]:
    """Write all points as CSV and JSON (rows for DVC's plots), the front as PNG and as a page; return the paths.

    Args:
        points: All points of a study.
        members: Its front.
        objective: What they were judged by.
        folder: Where the files go.
        memory: The peak that counts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"pareto.{ending}" for ending in ("csv", "json", "png", "html")]
    rows = pareto.table(points, members)
    storage.write_text(paths[0], rows.to_csv(index=False))
    plain = rows.astype(object).where(rows.notna(), None)  # JSON knows no NaN
    storage.write_text(paths[1], json.dumps(plain.to_dict(orient="records"), indent=1))
    figures.front(points, members, objective, paths[2], memory)
    judged = {member.run_id: member for member in members}
    ordered = [*members, *(point for point in points if point.run_id not in judged)]
    shown = front_table(ordered, objective, "All trials and references")
    storage.write_text(paths[3], pages.front(ordered, members, objective, shown, memory))
    return paths


def write(facts: Sequence[str], sections: Sequence[Section], pictures: Mapping[str, Path], folder: Path) -> list[Path]:
    """Write the report as Markdown and as a page that holds its pictures; return the paths.

    Args:
        facts: Lines above the sections.
        sections: Its parts.
        pictures: Caption -> PNG in ``folder``.
        folder: Where the report goes.
    """
    lines = [f"# {TITLE}", "", *(f"- {fact}" for fact in facts), ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        if section.lines:
            lines += [*(f"- {line}" for line in section.lines), ""]
        if section.table:
            lines += [tables.markdown(section.table), ""]
        if section.code:
            lines += ["```sh", section.code, "```", ""]
    for caption, path in pictures.items():
        lines += [f"## {caption}", "", f"![{caption}]({path.name})", ""]
    lines += ["## Terms", "", *(f"- **{term}**: {meaning}" for term, meaning in GLOSSARY), ""]
    written = [folder / "report.md", folder / "report.html"]
    storage.write_text(written[0], "\n".join(lines))
    storage.write_text(written[1], pages.report(TITLE, facts, sections, pictures, GLOSSARY))
    return written
