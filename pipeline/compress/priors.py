"""What is known of a model's units before any trial, as stage ``importance`` measured it. It needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Priors:
    """What is known of the units before any trial.

    Attributes:
        units: Names of the units.
        mutual_information: Of each unit's block with the prediction, in nats.
        sensitivity: Fall of the divergence, in nats a token and to first order, when the unit goes from 4 to 8 bits.
        dense_gains: The same when it goes to 16 bits.
        divergence: Of the predictions with every unit at 4 bits from those of the unquantized pruned model.
        distance: Of the predictions with every unit at 4 bits from those of the model before pruning.
        tokens: Positions that the figures come from.
    """

    units: tuple[str, ...]
    mutual_information: tuple[float, ...]
    sensitivity: tuple[float, ...]
    dense_gains: tuple[float, ...]
    divergence: float
    distance: float
    tokens: int

    def gains(self, width: int) -> tuple[float, ...]:
        """Return what each unit gains by going from 4 bits to 8 or 16."""
        return self.sensitivity if width == 8 else self.dense_gains

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Priors:
        """Return the priors from what JSON made of them."""
        return Priors(
            units=tuple(values["units"]),
            mutual_information=tuple(values["mutual_information"]),
            sensitivity=tuple(values["sensitivity"]),
            dense_gains=tuple(values["dense_gains"]),
            divergence=values["divergence"],
            distance=values["distance"],
            tokens=values["tokens"],
        )
