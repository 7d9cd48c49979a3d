"""How many trials does a sampler need? Samplers replayed on a landscape of quality, with the noise of a trial.

    python -m benchmarks.samplers [folder of a recorded landscape] [seeds=20] [trials=50] [noise=0.01]
        [objective=response_logprob] [told=OBJECTIVE] [memory=training] [ratios=0.2,...] [max_8bit_fraction=1.0]
        [units=30] [arms=a,b,...] [out=reports] [workers=cores]

Without a folder: a synthetic landscape of 30 blocks, made like the measured one (additive gains, small interactions) at
four pruning ratios; with ``ratios=0.2`` that of one ratio, at most a quarter of the blocks raised. With one (``python
-m benchmarks.record`` writes it): a smooth model fitted on its table, which knows every vector. ``ratios`` keeps some
of its ratios, ``max_8bit_fraction`` limits the share of raised units.
Writes ``reports/samplers.csv`` and ``reports/samplers.png``: the hypervolume of the tried vectors' true qualities,
as a share of the best known, after each trial, with quartiles over the seeds. ``told``: the search raises another
objective of the landscape than the one it is judged by. Arms of the same landscape that a former call left there are
kept: slow ones can be replayed apart.

An arm is ``sampler:prior``, such as ``ours:good``. ``ours:good:1`` has one random vector at its start; else it has none
(the default of the search), three where the landscape has one ratio. ``ours:good@0.2`` searches this ratio alone, and
is judged by the best known of all ratios. ``ours:good*4`` tries four vectors side by side: while it suggests the next
one, three are tried that it does not know the quality of; the oldest of them ends first.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks import landscapes
from benchmarks.contenders import LABELS, SAMPLERS, SIDE_BY_SIDE, quiet
from benchmarks.landscapes import Landscape
from pipeline.bits import Vector
from pipeline.results import style
from pipeline.search.history import seeds
from pipeline.search.surrogate import Observation

COLUMNS = ("landscape", "arm", "seed", "trial", "hypervolume", "longest_ask_s")
PRIORS = {
    "good": "",
    "none": "no priors",
    "shuffled": "shuffled priors",
    "reversed": "reversed priors",
}
_ARM = re.compile(r"(\w+):(\w+)(?::(\d+))?(?:@(0(?:\.\d+)?))?(?:\*([1-9]\d*))?")


@dataclass(frozen=True)
class Arm:
    """A sampler and how it begins.

    Attributes:
        sampler: One of ``contenders.SAMPLERS``.
        prior: What it is told: one of ``PRIORS``.
        starts: Random vectors at its start; None: as many as the landscape suggests.
        ratio: The only one that it searches; None: all.
        workers: How many vectors are tried side by side.
    """

    sampler: str
    prior: str
    starts: int | None = None
    ratio: float | None = None
    workers: int = 1

    @staticmethod
    def parse(text: str) -> Arm:
        """Return the arm of a text such as ``ours:good:1@0.2*4``.

        Raises:
            ValueError: It is none.
        """
        parts = _ARM.fullmatch(text)
        if parts is None or parts[1] not in SAMPLERS or parts[2] not in PRIORS:
            raise ValueError(
                f"arm {text!r}: write sampler:prior[:random starts][@ratio][*side by side], sampler one of "
                f"{', '.join(SAMPLERS)}, prior one of {', '.join(PRIORS)}"
            )
        starts, ratio, workers = parts[3], parts[4], int(parts[5] or 1)
        if workers > 1 and parts[1] not in SIDE_BY_SIDE:
            raise ValueError(f"arm {text!r}: only {', '.join(SIDE_BY_SIDE)} know what is tried now")
        numbers = (None if starts is None else int(starts), None if ratio is None else float(ratio))
        return Arm(parts[1], parts[2], *numbers, workers)

    @property
    def label(self) -> str:
        """Return what readers call it, such as ``this project, no priors, 1 random start, 20 % pruned alone``."""
        parts = [LABELS[self.sampler], PRIORS[self.prior]]
        if self.starts is not None:
            parts.append(f"{self.starts} random start{'' if self.starts == 1 else 's'}")
        if self.ratio is not None:
            parts.append(f"{100 * self.ratio:g} % pruned alone")
        if self.workers > 1:
            parts.append(f"{self.workers} side by side")
        return ", ".join(filter(None, parts))


def arms(landscape: Landscape) -> list[str]:
    """Return the arms that are replayed if none are named."""
    ratios = landscape.spaces.ratios
    own = ["ours:good", "ours:none", "ours:shuffled", "ours:reversed"]
    others = ["gp:good", "gp:none", "tpe:good", "nsga2:good", "random:good"]
    if len(ratios) == 1:
        return [own[0], "ours:good:1", *own[1:], *others]
    return [*own, *others, *(f"ours:good@{ratio:g}" for ratio in ratios)]


def replay(
    landscape: Landscape, arm: str, seed: int, trials: int, told: Landscape | None = None
) -> tuple[list[float], float]:
    """Run one search; return the hypervolume after each trial and the longest suggestion in seconds.

    Every arm starts as the search does (``history.seeds``), but with what no prior says left out: QPruner2 without
    mutual information, the allocation by sensitivity without sensitivities.

    Args:
        landscape: What is searched.
        arm: As ``Arm.parse`` reads it.
        seed: Of the sampler and the noise.
        trials: Trials to run.
        told: The qualities that the search sees, if they are others.
    """
    told = told or landscape
    quiet()
    chosen = Arm.parse(arm)
    searched = landscape if chosen.ratio is None else landscape.only([chosen.ratio])
    priors = searched.told(chosen.prior, seed)
    ask = SAMPLERS[chosen.sampler](searched.spaces, priors, seed)
    noise = np.random.default_rng(seed)
    queue = _queue(searched, chosen, seed, 3 if len(landscape.spaces.at) == 1 else 0)
    past: list[Observation] = []
    pending: list[Vector] = []
    curve, slowest = [], 0.0
    while len(past) < trials:
        while len(pending) < chosen.workers and len(past) + len(pending) < trials:
            start = time.perf_counter()
            vector = queue.pop(0) if queue else ask(past, pending)
            slowest = max(slowest, time.perf_counter() - start)
            if vector is None:
                break
            if vector not in {*(seen.vector for seen in past), *pending}:
                pending.append(vector)
        if not pending:
            break
        vector = pending.pop(0)
        past.append(Observation(vector, told.quality_of(vector) + noise.normal(0, told.noise), told.stderr))
        curve.append(landscape.hypervolume([seen.vector for seen in past]))
    return curve + [curve[-1]] * (trials - len(curve)), slowest


def _queue(landscape: Landscape, arm: Arm, seed: int, starts: int) -> list[Vector]:
    """Return what is tried before the sampler."""
    priors = landscape.told(arm.prior, seed)
    starts = starts if arm.starts is None else arm.starts
    unknown = {"sensitivity"} if arm.prior == "none" else set()
    if not any(any(prior.mutual_information) for prior in priors.values()):
        unknown.add("qpruner2")
    candidates = seeds(landscape.spaces, priors, (), starts, random.Random(seed))
    return [candidate.vector for candidate in candidates if candidate.method not in unknown]


def quartiles(rows: pd.DataFrame) -> pd.DataFrame:
    """Return arm, trial and the quartiles over the seeds."""
    grouped = rows.groupby(["arm", "trial"], sort=False)["hypervolume"]
    return grouped.quantile([0.25, 0.5, 0.75]).unstack().reset_index()


def label(arm: str) -> str:
    """Return what readers call an arm; what is none stays."""
    return Arm.parse(arm).label if _ARM.fullmatch(arm) else arm


def picture(rows: pd.DataFrame, about: str, path: Path) -> None:
    """Draw the median of each arm with its quartiles."""
    with style.picture(path, (8, 5)) as (_, grid):
        axes = grid[0, 0]
        lines = itertools.cycle(itertools.product(("-", "--"), style.SERIES))
        for (arm, part), (dash, color) in zip(quartiles(rows).groupby("arm", sort=False), lines, strict=False):
            width = 2 if str(arm).startswith("ours") else 1
            axes.plot(part["trial"], part[0.5], label=label(str(arm)), lw=width, ls=dash, color=color)
            axes.fill_between(part["trial"], part[0.25], part[0.75], color=color, alpha=0.12, lw=0)
        axes.axhline(0.95, color=style.INK, lw=0.6, ls=":")
        axes.set_xlabel("trial")
        axes.set_ylabel("hypervolume of true qualities / best known")
        axes.set_title(about)
        axes.legend()


def report(rows: pd.DataFrame, trials: int) -> str:
    """Return a Markdown table: median and quartiles at some trials, the first trial at 95 %, the longest suggestion."""
    shown = [count for count in (10, 12, 20, 30, 50) if count <= trials] or [trials]
    lines = ["| arm | seeds | " + " | ".join(f"at {n}" for n in shown) + " | 95 % at trial | longest ask, s |"]
    lines.append("|---" * (len(shown) + 4) + "|")
    longest = rows.groupby("arm")["longest_ask_s"].max()
    seeds_of = rows.groupby("arm")["seed"].nunique()
    for arm, part in quartiles(rows).groupby("arm", sort=False):
        at = part.set_index("trial")
        cells = [f"{at.loc[n, 0.5]:.3f} ({at.loc[n, 0.25]:.3f} to {at.loc[n, 0.75]:.3f})" for n in shown]
        reached = at.index[at[0.5] >= 0.95]
        first = str(reached[0]) if len(reached) else f"not in {trials}"
        lines.append(
            f"| {label(str(arm))} | {seeds_of[arm]} | " + " | ".join(cells) + f" | {first} | {longest[arm]:.2f} |"
        )
    return "\n".join(lines)


def main(
    landscape: Landscape,
    count: int,
    trials: int,
    chosen: Sequence[str],
    out: Path,
    workers: int,
    told: Landscape | None = None,
) -> None:
    """Replay every arm on every seed; write and print the comparison after each arm."""
    about = landscape.about + (f"; told {told.about}" if told else "")
    print(about, flush=True)
    best, path = landscape.best(), out / "samplers.csv"
    out.mkdir(exist_ok=True)
    table = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=list(COLUMNS))
    table = table[(table["landscape"] == about) & ~table["arm"].isin(chosen)]
    with ProcessPoolExecutor(workers) as pool:
        each = pool.map if workers > 1 else map
        for arm in chosen:
            rows = []
            searches = each(replay, *zip(*[(landscape, arm, seed, trials, told) for seed in range(count)], strict=True))
            for seed, (curve, slowest) in enumerate(searches):
                rows += [(about, arm, seed, n, value / best, slowest) for n, value in enumerate(curve, 1)]
            parts = [table, pd.DataFrame(rows, columns=list(COLUMNS))]
            table = pd.concat([part for part in parts if len(part)], ignore_index=True)
            table.to_csv(path, index=False)
            print(report(table, trials).splitlines()[-1], flush=True)
    picture(table, about, out / "samplers.png")
    print(report(table, trials))


def landscape_of(place: str | None, given: dict[str, str], objective: str | None) -> Landscape:
    """Return the landscape that the command line names.

    Args:
        place: Folder of a recorded one; None: a synthetic one.
        given: The options.
        objective: The quality; None: the default one.
    """
    ratios = [float(ratio) for ratio in given["ratios"].split(",")] if "ratios" in given else []
    noise, units = float(given.get("noise", 0.01)), int(given.get("units", 30))
    if place is None and ratios == [landscapes.ALONE]:
        return landscapes.synthetic(noise, units=units)
    if place is None:
        landscape = landscapes.joint(noise, units=units)
    else:
        memory = given.get("memory", "training")
        landscape = landscapes.recorded(Path(place), objective or "response_logprob", memory)
    if ratios:
        landscape = landscape.only(ratios)
    return landscape.within(float(given["max_8bit_fraction"])) if "max_8bit_fraction" in given else landscape


if __name__ == "__main__":
    given = dict(item.split("=") for item in sys.argv[1:] if "=" in item)
    place = next((item for item in sys.argv[1:] if "=" not in item), None)
    searched = landscape_of(place, given, given.get("objective"))
    main(
        searched,
        int(given.get("seeds", 20)),
        int(given.get("trials", 50)),
        given["arms"].split(",") if "arms" in given else arms(searched),
        Path(given.get("out", "reports")),
        int(given.get("workers", os.cpu_count() or 1)),
        landscape_of(place, given, given["told"]) if "told" in given else None,
    )
