"""Bases: moments-HOSVD against TensorLy and the SVD of the unfoldings, orientation, refusals."""

import pytest
import torch

from sparsegrad import Basis, FoldedLinear, GradientMoments, hosvd, hosvd_of_unfoldings, hosvd_tensorly
from sparsegrad.basis import ORIENTATIONS, add_gram_

SHAPES = [(12, 5), (5, 12), (7, 7)]


def gradients(n, out_features, in_features, seed=0, decay=0.6):
    """Gradients whose modes have well separated spectra in random directions."""
    generator = torch.Generator().manual_seed(seed)
    random = [torch.randn(s, s, generator=generator, dtype=torch.float64) for s in (out_features, in_features)]
    rows, columns = (torch.linalg.qr(m).Q for m in random)
    core = torch.randn(n, out_features, in_features, generator=generator, dtype=torch.float64)
    core *= (decay ** torch.arange(out_features))[:, None] * (decay ** torch.arange(in_features))
    return rows @ core @ columns.T


def moments_of(stack):
    moments = GradientMoments(*stack.shape[1:])
    for G in stack:
        moments.update(G)
    return moments


def gap(A, B):
    """Sine of the largest principal angle between the row spaces."""
    return float(torch.linalg.matrix_norm(A.T @ A - B.T @ B, 2))


