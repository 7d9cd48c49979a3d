"""Adapters that start where the loss is: the low-rank part of a quantization error that the inputs see most of.

The closed form of CLoQ (arXiv 2501.18475, theorem 3.1) and EoRA (arXiv 2410.21271, algorithm 1).
"""

from __future__ import annotations

import torch

from pipeline.compress import quantize
from pipeline.compress.codes import damped
from pipeline.compress.quantize import Adapter


def root(gram: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """Return the lower triangular L with H = L L^T, in fp64.

    Args:
        gram: H, [in, in], finite; any multiple of X^T X. It may be singular.
        damping: Share of the median of H's positive diagonal that is added to its diagonal.
    """
    return torch.linalg.cholesky(damped(gram, damping))


def weighted(error: torch.Tensor, root: torch.Tensor, r: int, scale: float) -> Adapter:
    """Return the adapter that minimizes ||X (E - scale B A)^T|| over all of rank r.

    With H = X^T X = L L^T this norm is ||(E - scale B A) L||. So scale B A L is the best approximation of E L of rank
    r, and A is mapped back by L^-1.

    Args:
        error: E, [out, in]; for quantized weights W - Q.
        root: L, [in, in]; the product with E is computed in its type.
        r: Rank.
        scale: Factor of B A.
    """
    seen = quantize.low_rank((error.to(root.dtype) @ root).float(), r, scale)
    a = torch.linalg.solve_triangular(root.double(), seen.a.double(), upper=False, left=False)
    return _balanced(a, seen.b.double())


def _balanced(a: torch.Tensor, b: torch.Tensor) -> Adapter:
    """Return the same product B A with its singular values shared evenly, as in ``quantize.low_rank``.

    Both matrices then train at like rates, whatever the size of the inputs.
    """
    left, upper = torch.linalg.qr(b)
    right, lower = torch.linalg.qr(a.T)
    u, s, vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    share = s.sqrt()
    whole_a, whole_b = (share[:, None] * vh) @ right.T, left @ u * share
    missing = len(a) - len(share)
    return Adapter(
        torch.nn.functional.pad(whole_a, (0, 0, 0, missing)).float().contiguous(),
        torch.nn.functional.pad(whole_b, (0, missing)).float().contiguous(),
    )
