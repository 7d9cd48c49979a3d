"""Samplers under one interface: ours, Optuna's and random vectors. Each suggests a feasible vector that is new."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import optuna
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState, create_trial

from pipeline.bits import Vector
from pipeline.compress.priors import Priors
from pipeline.search import acquire
from pipeline.search.allocate import Space, Spaces
from pipeline.search.search import beliefs
from pipeline.search.study import options_of, params_of, vector_of
from pipeline.search.surrogate import Observation


class Ask(Protocol):
    """Suggests a feasible vector that is new, from what was tried and what is tried now."""

    def __call__(self, past: Sequence[Observation], pending: Sequence[Vector] = (), /) -> Vector | None:
        """Return it; None if all were tried."""


Told = Mapping[float, Priors]  # ratio -> what the sampler knows of its units
MIB = 2**20


def quiet() -> None:
    """Silence Optuna: what is experimental in it, and a line for each trial."""
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def ours(spaces: Spaces, priors: Told, seed: int) -> Ask:
    """Return this project's sampler."""
    widths = next(iter(spaces.at.values())).widths
    believed = beliefs(priors, widths)

    def ask(past: Sequence[Observation], pending: Sequence[Vector] = ()) -> Vector | None:
        tried, generator = {seen.vector for seen in past} | set(pending), random.Random(seed + len(past) + len(pending))
        if not past:
            return spaces.unseen(tried, generator)
        return acquire.propose(past, spaces, believed, tried, generator, pending)

    return ask


def drawn(spaces: Spaces, priors: Told, seed: int) -> Ask:
    """Return random feasible vectors."""
    generator = random.Random(seed)
    return lambda past, pending=(): spaces.unseen({*(seen.vector for seen in past), *pending}, generator)


def gp(spaces: Spaces, priors: Told, seed: int) -> Ask:
    """Return Optuna's Gaussian process with the limits as a constraint; what exceeds them is brought back.

    What is tried now are running trials, which it takes into account in a way of its own.
    """
    distributions = parameters(spaces)

    def ask(past: Sequence[Observation], pending: Sequence[Vector] = ()) -> Vector | None:
        sampler = optuna.samplers.GPSampler(seed=seed + len(past), n_startup_trials=1)
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        for seen in past:
            trial = create_trial(
                params=params_of(seen.vector, distributions),
                distributions=distributions,
                values=[seen.score, spaces.memory(seen.vector) / MIB],
            )
            if any(map(binds, spaces.at.values())):
                trial.set_constraint("limits", excess(spaces.at[seen.vector.ratio], seen.vector))
            study.add_trial(trial)
        for vector in pending:
            params = params_of(vector, distributions)
            study.add_trial(create_trial(state=TrialState.RUNNING, params=params, distributions=distributions))
        return brought_back(vector_of(study.ask(distributions).params), past, spaces, priors, seed, pending)

    return ask


def of_optuna(make: Callable[[int], optuna.samplers.BaseSampler]) -> Callable[[Spaces, Told, int], Ask]:
    """Return a sampler of Optuna's that is told the values of what its proposals are brought back to."""

    def arm(spaces: Spaces, priors: Told, seed: int) -> Ask:
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=make(seed))
        distributions = parameters(spaces)
        waiting: list[optuna.Trial] = []

        def ask(past: Sequence[Observation], pending: Sequence[Vector] = ()) -> Vector | None:
            assert not pending, "one after another only"
            if waiting:
                study.tell(waiting.pop(), [past[-1].score, spaces.memory(past[-1].vector)])
            else:
                for seen in past:
                    params, values = params_of(seen.vector, distributions), [seen.score, spaces.memory(seen.vector)]
                    study.add_trial(create_trial(params=params, distributions=distributions, values=values))
            waiting.append(study.ask(distributions))
            return brought_back(vector_of(waiting[0].params), past, spaces, priors, seed)

        return ask

    return arm


def parameters(spaces: Spaces) -> dict[str, CategoricalDistribution]:
    """Return the parameters of Optuna's samplers: the ratio, then the bits of each unit."""
    widths = next(iter(spaces.at.values())).widths
    options = options_of(spaces.ratios, [str(unit) for unit in range(spaces.units)], widths)
    return {name: CategoricalDistribution(values) for name, values in options.items()}


def binds(space: Space) -> bool:
    """Return whether some bit vector exceeds the limits."""
    return space.max_raised < space.units or space.budget is not None or space.average_bits is not None


def excess(space: Space, vector: Vector) -> float:
    """Return by how much a vector exceeds that limit which it exceeds most, as a share; at most 0: it is feasible."""
    costs, most = space.limits
    return float(((space.hot(space.levels([vector.bits])) @ costs.T - most) / most.clip(1)).max())


def brought_back(
    vector: Vector,
    past: Sequence[Observation],
    spaces: Spaces,
    priors: Told,
    seed: int,
    pending: Sequence[Vector] = (),
) -> Vector | None:
    """Return the nearest feasible vector that was not tried, at the same ratio if there is one."""
    generator = random.Random(seed + len(past) + len(pending))
    space, tried = spaces.at[vector.ratio], {*(seen.vector for seen in past), *pending}
    weights = [gain + 1e-9 * generator.random() for gain in priors[vector.ratio].sensitivity]
    here = {other.bits for other in tried if other.ratio == vector.ratio}
    bits = space.unseen(here, generator, near=space.repair(vector.bits, weights))
    return spaces.unseen(tried, generator) if bits is None else Vector(vector.ratio, bits)


SAMPLERS = {
    "ours": ours,
    "gp": gp,
    "tpe": of_optuna(lambda seed: optuna.samplers.TPESampler(seed=seed, n_startup_trials=5, multivariate=True)),
    "nsga2": of_optuna(lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=10)),
    "random": drawn,
}
SIDE_BY_SIDE = ("ours", "gp", "random")  # those that know what is tried now
LABELS = {
    "ours": "this project",
    "gp": "Gaussian process (Optuna)",
    "tpe": "TPE (Optuna)",
    "nsga2": "NSGA-II (Optuna)",
    "random": "random search",
}
