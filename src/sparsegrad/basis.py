"""HOSVD bases of stacked weight gradients (paper, section 3.1).

Stack n gradients G_1..G_n of one layer kind, each ``(out_features, in_features)``, into a tensor of shape
``(n, out_features, in_features)``. Its HOSVD factors of the last two modes are the left singular vectors of the mode
unfoldings, that is, the eigenvectors of the two moments

    L = sum_t G_t G_t^T   (out_features, out_features)        R = sum_t G_t^T G_t   (in_features, in_features)

``Basis(U, V)`` holds them as **rows**, leading first. Stated once, used everywhere:

    W_rot = V W U^T        G_rot = V G U^T        W = V^T W_rot U
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsegrad.fingerprint import sha256

ORIENTATIONS = ("hosvd", "released")
ORTHOGONALITY_TOLERANCE = 1e-3  # a float32 basis of 11,008 rows stays below 1e-4


class Basis(nn.Module):
    """Two orthogonal bases shared by all layers of one kind.

    A module, so that layers that share it stay sharing it when the model moves between devices. A cast of the model
    to bfloat16 or float16 leaves the basis in its own precision: a rounded basis is not orthogonal (D25).

    Args:
        U: ``(rank_in, in_features)``, orthonormal rows; ``rank_in == in_features`` for a full basis.
        V: ``(rank_out, out_features)``, orthonormal rows; ``(0, out_features)`` leaves the output side as it is
            (:meth:`input_side`).

    Raises:
        ValueError: if a factor is not a matrix, has more rows than columns, or is not finite.
    """

    U: Tensor
    V: Tensor

    def __init__(self, U: Tensor, V: Tensor) -> None:
        super().__init__()
        for name, factor in (("U", U), ("V", V)):
            if factor.dim() != 2 or factor.shape[0] > factor.shape[1]:
                raise ValueError(
                    f"{name} has shape {tuple(factor.shape)}; it must be (rank, features), rank <= features."
                )
            if not factor.is_meta and not torch.isfinite(factor).all():
                raise ValueError(f"{name} holds non-finite values: collect the gradients again.")
        self.register_buffer("U", U)
        self.register_buffer("V", V)

    @property
    def in_features(self) -> int:
        return self.U.shape[1]

    @property
    def out_features(self) -> int:
        return self.V.shape[1]

    @property
    def rotates_output(self) -> bool:
        """Whether there is a V; without one, rotated coordinates are ``W U^T``."""
        return self.V.shape[0] > 0

    @property
    def ranks(self) -> tuple[int, int]:
        """Shape of a rotated weight: rows of V, or out_features without a V, and rows of U."""
        return self.V.shape[0] if self.rotates_output else self.out_features, self.U.shape[0]

    @property
    def is_full(self) -> bool:
        """Whether both factors are square, so that every weight has exact rotated coordinates."""
        return self.U.shape[0] == self.U.shape[1] and self.V.shape[0] == self.V.shape[1]

    def identity(self) -> str:
        """SHA-256 of dtype, shape and bytes of U and V, as 64 hexadecimal digits."""
        return sha256({"U": self.U, "V": self.V})

    def rotate(self, W: Tensor) -> Tensor:
        """``V W U^T`` of a weight or gradient ``(out_features, in_features)``, in the basis' precision."""
        own = W.to(self.V.dtype)
        return (self.V @ own if self.rotates_output else own) @ self.U.T

    def rotate_back(self, W_rot: Tensor) -> Tensor:
        """``V^T W_rot U``, the inverse of :meth:`rotate` for a full basis."""
        own = W_rot.to(self.V.dtype)
        return (self.V.T @ own if self.rotates_output else own) @ self.U

    def oriented(self, orientation: str) -> Basis:
        """The basis in another orientation.

        ``hosvd`` makes G_rot the HOSVD core. ``released`` is what the authors' code computes: its input factor is used
        untransposed, so that G_rot = V G U instead of V G U^T (D2).

        Raises:
            ValueError: on another word, or if ``released`` is asked of a truncated basis.
        """
        if orientation == "hosvd":
            return self
        if orientation != "released":
            raise ValueError(f"orientation={orientation!r}; allowed: {', '.join(ORIENTATIONS)}.")
        if not self.is_full:
            raise ValueError("orientation='released' transposes U, so it needs a full basis; this one is truncated.")
        return Basis(self.U.T.contiguous(), self.V)

    def leading(self, rank_out: int, rank_in: int) -> Basis:
        """The first rows of V and U: this object where it has no more, else a copy of those rows alone."""
        if self.ranks == (rank_out, rank_in):
            return self
        return Basis(self.U[:rank_in].clone(), self.V[:rank_out].clone())

    def input_side(self) -> Basis:
        """The basis without V: the rows of a truncated layer's core are then the outputs themselves."""
        return Basis(self.U, self.V[:0])

    def orthogonality_error(self) -> float:
        """Largest absolute entry of ``U U^T - I`` and ``V V^T - I``."""
        factors = (self.U, self.V) if self.rotates_output else (self.U,)
        errors = [(F @ F.T - torch.eye(F.shape[0], dtype=F.dtype, device=F.device)).abs().max() for F in factors]
        return float(max(errors))

    def refuse_skewed(self) -> None:
        """Check that the rows are orthonormal by products with random vectors: ``U U^T`` itself costs n^3.

        Raises:
            ValueError: if they are not.
        """
        for factor in (self.U, self.V):
            if factor.is_meta or not len(factor):
                continue
            z = torch.randn(len(factor), 4, generator=torch.Generator().manual_seed(0)).to(factor)
            error = float((factor @ (factor.T @ z) - z).abs().max())
            if not error < ORTHOGONALITY_TOLERANCE:
                raise ValueError(
                    f"the basis is off orthogonality by {error:.1e}: its rows must be orthonormal, as "
                    "sparsegrad.hosvd makes them, and not rounded below float32."
                )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Basis:
        for name in ("U", "V"):
            old = getattr(self, name)
            new = fn(old)
            if new.dtype != old.dtype and torch.finfo(new.dtype).bits < 32:
                new = old.to(new.device)
            setattr(self, name, new)
        return self

    def extra_repr(self) -> str:
        return f"U={tuple(self.U.shape)}, V={tuple(self.V.shape)}"


