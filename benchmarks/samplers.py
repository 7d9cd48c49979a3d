"""How many trials does a sampler need? Samplers replayed on a landscape of quality, with the noise of a trial.

    python -m benchmarks.samplers [folder of a recorded landscape] [seeds=20] [trials=50] [noise=0.01]
        [objective=gold_logprob] [told=OBJECTIVE] [units=30] [arms=a,b,...]
        [out=reports] [workers=cores]

Without a folder: a synthetic landscape of 30 blocks, made like the measured one (additive gains, small interactions).
With one (``python -m benchmarks.record`` writes it): a smooth model fitted on its table, which knows every vector.
Writes ``reports/samplers.csv`` and ``reports/samplers.png``: the hypervolume of the tried vectors' true qualities,
as a share of the best known, after each trial, with quartiles over the seeds. ``told``: the search raises another
objective of the landscape than the one it is judged by. Arms of the same landscape that a former
call left there are kept: slow ones can be replayed apart.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import CategoricalDistribution
from optuna.trial import create_trial

from pipeline.compress.importance import Priors
from pipeline.results import style
from pipeline.search import pareto, surrogate
from pipeline.search.allocate import Bits, Space, raised_of
from pipeline.search.history import seeds
from pipeline.search.surrogate import Observation

GAINS = {29: 59.1, 11: 56.6, 0: 25.0, 16: 14.7, 15: 14.1, 28: 13.9, 2: 13.5, 7: 13.3, 4: 11.7, 23: 11.3, 13: 10.6}
DISTRIBUTION = CategoricalDistribution([4, 8])


@dataclass(frozen=True)
class Landscape:
    """A quality that is known everywhere, and what a search is told of it.

    Attributes:
        space: What is feasible.
        additive: Gain of each unit, [units].
        pairs: Gain of each pair of units raised together, [units, units], upper triangle.
        noise: Standard deviation of a trial's quality around the true one.
        stderr: Standard error that a trial reports.
        sensitivity: What stage ``importance`` measured, [units].
        about: Where it comes from and how well it fits.
    """

    space: Space
    additive: np.ndarray
    pairs: np.ndarray
    noise: float
    stderr: float
    sensitivity: tuple[float, ...]
    about: str

    def quality(self, raised: np.ndarray) -> np.ndarray:
        """Return the true qualities, [vectors, units] -> [vectors]."""
        ups = raised.astype(float)
        return ups @ self.additive + ((ups @ self.pairs) * ups).sum(axis=1)

    def hypervolume(self, tried: Sequence[Bits]) -> float:
        """Return the area that the true qualities of some vectors dominate, from no gain, a tenth beyond the top."""
        raised = raised_of(list(tried))
        memories = self.space.memories(raised)
        points = zip(self.quality(raised).tolist(), memories.tolist(), strict=True)
        return pareto.hypervolume(points, 0.0, self.space.base + self.space.reach)

    def best(self) -> float:
        """Return the hypervolume of the best vectors known: of each size by climbing, then of all their neighbours."""
        found: set[Bits] = {(4,) * self.space.units}
        for size in range(1, self.space.max_eights + 1):
            smaller = replace(self.space, max_eights=size)
            start = raised_of([smaller.allocate(self.additive.tolist())])[0]
            top = surrogate.climb(self.quality, smaller, start)[0]
            downs, ups = np.flatnonzero(top), np.flatnonzero(~top)
            for down, up in itertools.product(downs, ups):
                other = top.copy()
                other[[down, up]] = False, True
                found.add(tuple(8 if one else 4 for one in other))
            found.add(tuple(8 if one else 4 for one in top))
        return self.hypervolume(sorted(found))


def synthetic(noise: float, seed: int = 0, units: int = 30) -> Landscape:
    """Return a landscape with the measured gains of SmolLM2's 30 blocks, or gains drawn alike for other sizes."""
    generator = np.random.default_rng(seed)
    gains = generator.uniform(1, 9, units)
    named = GAINS if units == 30 else dict(enumerate(20 * generator.pareto(1.5, units // 3)))
    for unit, gain in named.items():
        gains[unit] = gain
    gains = gains / 1000
    # The seven best blocks gain 10 % less together than the sum of their gains alone.
    pairs = np.triu(np.sqrt(np.outer(gains, gains)) * generator.normal(-0.04, 0.1, (units, units)), 1)
    sensitivity = gains * generator.lognormal(0, 0.3, units) + generator.normal(0, 0.003, units)
    deltas = tuple(int(one) for one in generator.uniform(3.0, 4.0, units) * 2**20)
    space = Space(2**30, deltas, units // 4, None)
    about = f"synthetic, {units} units, noise {noise}"
    return Landscape(space, gains, pairs, noise, noise, tuple(sensitivity.tolist()), about)


def recorded(folder: Path, objective: str = "gold_logprob") -> Landscape:
    """Fit additive gains and interactions of pairs to a recorded table by ridge regression.

    The fit's held-out error, which holds both the table's noise and what the model misses, is the replay's noise.
    """
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, KFold, cross_val_predict

    table = pd.read_csv(folder / "table.csv", dtype={"bits": str})
    table = table[table["steps"] == table["steps"].min()].assign(response_logprob=lambda rows: -rows["validation_loss"])
    facts = json.loads((folder / "landscape.json").read_text())
    raised = raised_of([tuple(int(digit) for digit in text) for text in table["bits"]]).astype(float)
    units = raised.shape[1]
    first, second = np.triu_indices(units, 1)

    def features(weight: float) -> np.ndarray:
        return np.hstack([raised, weight * raised[:, first] * raised[:, second]])

    values = table[objective].to_numpy()
    folds = KFold(10, shuffle=True, random_state=0)
    options = []
    for weight in (1e-3, 0.1, 0.3, 1.0):  # how much harder a pair is shrunk than a unit
        grid = GridSearchCV(Ridge(), {"alpha": np.logspace(-4, 2, 13)}, cv=folds, scoring="r2")
        grid.fit(features(weight), values)
        options.append((grid.best_score_, weight, grid.best_estimator_))
    _, weight, model = max(options, key=lambda one: one[0])
    held_out = values - cross_val_predict(model, features(weight), values, cv=folds)
    fit = 1 - held_out.var() / values.var()
    pairs = np.zeros((units, units))
    pairs[first, second] = weight * model.coef_[units:]
    return Landscape(
        space=Space(facts["base"], tuple(facts["deltas"]), units // 4, None),
        additive=model.coef_[:units],
        pairs=pairs,
        noise=float(held_out.std()),
        stderr=float(table[f"{objective}_stderr"].mean() if f"{objective}_stderr" in table else held_out.std()),
        sensitivity=tuple(facts["sensitivity"]),
        about=f"{folder.name}, {objective}: {len(table)} rows, R^2 {fit:.3f} on held-out rows, "
        f"their error {held_out.std():.4f}",
    )


def priors_of(landscape: Landscape, kind: str, seed: int) -> Priors:
    """Return what the search is told: the ``good`` sensitivity, ``none``, or a ``shuffled`` or ``reversed`` one."""
    true = list(landscape.sensitivity)
    if kind == "none":
        true = [0.0] * len(true)
    elif kind == "shuffled":
        random.Random(seed).shuffle(true)
    elif kind == "reversed":
        ranks = np.argsort(np.argsort(true))
        true = np.sort(true)[::-1][ranks].tolist()
    units = tuple(map(str, range(len(true))))
    return Priors(units, (0.0,) * len(true), tuple(true), 0.0, 1)


Ask = Callable[[Sequence[Observation]], Bits | None]


def ours(space: Space, priors: Priors, seed: int) -> Ask:
    """Return this project's sampler."""

    def ask(past: Sequence[Observation]) -> Bits | None:
        tried = {one.bits for one in past}
        return surrogate.propose(past, space, priors.sensitivity, tried, random.Random(seed + len(past)))

    return ask


def drawn(space: Space, priors: Priors, seed: int) -> Ask:
    """Return random feasible vectors."""
    generator = random.Random(seed)
    return lambda past: space.unseen({one.bits for one in past}, generator)


def gp(space: Space, priors: Priors, seed: int) -> Ask:
    """Return Optuna's Gaussian process with the limit as a constraint; what exceeds it gives up its weakest units."""

    def ask(past: Sequence[Observation]) -> Bits | None:
        sampler = optuna.samplers.GPSampler(seed=seed + len(past), n_startup_trials=1)
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        distributions = {f"bits_{index}": DISTRIBUTION for index in range(space.units)}
        for one in past:
            trial = create_trial(
                params=dict(zip(distributions, one.bits, strict=True)),
                distributions=distributions,
                values=[one.score, space.memory(one.bits) / 2**20],
            )
            trial.set_constraint("eights", one.bits.count(8) - space.max_eights)
            study.add_trial(trial)
        asked = study.ask(distributions)
        return _brought_back(tuple(asked.params.values()), past, space, priors, seed)

    return ask


def optuna_ask(make: Callable[[int], optuna.samplers.BaseSampler]) -> Callable[[Space, Priors, int], Ask]:
    """Return a sampler of Optuna's that is told the values of what its proposals are brought back to."""

    def arm(space: Space, priors: Priors, seed: int) -> Ask:
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=make(seed))
        distributions = {f"bits_{index}": DISTRIBUTION for index in range(space.units)}
        waiting: list[optuna.Trial] = []

        def ask(past: Sequence[Observation]) -> Bits | None:
            values = [past[-1].score, space.memory(past[-1].bits)]
            if waiting:
                study.tell(waiting.pop(), values)
            else:
                for one in past:
                    params = dict(zip(distributions, one.bits, strict=True))
                    values = [one.score, space.memory(one.bits)]
                    study.add_trial(create_trial(params=params, distributions=distributions, values=values))
            waiting.append(study.ask(distributions))
            return _brought_back(tuple(waiting[0].params.values()), past, space, priors, seed)

        return ask

    return arm


def _brought_back(bits: Bits, past: Sequence[Observation], space: Space, priors: Priors, seed: int) -> Bits | None:
    generator = random.Random(seed + len(past))
    weights = [value + 1e-9 * generator.random() for value in priors.sensitivity]
    return space.unseen({one.bits for one in past}, generator, near=space.repair(bits, weights))


SAMPLERS = {
    "ours": ours,
    "gp": gp,
    "tpe": optuna_ask(lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=5, multivariate=True)),
    "nsga2": optuna_ask(lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=10)),
    "random": drawn,
}
ARMS = (
    *("ours:good", "ours:good:1", "ours:none", "ours:shuffled", "ours:reversed", "gp:good", "gp:none"),
    *("tpe:good", "nsga2:good", "random:good"),
)


COLUMNS = ("landscape", "arm", "seed", "trial", "hypervolume", "longest_ask_s")


def replay(
    landscape: Landscape, arm: str, seed: int, trials: int, told: Landscape | None = None
) -> tuple[list[float], float]:
    """Run one search; return the hypervolume after each trial and the longest suggestion in seconds.

    Every arm starts as the search does: all at 4 bits, the sensitivity allocation if a prior is given, random vectors.

    Args:
        landscape: What is searched.
        arm: ``sampler:prior``, or ``sampler:prior:n`` with n random vectors at the start instead of 3.
        seed: Of the sampler and the noise.
        trials: Trials to run.
        told: The qualities that the search sees, if they are others.
    """
    told = told or landscape
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    name, kind, *starts = arm.split(":")
    priors = priors_of(landscape, kind, seed)
    ask = SAMPLERS[name](landscape.space, priors, seed)
    generator = random.Random(seed)
    noise = np.random.default_rng(seed)
    queue = [
        one.bits
        for one in seeds(landscape.space, priors, (), int(starts[0]) if starts else 3, generator)
        if not (one.method == "qpruner2" or (kind == "none" and one.method == "sensitivity"))
    ]
    past: list[Observation] = []
    curve, slowest = [], 0.0
    while len(past) < trials:
        start = time.perf_counter()
        bits = queue.pop(0) if queue else ask(past)
        slowest = max(slowest, time.perf_counter() - start)
        if bits is None:
            break
        if bits in {one.bits for one in past}:
            continue
        true = float(told.quality(raised_of([bits]))[0])
        past.append(Observation(bits, true + noise.normal(0, told.noise), told.stderr))
        curve.append(landscape.hypervolume([one.bits for one in past]))
    return curve + [curve[-1]] * (trials - len(curve)), slowest


def quartiles(rows: pd.DataFrame) -> pd.DataFrame:
    """Return arm, trial and the quartiles over the seeds."""
    grouped = rows.groupby(["arm", "trial"], sort=False)["hypervolume"]
    return grouped.quantile([0.25, 0.5, 0.75]).unstack().reset_index()


def label(arm: str) -> str:
    """Return what readers call an arm, such as ``this project, no sensitivities, 1 random start``."""
    name, _, rest = arm.partition(":")
    if name not in _SAMPLER_LABELS:
        return arm
    prior, *starts = rest.split(":")
    parts = [_SAMPLER_LABELS[name], _PRIOR_LABELS[prior]]
    if starts:
        parts.append(f"{starts[0]} random start{'' if starts[0] == '1' else 's'}")
    return ", ".join(filter(None, parts))


_SAMPLER_LABELS = {
    "ours": "this project",
    "gp": "Gaussian process (Optuna)",
    "tpe": "TPE (Optuna)",
    "nsga2": "NSGA-II (Optuna)",
    "random": "random search",
}
_PRIOR_LABELS = {
    "good": "",
    "none": "no sensitivities",
    "shuffled": "shuffled sensitivities",
    "reversed": "reversed sensitivities",
}


def picture(rows: pd.DataFrame, about: str, path: Path) -> None:
    """Draw the median of each arm with its quartiles."""
    with style.picture(path, (8, 5)) as (_, grid):
        axes = grid[0, 0]
        for (arm, part), color in zip(
            quartiles(rows).groupby("arm", sort=False), itertools.cycle(style.SERIES), strict=False
        ):
            width = 2 if str(arm).startswith("ours") else 1
            axes.plot(part["trial"], part[0.5], label=label(str(arm)), lw=width, color=color)
            axes.fill_between(part["trial"], part[0.25], part[0.75], color=color, alpha=0.12, lw=0)
        axes.axhline(0.95, color=style.INK, lw=0.6, ls=":")
        axes.set_xlabel("trial")
        axes.set_ylabel("hypervolume of true qualities / best known")
        axes.set_title(about)
        axes.legend()


def report(rows: pd.DataFrame, trials: int) -> str:
    """Return a Markdown table: median and quartiles at some trials, the first trial at 95 %, the longest suggestion."""
    shown = [count for count in (10, 12, 20, 30, 50) if count <= trials]
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
    arms: Sequence[str],
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
    table = table[(table["landscape"] == about) & ~table["arm"].isin(arms)]
    with ProcessPoolExecutor(workers) as pool:
        each = pool.map if workers > 1 else map
        for arm in arms:
            rows = []
            found = each(replay, *zip(*[(landscape, arm, seed, trials, told) for seed in range(count)], strict=True))
            for seed, (curve, slowest) in enumerate(found):
                rows += [(about, arm, seed, n, value / best, slowest) for n, value in enumerate(curve, 1)]
            parts = [table, pd.DataFrame(rows, columns=list(COLUMNS))]
            table = pd.concat([part for part in parts if len(part)], ignore_index=True)
            table.to_csv(path, index=False)
            print(report(table, trials).splitlines()[-1], flush=True)
    picture(table, about, out / "samplers.png")
    print(report(table, trials))


if __name__ == "__main__":
    given = dict(item.split("=") for item in sys.argv[1:] if "=" in item)
    places = [item for item in sys.argv[1:] if "=" not in item]
    main(
        recorded(Path(places[0]), given.get("objective", "gold_logprob"))
        if places
        else synthetic(float(given.get("noise", 0.01)), units=int(given.get("units", 30))),
        int(given.get("seeds", 20)),
        int(given.get("trials", 50)),
        given["arms"].split(",") if "arms" in given else ARMS,
        Path(given.get("out", "reports")),
        int(given.get("workers", os.cpu_count() or 1)),
        recorded(Path(places[0]), given["told"]) if "told" in given else None,
    )
