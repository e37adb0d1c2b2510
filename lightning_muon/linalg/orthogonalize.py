"""The polar factor of a matrix: approximately by Newton-Schulz iterations, exactly by SVD."""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

OrthogonalizationMethod: TypeAlias = Literal[
    "jordan", "polar_express", "cans", "you", "deepseek", "simple", "cubic", "svd"
]
ORTHOGONALIZATION_METHODS: tuple[OrthogonalizationMethod, ...] = get_args(OrthogonalizationMethod)


@torch.no_grad()
def orthogonalize(
    matrices: Tensor,
    method: OrthogonalizationMethod = "jordan",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""The orthogonal polar factor :math:`U V^\top` of :math:`X = U \Sigma V^\top`, for each matrix of a batch.

    Newton-Schulz methods apply an odd polynomial :math:`p(\sigma) = a\sigma + b\sigma^3 + c\sigma^5` to the singular
    values a few times, by matrix products alone: :math:`X \leftarrow aX + (bXX^\top + c(XX^\top)^2)X`. They start from
    :math:`X / \|X\|_F`, formed in float32 after division by the largest element, so that the answer does not depend on
    the scale of the input. What they return has the singular vectors of the input and these singular values, if those
    of :math:`X / \|X\|_F` are at least 0.01:

    ================= ===== ============== ==========================================================================
    method            steps values         source
    ================= ===== ============== ==========================================================================
    ``jordan``        5     0.68 to 1.14   K. Jordan, https://kellerjordan.github.io/posts/muon; ``torch.optim.Muon``
    ``polar_express`` 5     0.86 to 1.13   Amsel et al., arXiv 2505.16932, with a safety factor of 1.01
    ``cans``          5     0.87 to 1.12   Grishina et al., arXiv 2506.10935, with a safety factor of 1.01
    ``you``           5     0.97 to 1.04   J. You's coefficients, as in NVIDIA's Emerging-Optimizers
    ``deepseek``      10    1              eight steps of ``jordan``, then two of ``simple``
    ``simple``        12    1              p(x) = 2x - 1.5 x^3 + 0.5 x^5
    ``cubic``         5     0.77 to 1.30   arXiv 2606.00371; one product fewer a step
    ``svd``           --    exactly 1      ``torch.linalg.svd`` in float32 or float64
    ================= ===== ============== ==========================================================================

    Smaller singular values come out smaller, and zero stays zero, also with ``svd``, which leaves out the directions
    whose singular value is rounding error.

    Args:
        matrices: floating-point tensor (..., m, n), on any device. It is not modified.
        method: name of the iteration.
        steps: number of iterations; None for the method's own. Further steps repeat the last polynomial.
        dtype: what the products are computed in. None: float64 for float64 input, else bfloat16 on CUDA and on CPUs
            that multiply it fast (AVX512-BF16, AMX), else float32. ``svd`` and ``cans`` never go below float32: the
            first polynomial of ``cans`` nearly vanishes at 0.84, where bfloat16 would round the sign away.

    Returns:
        Tensor (..., m, n) in the dtype of the input. A zero matrix gives zero; one with NaN or infinity gives NaN and
        leaves the others of the batch alone.

    Raises:
        ValueError: if ``method`` is unknown, ``steps`` is not in 1..99, or ``dtype`` is float16 on a CPU.
        TypeError: if ``matrices`` is not floating point or has fewer than two dimensions.
    """
    check_orthogonalization(method, steps, dtype)
    if not matrices.is_floating_point() or matrices.ndim < 2:
        raise TypeError(
            f"orthogonalize takes floating-point matrices (..., m, n), got {matrices.dtype} of shape "
            f"{tuple(matrices.shape)}."
        )
    if matrices.numel() == 0:
        return matrices.clone()
    dtype = dtype or default_orthogonalization_dtype(matrices.device, matrices.dtype)
    if method in _AT_LEAST_FLOAT32:
        dtype = torch.promote_types(dtype, torch.float32)
    if dtype == torch.float16 and matrices.device.type == "cpu":
        raise ValueError(
            "float16 products are about a hundred times slower than float32 on a CPU: use dtype=torch.bfloat16."
        )
    stack = matrices.reshape(-1, *matrices.shape[-2:])
    factors = _polar_by_svd(stack) if method == "svd" else _newton_schulz(stack, method, steps, dtype)
    return factors.to(matrices.dtype).view(matrices.shape)


def check_orthogonalization(method: str, steps: int | None, dtype: torch.dtype | None) -> None:
    """Raise ``ValueError`` for a method, a number of steps or a dtype that :func:`orthogonalize` cannot run."""
    if method not in ORTHOGONALIZATION_METHODS:
        raise ValueError(
            f"Unknown orthogonalization method {method!r}: use one of {', '.join(ORTHOGONALIZATION_METHODS)}."
        )
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps < 100):
        raise ValueError(f"Orthogonalization steps must be an integer from 1 to 99, got {steps!r}.")
    if steps is not None and method == "svd":
        raise ValueError(f"method='svd' is exact and takes no steps, got steps={steps}: leave steps out.")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"The orthogonalization dtype must be floating point, got {dtype}.")


def default_orthogonalization_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """What :func:`orthogonalize` computes in when not told: see its argument ``dtype``."""
    if dtype == torch.float64:
        return torch.float64
    if device.type == "cuda" or (device.type == "cpu" and _cpu_multiplies_bfloat16()):
        return torch.bfloat16
    return torch.float32


@cache
def _cpu_multiplies_bfloat16() -> bool:
    supported = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check is not None and check() for check in supported)


class _Iteration(NamedTuple):
    """Polynomials (a, b, c) in order. ``safety`` divides the input, and the argument of all polynomials but the
    last.
    """

    polynomials: tuple[tuple[float, float, float], ...]
    safety: float = 1.0

    def schedule(self, steps: int | None) -> list[tuple[float, float, float]]:
        count = len(self.polynomials) if steps is None else steps
        chosen = [self.polynomials[min(step, len(self.polynomials) - 1)] for step in range(count)]
        return [(a / self.safety, b / self.safety**3, c / self.safety**5) for a, b, c in chosen[:-1]] + chosen[-1:]


_JORDAN = (3.4445, -4.7750, 2.0315)
_SIMPLE = (2.0, -1.5, 0.5)
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
_DEFAULT_STEPS = {"polar_express": 5}
_AT_LEAST_FLOAT32 = ("cans", "svd")
_ITERATIONS = {
    "jordan": _Iteration((_JORDAN,) * 5),
    "polar_express": _Iteration(_POLAR_EXPRESS, safety=1.01),
    "cans": _Iteration(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        safety=1.01,  # rounding may lift singular values above 1, where these polynomials grow fast
    ),
    "you": _Iteration(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        )
    ),
    "deepseek": _Iteration((_JORDAN,) * 8 + (_SIMPLE,) * 2),
    "simple": _Iteration((_SIMPLE,) * 12),
    "cubic": _Iteration(
        (
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        )
    ),
}


def _newton_schulz(stack: Tensor, method: str, steps: int | None, dtype: torch.dtype) -> Tensor:
    """(B, m, n) -> (B, m, n) in ``dtype``. The Gram matrix is taken on the shorter side."""
    iteration = _ITERATIONS[method]
    x = _normalized(stack, iteration.safety, dtype)
    tall = x.shape[1] > x.shape[2]
    spare = torch.empty_like(x)
    side = min(x.shape[1:])
    gram = x.new_empty(x.shape[0], side, side)
    polynomial = torch.empty_like(gram)
    for a, b, c in iteration.schedule(_DEFAULT_STEPS.get(method) if steps is None else steps):
        torch.bmm(*((x.mT, x) if tall else (x, x.mT)), out=gram)
        if c == 0.0:
            torch.baddbmm(x, *((x, gram) if tall else (gram, x)), beta=a, alpha=b, out=spare)
        else:
            torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
            torch.baddbmm(x, *((x, polynomial) if tall else (polynomial, x)), beta=a, out=spare)
        x, spare = spare, x
    return x


def _normalized(stack: Tensor, safety: float, dtype: torch.dtype) -> Tensor:
    """A new contiguous stack X / (safety ||X||_F) in ``dtype``, right for entries of any size; zero for zero."""
    wide = stack.to(torch.promote_types(stack.dtype, torch.float32)).contiguous()
    flat = wide.flatten(1)
    norm = torch.linalg.vector_norm(flat, dim=1)
    if not _all_moderate(norm):
        # Squares of entries below 1e-19 vanish in float32 and those above 1e19 overflow. Multiplying by a power of two
        # that brings the largest entry into [0.5, 1) first rounds nothing, so that both ways give the same bits.
        largest = torch.maximum(flat.amax(dim=1), flat.amin(dim=1).neg_())
        bound = 1022 if wide.dtype == torch.float64 else 126  # beyond it the power of two is not representable
        exponent = torch.frexp(largest).exponent.clamp_(-bound, bound).to(wide.dtype)
        wide = torch.ldexp(wide, -exponent[:, None, None])
        norm = torch.linalg.vector_norm(wide.flatten(1), dim=1).clamp_(min=0.5)  # acts on zero, and on denormals
    return torch.div(wide, norm.mul_(safety)[:, None, None], out=torch.empty_like(wide, dtype=dtype))


def _all_moderate(norm: Tensor) -> bool:
    """Whether no square vanished or overflowed; answered only where that takes no synchronization."""
    return norm.device.type == "cpu" and float(norm.min()) > 1e-12 and float(norm.max()) < 1e12


def _polar_by_svd(stack: Tensor) -> Tensor:
    """(B, m, n) -> (B, m, n) in float32 or float64."""
    wide = stack.to(torch.promote_types(stack.dtype, torch.float32))
    finite = wide.isfinite().flatten(1).all(dim=1)[:, None, None]
    u, s, vh = torch.linalg.svd(_normalized(torch.where(finite, wide, 0.0), 1.0, wide.dtype), full_matrices=False)
    kept = s > s[:, :1] * max(stack.shape[-2:]) * torch.finfo(s.dtype).eps
    return torch.where(finite, (u * kept[:, None, :]) @ vh, torch.nan)