class GradientMoments:
    """Running moments of gradients ``(out_features, in_features)``, in float64: float32 loses trailing directions.

    Memory does not grow with the number of gradients.
    """

    def __init__(self, out_features: int, in_features: int, device: torch.device | str | None = None) -> None:
        self.left = torch.zeros(out_features, out_features, dtype=torch.float64, device=device)
        self.right = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self.count = 0

    def update(self, G: Tensor) -> None:
        """Add one gradient ``(out_features, in_features)`` of any float dtype.

        Raises:
            ValueError: if its shape is another layer's or it is not finite; the sums are left as they were.
        """
        expected = (self.left.shape[0], self.right.shape[0])
        if tuple(G.shape) != expected:
            raise ValueError(f"gradient of shape {tuple(G.shape)}; these moments take {expected}.")
        G = G.detach().to(device=self.left.device, dtype=torch.float64)
        if not torch.isfinite(G).all():
            raise ValueError("gradient holds non-finite values: lower the learning rate or check the loss.")
        add_gram_(self.left, G)
        add_gram_(self.right, G.T)
        self.count += 1

    def merge(self, other: GradientMoments) -> None:
        """Add the sums of another rank or process.

        Raises:
            ValueError: if the other moments are of another shape.
        """
        if self.left.shape != other.left.shape or self.right.shape != other.right.shape:
            raise ValueError(
                f"moments of {tuple(other.left.shape)} and {tuple(other.right.shape)} can't be added to moments of "
                f"{tuple(self.left.shape)} and {tuple(self.right.shape)}: they belong to other layers."
            )
        self.left += other.left.to(self.left.device)
        self.right += other.right.to(self.right.device)
        self.count += other.count


def add_gram_(moment: Tensor, A: Tensor) -> None:
    """``moment += A A^T``, in blocks of rows up to the diagonal: little more than half of the operations.

    Args:
        moment: ``(n, n)``, symmetric but for rounding; so it stays.
        A: ``(n, m)``, of the same dtype.
    """
    n = len(A)
    for start in range(0, n, _GRAM_ROWS):
        end = min(start + _GRAM_ROWS, n)
        block = A[start:end] @ A[:end].T
        moment[start:end, :end] += block
        moment[:start, start:end] += block[:, :start].T


_GRAM_ROWS = 256  # smaller blocks save little more and multiply slower