def energy_in_top_percent(G):
    squares = G.flatten().square().sort(descending=True).values
    return float(squares[: max(1, len(squares) // 100)].sum() / squares.sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_moments_give_the_factors_of_tensorly_and_of_the_unfoldings(shape, seed):
    stack = gradients(20, *shape, seed=seed)
    mine, tucker, unfolded = hosvd(moments_of(stack)), hosvd_tensorly(stack), hosvd_of_unfoldings(stack)
    mode_out = torch.linalg.svd(stack.movedim(0, 1).flatten(1), full_matrices=True).U.T
    mode_in = torch.linalg.svd(stack.movedim(2, 0).flatten(1), full_matrices=True).U.T
    for other_U, other_V in ((tucker.U, tucker.V), (unfolded.U, unfolded.V), (mode_in, mode_out)):
        for rank in range(1, min(shape)):
            assert gap(mine.U[:rank], other_U[:rank]) < 1e-8
            assert gap(mine.V[:rank], other_V[:rank]) < 1e-8
    torch.testing.assert_close(mine.U, tucker.U, rtol=0, atol=1e-7)  # signs are fixed, so the rows agree as well
    torch.testing.assert_close(mine.V, unfolded.V, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_rotated_stack_is_an_hosvd_core(shape):
    """All-orthogonal slices of falling norm in both modes: the definition, without any other implementation."""
    stack = gradients(15, *shape)
    basis = hosvd(moments_of(stack))
    core = torch.stack([basis.rotate(G) for G in stack])
    for mode in (1, 2):
        slices = core.movedim(mode, 0).flatten(1)
        gram = slices @ slices.T
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-10 * float(gram.max()))
        assert (gram.diagonal().diff() <= 0).all()


@pytest.mark.parametrize("n", [1, 2])
def test_fewer_gradients_than_full_rank_give_the_leading_subspaces(n):
    """n gradients of rank 2 span 2n directions of each mode; the rest of the basis is any orthonormal completion."""
    generator = torch.Generator().manual_seed(n)
    left, right = (torch.randn(n, s, 2, generator=generator, dtype=torch.float64) for s in (40, 9))
    stack = left @ right.mT
    basis = hosvd(moments_of(stack))
    assert basis.is_full and basis.orthogonality_error() < 1e-12
    for other in (hosvd_of_unfoldings(stack), hosvd_tensorly(stack)):
        for rank in range(1, 2 * n + 1):
            assert gap(basis.U[:rank], other.U[:rank]) < 1e-7
            assert gap(basis.V[:rank], other.V[:rank]) < 1e-7
    for G in stack:  # nothing of the gradients lies outside the leading block
        assert basis.rotate(G)[2 * n :].abs().max() < 1e-7 and basis.rotate(G)[:, 2 * n :].abs().max() < 1e-7


def test_a_rank_keeps_the_leading_rows_of_the_full_basis():
    moments = moments_of(gradients(8, 6, 9))
    full, truncated = hosvd(moments), hosvd(moments, rank=4)
    assert torch.equal(truncated.U, full.U[:4]) and torch.equal(truncated.V, full.V[:4])
    assert full.is_full and not truncated.is_full
    assert (truncated.in_features, truncated.out_features) == (9, 6)


def test_merged_moments_equal_one_accumulation():
    stack = gradients(9, 6, 4)
    first, second, all_at_once = moments_of(stack[:4]), moments_of(stack[4:]), moments_of(stack)
    first.merge(second)
    assert first.count == all_at_once.count == 9
    torch.testing.assert_close(first.left, all_at_once.left, rtol=1e-13, atol=0)
    torch.testing.assert_close(first.right, all_at_once.right, rtol=1e-13, atol=0)
    torch.testing.assert_close(second.left, moments_of(stack[4:]).left)  # the other one is only read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_are_summed_in_float64_whatever_the_gradients_are(dtype):
    stack = gradients(5, 6, 4).to(dtype)
    moments = moments_of(stack)
    exact = stack.double()
    torch.testing.assert_close(moments.left, (exact @ exact.mT).sum(0), rtol=1e-13, atol=1e-18)
    torch.testing.assert_close(moments.right, (exact.mT @ exact).sum(0), rtol=1e-13, atol=1e-18)


def test_signs_are_fixed():
    stack = gradients(8, 6, 4)
    basis = hosvd(moments_of(stack))
    for factor in (basis.U, basis.V):
        assert (factor.gather(1, factor.abs().argmax(1, keepdim=True)) > 0).all()
    # An SVD of the negated stack returns flipped vectors; the fixed ones are the same.
    flipped = hosvd_of_unfoldings(-stack)
    torch.testing.assert_close(flipped.U, basis.U, rtol=0, atol=1e-9)
    torch.testing.assert_close(flipped.V, basis.V, rtol=0, atol=1e-9)


def test_a_failing_eigh_falls_back_to_the_cpu(monkeypatch):
    moments = moments_of(gradients(8, 6, 4))
    expected, eigh, calls = hosvd(moments), torch.linalg.eigh, []

    def fails_first(matrix):
        calls.append(matrix)
        if len(calls) % 2:
            raise torch.linalg.LinAlgError("cuSOLVER did not converge")
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", fails_first)
    assert torch.equal(hosvd(moments).U, expected.U)
    assert len(calls) == 4


@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_is_v_g_ut_and_rotating_back_inverts_it(shape, random_basis):
    basis, G = random_basis(*shape), torch.randn(*shape, dtype=torch.float64)
    expected = torch.einsum("pq,qr,sr->ps", basis.V, G, basis.U)
    torch.testing.assert_close(basis.rotate(G), expected)
    torch.testing.assert_close(basis.rotate_back(basis.rotate(G)), G)
    assert basis.orthogonality_error() < 1e-13
    assert Basis(2 * basis.U, basis.V).orthogonality_error() == pytest.approx(3)


@pytest.mark.parametrize("shape", SHAPES)
def test_released_orientation_is_v_g_u(shape):
    """D2: the authors' code uses the input factor untransposed, so its gradient is not the HOSVD core."""
    stack = gradients(20, *shape)
    core = hosvd(moments_of(stack))
    released = core.oriented("released")
    for G in stack:
        torch.testing.assert_close(released.rotate(G), core.V @ G @ core.U)
        assert not torch.allclose(released.rotate(G), core.rotate(G))
        torch.testing.assert_close(released.rotate_back(released.rotate(G)), G)
    assert core.oriented("hosvd") is core
    assert released.orthogonality_error() < 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_the_hosvd_core_gathers_more_energy_than_the_released_orientation(seed):
    """D2, on gradients with low-rank structure; the gradient measured is not among those that made the basis."""
    stack = gradients(31, 48, 32, seed=seed, decay=0.7)
    core = hosvd(moments_of(stack[:30]))
    held = {o: energy_in_top_percent(core.oriented(o).rotate(stack[30])) for o in ORIENTATIONS}
    assert held["hosvd"] > 0.85
    assert held["hosvd"] > held["released"] + 0.2
    assert held["hosvd"] > energy_in_top_percent(stack[30]) + 0.2


def test_orientation_is_refused_with_the_allowed_words(random_basis):
    with pytest.raises(ValueError, match=r"orientation='core'; allowed: hosvd, released"):
        random_basis(4, 3).oriented("core")
    truncated = hosvd(moments_of(gradients(8, 6, 4)), rank=2)
    assert truncated.oriented("hosvd") is truncated
    with pytest.raises(ValueError, match="needs a full basis; this one is truncated"):
        truncated.oriented("released")


@pytest.mark.parametrize(
    ("U", "V", "text"),
    [
        (torch.ones(3), torch.eye(2), r"U has shape \(3,\); it must be \(rank, features\), rank <= features"),
        (torch.eye(3), torch.ones(4, 2), r"V has shape \(4, 2\)"),
        (torch.eye(3) * float("nan"), torch.eye(2), "U holds non-finite values: collect the gradients again"),
        (torch.eye(3), torch.eye(2) / 0, "V holds non-finite values"),
    ],
)
def test_a_basis_refuses_what_is_no_basis(U, V, text):
    with pytest.raises(ValueError, match=text):
        Basis(U, V)


@pytest.mark.parametrize(
    ("stack", "rank", "text"),
    [
        (torch.zeros(0, 4, 3), None, "no gradient was collected"),
        (torch.zeros(2, 4, 3), None, "all collected gradients are zero"),
        *((gradients(2, 4, 3), rank, rf"rank={rank}; allowed: 1 to 3 ") for rank in (0, -1, 4)),
    ],
)
def test_hosvd_refuses_moments_without_a_gradient_and_a_rank_out_of_range(stack, rank, text):
    with pytest.raises(ValueError, match=text):
        hosvd(moments_of(stack), rank)


@pytest.mark.parametrize("given", [torch.ones(4, 3), {"up": None}])
def test_hosvd_takes_the_moments_of_one_kind(given):
    with pytest.raises(ValueError, match=rf"moments is a {type(given).__name__}; give GradientMoments: one kind's"):
        hosvd(given)


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (torch.zeros(3, 4), r"gradient of shape \(3, 4\); these moments take \(4, 3\)"),
        (torch.zeros(4), r"gradient of shape \(4,\)"),
        (torch.full((4, 3), float("nan")), "gradient holds non-finite values: lower the learning rate"),
        (torch.full((4, 3), float("-inf")), "gradient holds non-finite values"),
    ],
)
def test_a_refused_gradient_leaves_the_moments_as_they_were(wrong, text):
    moments = moments_of(gradients(2, 4, 3))
    left, right = moments.left.clone(), moments.right.clone()
    with pytest.raises(ValueError, match=text):
        moments.update(wrong)
    with pytest.raises(ValueError, match=r"\(3, 3\) and \(4, 4\) can't be added to .* belong to other layers"):
        moments.merge(GradientMoments(3, 4))
    assert torch.equal(moments.left, left) and torch.equal(moments.right, right) and moments.count == 2


@pytest.mark.parametrize(("n", "m"), [(256, 5), (600, 40)])
def test_a_gram_matrix_by_blocks_is_the_whole_one_and_stays_symmetric(n, m):
    moment, added = torch.zeros(n, n, dtype=torch.float64), torch.randn(2, n, m, dtype=torch.float64)
    for A in added:
        add_gram_(moment, A)
    torch.testing.assert_close(moment, (added @ added.mT).sum(0), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(moment, moment.T, rtol=1e-14, atol=1e-14)


def test_a_basis_of_the_input_side_rotates_that_side_alone(random_basis):
    full, W = random_basis(11, 7), torch.randn(11, 7, dtype=torch.float64)
    basis = full.input_side()
    assert basis.ranks == (11, 7) and not basis.is_full and not basis.rotates_output
    torch.testing.assert_close(basis.rotate(W), W @ full.U.T)
    torch.testing.assert_close(basis.rotate_back(basis.rotate(W)), W)
    assert basis.orthogonality_error() < 1e-12
    assert basis.leading(11, 2).ranks == (11, 2) and basis.leading(11, 7) is basis
    with pytest.raises(ValueError, match="orientation='released'"):
        basis.oriented("released")
    with pytest.raises(ValueError, match="a basis of the input side is for form 'truncated'"):
        FoldedLinear(W, None, basis, 9)
