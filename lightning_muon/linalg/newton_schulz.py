"""Odd polynomials of the singular values of a stack, by matrix products alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Polynomials = Sequence[tuple[float, float, float]]


def newton_schulz(x: Tensor, polynomials: Polynomials) -> Tensor:
    r"""Apply :math:`p(\sigma) = a\sigma + b\sigma^3 + c\sigma^5` in turn: X <- aX + (b XX^T + c (XX^T)^2) X.

    Args:
        x: contiguous (B, m, n); overwritten. The Gram matrix is taken on the shorter side.
        polynomials: (a, b, c) in order.

    Memory beside ``x``: as much again, and a matrix of the shorter side.
    """
    tall, side = x.shape[1] > x.shape[2], min(x.shape[1:])
    spare = torch.empty_like(x)
    polynomial = x.new_empty(x.shape[0], side, side)
    for a, b, c in polynomials:
        # The Gram matrix is used up before `spare` is written, unless it is the polynomial itself.
        gram = polynomial if c == 0.0 else spare.view(-1)[: polynomial.numel()].view_as(polynomial)
        torch.bmm(*((x.mT, x) if tall else (x, x.mT)), out=gram)
        if c == 0.0:
            torch.baddbmm(x, *((x, gram) if tall else (gram, x)), beta=a, alpha=b, out=spare)
        else:
            torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
            torch.baddbmm(x, *((x, polynomial) if tall else (polynomial, x)), beta=a, out=spare)
        x, spare = spare, x
    return x


def gram_newton_schulz(x: Tensor, polynomials: Polynomials) -> Tensor:
    r"""The same as :func:`newton_schulz` with fewer products if a matrix is at least twice as long as wide.

    A polynomial is :math:`X \leftarrow GX` with :math:`G = aI + bR + cR^2` and the Gram matrix :math:`R = XX^\top`, so
    that the products :math:`Q` of all :math:`G` can be found without X, from

    .. math:: Z = bR + cR^2, \qquad Q \leftarrow QZ + aQ, \qquad R \leftarrow Z (RZ + aR) + a (RZ + aR) .

    Rounding errors of R are of the size of its largest eigenvalues, and the polynomials are steep at zero: eigenvalues
    that are nearly zero would soon be lost in them, or become negative and grow. So after two polynomials, and then
    after every three, X is replaced by QX, R by its Gram matrix, and Q by I. That suffices for the rounding of float32,
    not for that of bfloat16 or TensorFloat-32. If ``torch.set_float32_matmul_precision`` allows those for float32
    products, or if the form would save nothing, :func:`newton_schulz` is run.

    Five polynomials of an (m, n) matrix take 8 m^2 n + 28 m^3 operations instead of 20 m^2 n + 10 m^3.

    Args:
        x: contiguous (B, m, n) in float32 or float64; overwritten.
        polynomials: (a, b, c) in order.

    Memory beside ``x``: as much again, and two matrices of the shorter side.
    """
    side, length = sorted(x.shape[1:])
    if length < 2 * side or not _multiplies_exactly(x):
        return newton_schulz(x, polynomials)
    tall = x.shape[1] > x.shape[2]
    spare = torch.empty_like(x)
    q, other = x.new_empty(2, x.shape[0], side, side)
    start = 0
    while start < len(polynomials):
        stop = start + (2 if start == 0 else 3)
        # Both are used up before `spare` is written.
        gram, z = spare.view(-1)[: 2 * q.numel()].view(2, *q.shape)
        torch.bmm(*((x.mT, x) if tall else (x, x.mT)), out=gram)
        q.zero_().diagonal(dim1=1, dim2=2).fill_(1.0)
        for index, (a, b, c) in enumerate(polynomials[start:stop], start + 1):
            torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=z)
            torch.baddbmm(q, q, z, beta=a, out=other)
            q, other = other, q
            if index < min(stop, len(polynomials)):
                torch.baddbmm(gram, gram, z, beta=a, out=other)
                torch.baddbmm(other, z, other, beta=a, out=gram)
        torch.bmm(*((x, q) if tall else (q, x)), out=spare)
        x, spare = spare, x
        start = stop
    return x


@contextmanager
def exact_products() -> Iterator[None]:
    """Multiply float32 matrices in float32 meanwhile, also where ``torch.set_float32_matmul_precision`` allows less."""
    backends = [getattr(torch.backends, name).matmul for name in ("cuda", "mkldnn")]
    allowed = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(backends, allowed, strict=True):
            backend.fp32_precision = precision


def _multiplies_exactly(x: Tensor) -> bool:
    """Whether products of float32 matrices are computed in float32."""
    backend = torch.backends.cuda if x.is_cuda else torch.backends.mkldnn
    return x.dtype == torch.float64 or backend.matmul.fp32_precision in ("none", "ieee")
