"""The polar factor of a matrix: approximately by Newton-Schulz iterations, exactly by QDWH or SVD."""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from lightning_muon.linalg.newton_schulz import gram_newton_schulz, newton_schulz
from lightning_muon.linalg.qdwh import qdwh
from lightning_muon.linalg.scale import check_matrices, normalized

OrthogonalizationMethod: TypeAlias = Literal[
    "jordan", "polar_express", "gram", "cans", "you", "deepseek", "simple", "cubic", "qdwh", "svd"
]
ORTHOGONALIZATION_METHODS: tuple[OrthogonalizationMethod, ...] = get_args(OrthogonalizationMethod)


@torch.no_grad()
def orthogonalize(
    matrices: Tensor,
    method: OrthogonalizationMethod = "jordan",
    steps: int | None = None,
    dtype: torch.dtype | None = None,
    *,
    overwrite: bool = False,
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
    ``gram``          5     0.86 to 1.13   ``polar_express`` by the Gram form of T. Dao et al.; for long matrices
    ``cans``          5     0.87 to 1.12   Grishina et al., arXiv 2506.10935, with a safety factor of 1.01
    ``you``           5     0.97 to 1.04   J. You's coefficients, as in NVIDIA's Emerging-Optimizers
    ``deepseek``      10    1              eight steps of ``jordan``, then two of ``simple``
    ``simple``        12    1              p(x) = 2x - 1.5 x^3 + 0.5 x^5
    ``cubic``         5     0.77 to 1.30   arXiv 2606.00371; one product fewer a step
    ``qdwh``          4     1              Halley's rational iteration (Nakatsukasa et al. 2010); QR and Cholesky
    ``svd``           --    exactly 1      ``torch.linalg.svd`` in float32 or float64
    ================= ===== ============== ==========================================================================

    Smaller singular values come out smaller, and zero stays zero. ``qdwh`` brings singular values to 1 that are at
    least 2.4e-5 of the norm in float32 (3.7e-11 in float64), and rounding errors of a matrix of lower rank to below
    0.003. ``svd`` brings singular values to 1 that are above the rounding error of the largest, and drops the rest.

    ``jordan`` is the usual method of Muon. ``polar_express`` comes closer to 1 at the same cost. ``gram`` takes half
    the time of the others in float32 if a matrix is eight times as long as wide. ``qdwh`` is for
    rules that need the polar factor itself: from twice (width 128 and up) to ten times (width 64, square) the time of
    ``polar_express`` in float32 on a CPU.

    Args:
        matrices: floating-point tensor (..., m, n), on any device.
        method: name of the iteration.
        steps: number of iterations; None for the method's own. Fewer stop early, which leaves small singular values
            small; more repeat the last polynomial, or with ``qdwh`` (4 in float32, 5 in float64) its limit.
        dtype: dtype of the products. None: float64 for float64 input, else bfloat16 on CUDA and on CPUs
            that multiply it fast (AVX512-BF16, AMX), else float32. Four methods never go below float32: ``svd`` and
            ``qdwh``, which factorize; ``cans``, whose first polynomial nearly vanishes at 0.84, where bfloat16 would
            round the sign away; and ``gram``, whose Gram matrix would get negative eigenvalues.
        overwrite: the memory of ``matrices`` may be used, for the result too; their contents are undefined afterwards.
            Saves one stack of temporary memory. Otherwise ``matrices`` are left as they are.

    Returns:
        Tensor (..., m, n) in the dtype of the input. A zero matrix gives zero; one with NaN or infinity gives NaN and
        leaves the others of the batch alone.

    Raises:
        ValueError: if ``method`` is unknown, ``steps`` is not in 1..99, or ``dtype`` is float16 on a CPU.
        TypeError: if ``matrices`` is not floating point or has fewer than two dimensions.
    """
    check_orthogonalization(method, steps, dtype)
    check_matrices("orthogonalize", matrices)
    if matrices.numel() == 0:
        return matrices.clone()
    dtype = dtype or default_orthogonalization_dtype(matrices.device, matrices.dtype)
    if method in _AT_LEAST_FLOAT32:
        dtype = torch.promote_types(dtype, torch.float32)
    if dtype == torch.float16 and matrices.device.type == "cpu":
        raise ValueError(
            "float16 products are about a hundred times slower than float32 on a CPU: use dtype=torch.bfloat16."
        )
    iteration = _ITERATIONS.get(method)
    stack = matrices.reshape(-1, *matrices.shape[-2:])
    x = normalized(stack, iteration.safety if iteration else 1.0, dtype, overwrite)
    if iteration is None:
        x = _polar_factors(x, method, steps)
    elif method == "gram":
        x = gram_newton_schulz(x, iteration.schedule(steps))
    else:
        x = newton_schulz(x, iteration.schedule(steps))
    return x.to(matrices.dtype).view(matrices.shape)


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
    steps: int = 5

    def schedule(self, steps: int | None) -> list[tuple[float, float, float]]:
        count = self.steps if steps is None else steps
        chosen = [self.polynomials[min(step, len(self.polynomials) - 1)] for step in range(count)]
        return [(a / self.safety, b / self.safety**3, c / self.safety**5) for a, b, c in chosen[:-1]] + chosen[-1:]


_JORDAN = (3.4445, -4.7750, 2.0315)
_SIMPLE = (2.0, -1.5, 0.5)
_POLAR_EXPRESS = _Iteration(
    (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
        (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
        (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
        (1.875, -1.25, 0.375),
    ),
    safety=1.01,  # rounding may lift singular values above 1, where these polynomials grow fast
)
_AT_LEAST_FLOAT32 = ("gram", "cans", "qdwh", "svd")
_ITERATIONS = {
    "jordan": _Iteration((_JORDAN,)),
    "polar_express": _POLAR_EXPRESS,
    "gram": _POLAR_EXPRESS,
    "cans": _Iteration(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        safety=1.01,
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
    "deepseek": _Iteration((_JORDAN,) * 8 + (_SIMPLE,) * 2, steps=10),
    "simple": _Iteration((_SIMPLE,), steps=12),
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


def _polar_factors(x: Tensor, method: str, steps: int | None) -> Tensor:
    """The polar factors of normalized matrices, and NaN for those that hold NaN. ``x`` is overwritten."""
    bad = x.flatten(1).amax(dim=1).isnan()[:, None, None]  # LAPACK refuses NaN
    x.masked_fill_(bad, 0.0)
    x = qdwh(x, steps) if method == "qdwh" else _polar_by_svd(x)
    return x.masked_fill_(bad, torch.nan)


def _polar_by_svd(x: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    kept = s > s[:, :1] * max(x.shape[1:]) * torch.finfo(s.dtype).eps
    return torch.bmm(u.mul_(kept[:, None, :]), vh)