def hosvd(moments: GradientMoments, rank: int | None = None) -> Basis:
    """HOSVD factors from moments: one symmetric eigendecomposition a mode, in float64.

    Signs are fixed (the largest entry of a row is positive), so that one input gives one basis.

    Args:
        moments: sums over at least one gradient.
        rank: keep the leading rows of each factor only; None keeps all.

    Returns:
        A float64 basis on the moments' device.

    Raises:
        ValueError: if no gradient was collected, all were zero, or the rank is out of range.
    """
    if not isinstance(moments, GradientMoments):
        raise ValueError(
            f"moments is a {type(moments).__name__}; give GradientMoments: one kind's of what collect_moments gives."
        )
    if moments.count == 0:
        raise ValueError("no gradient was collected; call GradientMoments.update before hosvd.")
    smallest = min(moments.left.shape[0], moments.right.shape[0])
    if rank is not None and not 1 <= rank <= smallest:
        raise ValueError(f"rank={rank}; allowed: 1 to {smallest} for gradients of this shape, or None for all.")
    if moments.left.trace() == 0:
        raise ValueError("all collected gradients are zero; are the layers trainable and the loss not constant?")
    return Basis(_leading_eigenvectors(moments.right, rank), _leading_eigenvectors(moments.left, rank))


def hosvd_of_unfoldings(gradients: Tensor) -> Basis:
    """The literal HOSVD: SVD of the two mode unfoldings of ``(n, out_features, in_features)``, in float64.

    Needs the whole stack and factors of its size; kept as the reference that :func:`hosvd` is tested against.
    """
    n, out_features, in_features = gradients.shape
    stack = gradients.to(torch.float64)
    mode_out = stack.permute(1, 0, 2).reshape(out_features, n * in_features)
    mode_in = stack.permute(2, 0, 1).reshape(in_features, n * out_features)
    V = torch.linalg.svd(mode_out, full_matrices=False).U
    U = torch.linalg.svd(mode_in, full_matrices=False).U
    return Basis(_fix_signs(U.T), _fix_signs(V.T))


def hosvd_tensorly(gradients: Tensor) -> Basis:
    """The same factors from TensorLy's ``partial_tucker`` without HOOI iterations; the stack is held in float64.

    Args:
        gradients: ``(n, out_features, in_features)``.

    Raises:
        ImportError: if tensorly is not installed.
    """
    import tensorly
    from tensorly.decomposition import partial_tucker

    stack = gradients.detach().cpu().to(torch.float64)
    n, out_features, in_features = stack.shape
    rank = [min(out_features, n * in_features), min(in_features, n * out_features)]
    with tensorly.backend_context("pytorch"):  # pyright: ignore[reportAttributeAccessIssue] - made at run time
        # n_iter_max=0 is the HOSVD; any iteration would be HOOI, another subspace.
        (_, (V, U)), _ = partial_tucker(stack, rank=rank, modes=[1, 2], n_iter_max=0, init="svd")
    return Basis(_fix_signs(U.T), _fix_signs(V.T))


def own_rows(basis: Basis, weight: Tensor, ranks: tuple[int, int]) -> Basis:
    """A copy of the leading rows for a weight: where it lies, in its precision but at least float32.

    Raises:
        ValueError: if the rows are not orthonormal.
    """
    basis.refuse_skewed()
    (r, c), dtype = ranks, torch.promote_types(weight.dtype, torch.float32)
    rows = (basis.U[:c], basis.V[:r])
    return Basis(*(factor.to(device=weight.device, dtype=dtype, copy=True).contiguous() for factor in rows))


def random_basis(like: Basis, generator: torch.Generator) -> Basis:
    """A basis of another's shapes, dtype and device, uniform over the orthogonal matrices (in float64, on the CPU).

    A control: it says what the HOSVD's directions are worth.
    """

    def draw(factor: Tensor) -> Tensor:
        gaussian = torch.randn(factor.shape[::-1], generator=generator, dtype=torch.float64)
        Q, R = torch.linalg.qr(gaussian)
        return (Q * R.diagonal().sign()).T.contiguous().to(factor)  # with the signs of R: uniform (Mezzadri 2007)

    return Basis(draw(like.U), draw(like.V))


def _leading_eigenvectors(moment: Tensor, rank: int | None) -> Tensor:
    """Eigenvectors of a symmetric matrix as rows, leading first."""
    symmetric = (moment + moment.T) / 2
    try:
        vectors = torch.linalg.eigh(symmetric).eigenvectors
    # cuSOLVER fails on some rank-deficient inputs that LAPACK takes (pytorch#94772)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage] - documented
        vectors = torch.linalg.eigh(symmetric.cpu()).eigenvectors.to(moment.device)
    rows = vectors.flip(1).T
    return _fix_signs(rows if rank is None else rows[:rank])


def _fix_signs(rows: Tensor) -> Tensor:
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return (rows * torch.where(largest < 0, -1.0, 1.0)).contiguous()
