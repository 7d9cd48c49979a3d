"""The search for bit vectors: the feasible space, the study and its journal, the sampler, the front."""

from pipeline.errors import UserError


class SearchError(UserError):
    """The search cannot start or go on: what is wrong and what to do."""
