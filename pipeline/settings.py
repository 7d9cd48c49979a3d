"""From sections of the params to the settings that algorithms take: fields of the same names."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, TypeVar

from pipeline.compress import structures
from pipeline.params import BlockRange, Prune, Section

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    S = TypeVar("S", bound=DataclassInstance)


def settings_of(kind: type[S], section: Section, **others: object) -> S:
    """Return settings made of a section's fields.

    Args:
        kind: The settings' dataclass.
        section: Has a field for each of its fields; further ones are left out.
        others: Fields that are not the section's, or not as it has them.
    """
    names = {field.name for field in fields(kind)} - others.keys()
    return kind(**{name: getattr(section, name) for name in names}, **others)


def pruning(section: Prune) -> structures.Settings:
    """Return how a model is pruned, by section ``prune``."""
    return settings_of(
        structures.Settings,
        section,
        ratio=section.ratio,
        attention_blocks=_span(section.attention_blocks),
        mlp_blocks=_span(section.mlp_blocks),
    )


def _span(blocks: BlockRange) -> structures.Span:
    return structures.Span(blocks.first, blocks.last)
