"""Sequences that share a prefix as trees: grouped, packed into rows of few lengths, kept apart by a mask."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch

from pipeline.trial.setting import ROW

_LARGEST = 8 * ROW  # tokens of a tree; a mask has the square of it
PREFIX, PADDING = -1, -2  # branch of a prefix; tree of what fills a row up


@dataclass(frozen=True)
class Request:
    """One continuation to score: token ids of the whole sequence and where the continuation starts."""

    tokens: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Tree:
    """Requests that share their first ``prefix`` tokens; fed as that prefix and one branch a request."""

    requests: tuple[int, ...]
    prefix: int
    size: int


Row = list[Tree]  # trees that stand in one sequence
Wanted = tuple[int, int, int]  # request, index of a position among those that reach the head, token to predict there


def trees(requests: Sequence[Request]) -> list[Tree]:
    """Group neighbouring requests that share at least half of their contexts, up to ``_LARGEST`` tokens."""
    grouped: list[Tree] = []
    members: list[int] = []
    prefix = 0

    def size(prefix: int, members: Sequence[int]) -> int:
        return prefix + sum(len(requests[index].tokens) - 1 - prefix for index in members)

    def close() -> None:
        grouped.append(Tree(tuple(members), prefix, size(prefix, members)))

    for index, request in enumerate(requests):
        limit = len(request.tokens) - 1
        if members:
            shared = min(_common(requests[members[0]].tokens, request.tokens), limit, prefix)
            # Half of its own context, whatever the others share: a first token that all texts begin with is no kinship.
            if shared * 2 >= max(request.start, 1) and size(shared, [*members, index]) <= _LARGEST:
                members.append(index)
                prefix = shared
                continue
            close()
        members, prefix = [index], limit
    if members:
        close()
    return grouped


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    for position, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return position
    return min(len(first), len(second))


def batches(grouped: Sequence[Tree], batch_tokens: int) -> Iterator[tuple[int, list[Row]]]:
    """Yield (length, rows) of each forward pass: trees packed end to end into rows of few different lengths.

    Matrix kernels are generated for each shape they meet, so nearly all passes have the same one. Trees longer than
    ``ROW`` get rows of twice, four times ... that length.
    """
    open_rows: dict[int, list[tuple[int, Row]]] = {}
    for tree in sorted(grouped, key=lambda tree: -tree.size):
        length = ROW
        while length < tree.size:
            length *= 2
        rows = open_rows.setdefault(length, [])
        for place, (room, row) in enumerate(rows):  # first fit, longest first
            if tree.size <= room:
                rows[place] = (room - tree.size, [*row, tree])
                break
        else:
            rows.append((length - tree.size, [tree]))
    for length, rows in open_rows.items():
        count = max(batch_tokens // length, 1)
        for start in range(0, len(rows), count):
            yield length, [row for _, row in rows[start : start + count]]


@dataclass(frozen=True)
class Packed:
    """The tokens of one forward pass, and what is asked of it.

    Attributes:
        tokens: Token ids, [B, L].
        positions: Position ids, [B, L].
        owners: Tree of each token, [B, L]; ``PADDING`` where there is none.
        branches: Branch of each token within its tree, [B, L]; ``PREFIX`` for its prefix.
        places: (row, column) of the positions that reach the head.
        wanted: What they should predict, in the order of ``places``.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    owners: torch.Tensor
    branches: torch.Tensor
    places: list[tuple[int, int]]
    wanted: list[Wanted]


def pack(requests: Sequence[Request], length: int, rows: Sequence[Row]) -> Packed:
    """Lay trees out in rows: each as its prefix, then one branch a request."""
    shape = len(rows), length
    tokens, positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    owners = torch.full(shape, PADDING, dtype=torch.long)
    branches = torch.full(shape, PREFIX, dtype=torch.long)
    places: dict[tuple[int, int], int] = {}  # (row, column) -> its index
    wanted: list[Wanted] = []
    for row, trees_of_row in enumerate(rows):
        begin = 0
        for owner, tree in enumerate(trees_of_row):
            end = begin + tree.prefix
            tokens[row, begin:end] = torch.tensor(requests[tree.requests[0]].tokens[: tree.prefix])
            positions[row, begin:end] = torch.arange(tree.prefix)
            owners[row, begin : begin + tree.size] = owner
            for branch, index in enumerate(tree.requests):
                request = requests[index]
                rest = request.tokens[tree.prefix : -1]
                here = slice(end, end + len(rest))
                tokens[row, here] = torch.tensor(rest, dtype=torch.long)
                positions[row, here] = torch.arange(tree.prefix, tree.prefix + len(rest))
                branches[row, here] = branch
                for position in range(request.start - 1, len(request.tokens) - 1):
                    column = begin + position if position < tree.prefix else position - tree.prefix + end
                    place = places.setdefault((row, column), len(places))
                    wanted.append((index, place, request.tokens[position + 1]))
                end += len(rest)
            begin += tree.size
    wanted.sort(key=itemgetter(1))  # so that chunks of positions are chunks of this list
    return Packed(tokens, positions, owners, branches, list(places), wanted)


def tree_mask(owners: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
    """Return which earlier tokens each token sees: those of its tree that are in the prefix or in its own branch.

    Args:
        owners: Tree of each token, [B, L].
        branches: Branch of each token within its tree, ``PREFIX`` for its prefix, [B, L].

    Returns:
        Booleans, [B, L, L]; every token sees at least itself.
    """
    length = branches.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=branches.device).tril()
    near = (branches[:, :, None] == branches[:, None, :]) | (branches[:, None, :] == PREFIX)
    return earlier & near & (owners[:, :, None] == owners[:, None, :])


def within(positions: torch.Tensor, window: int) -> torch.Tensor:
    """Return which tokens of its tree each token sees through a sliding window.

    Args:
        positions: Position ids, [B, L].
        window: Tokens that are seen, the token itself among them.

    Returns:
        Booleans, [B, L, L].
    """
    return positions[:, :, None] - positions[:, None, :] < window


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a mask to add to attention scores, [B, 1, L, L]: plain attention would add a boolean one as 0 and 1."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)[:, None]
