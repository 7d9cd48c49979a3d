import pytest
import torch

from pipeline.compress import codes, lowrank, quantize


def problem(rows=20, columns=14, tokens=200, seed=0):
    """An error and inputs whose directions differ much in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.linspace(0.1, 3, columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator), inputs


def product(adapter, scale):
    return scale * adapter.b.double() @ adapter.a.double()


def seen(error, adapter, scale, inputs):
    """||X (E - s B A)^T||."""
    return float((inputs.double() @ (error.double() - product(adapter, scale)).T).norm())


@pytest.mark.parametrize(("rows", "columns"), [(20, 14), (14, 20), (9, 33)])
@pytest.mark.parametrize(("r", "scale"), [(1, 1.0), (4, 2.0), (6, 0.5)])
def test_start_reaches_the_optimum_of_the_whole_problem(rows, columns, r, scale):
    error, inputs = problem(rows, columns)
    adapter = lowrank.weighted(error, lowrank.root(inputs.T @ inputs, 0), r, scale)
    assert (adapter.a.shape, adapter.b.shape) == ((r, columns), (rows, r))
    best = float(torch.linalg.svdvals(inputs.double() @ error.double().T)[r:].norm())
    assert seen(error, adapter, scale, inputs) == pytest.approx(best, rel=1e-4)


def test_start_sees_less_error_than_the_one_that_knows_no_inputs():
    error, inputs = problem()
    known = lowrank.weighted(error, lowrank.root(inputs.T @ inputs), 4, 2.0)
    plain = quantize.low_rank(error, 4, 2.0)
    assert seen(error, known, 2.0, inputs) < 0.9 * seen(error, plain, 2.0, inputs)


def test_no_small_step_from_the_start_lowers_the_error():
    error, inputs = problem()
    adapter = lowrank.weighted(error, lowrank.root(inputs.T @ inputs, 0), 3, 2.0)
    a, b = (values.double().requires_grad_(True) for values in (adapter.a, adapter.b))
    loss = (inputs.double() @ (error.double() - 2.0 * b @ a).T).square().sum()
    gradients = torch.autograd.grad(loss, [a, b])
    assert all(float(gradient.abs().max()) < 1e-3 * float(loss) for gradient in gradients)
    generator, least = torch.Generator().manual_seed(1), seen(error, adapter, 2.0, inputs)
    for _ in range(200):
        step = [1e-3 * torch.randn(values.shape, generator=generator) for values in (adapter.a, adapter.b)]
        moved = quantize.Adapter(adapter.a + step[0], adapter.b + step[1])
        assert seen(error, moved, 2.0, inputs) > least * (1 - 1e-6)


def test_start_for_inputs_all_alike_is_that_of_loftq():
    error, _ = problem()
    plain = quantize.low_rank(error, 4, 2.0)
    adapter = lowrank.weighted(error, lowrank.root(5 * torch.eye(14)), 4, 2.0)
    torch.testing.assert_close(product(adapter, 2.0), product(plain, 2.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(adapter.a.norm(dim=1), plain.a.norm(dim=1), rtol=1e-3, atol=1e-5)


def test_start_shares_the_singular_values_between_both_matrices():
    error, inputs = problem()
    adapter = lowrank.weighted(error, lowrank.root(1e4 * inputs.T @ inputs), 4, 2.0)
    torch.testing.assert_close(adapter.a.norm(dim=1), adapter.b.norm(dim=0), rtol=1e-3, atol=1e-5)


def test_start_does_not_depend_on_the_scale_of_the_gram_matrix():
    error, inputs = problem()
    found = [product(lowrank.weighted(error, lowrank.root(c * inputs.T @ inputs), 4, 2.0), 2.0) for c in (1.0, 1e-6)]
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_rank_deficient_gram_matrix_gives_a_finite_start_that_helps_on_its_inputs(tokens):
    error, inputs = problem(tokens=tokens)
    adapter = lowrank.weighted(error, lowrank.root(inputs.T @ inputs), 6, 2.0)
    assert torch.isfinite(adapter.a).all()
    assert torch.isfinite(adapter.b).all()
    nothing = quantize.Adapter(torch.zeros(6, 14), torch.zeros(20, 6))
    assert seen(error, adapter, 2.0, inputs) <= 0.05 * seen(error, nothing, 2.0, inputs)


@pytest.mark.parametrize(("rows", "columns"), [(3, 14), (20, 2), (1, 1)])
def test_start_of_fewer_directions_than_r_is_exact_and_filled_with_zeros(rows, columns):
    error, inputs = problem(rows, columns)
    adapter = lowrank.weighted(error, lowrank.root(inputs.T @ inputs), 6, 2.0)
    assert (adapter.a.shape, adapter.b.shape) == ((6, columns), (rows, 6))
    torch.testing.assert_close(product(adapter, 2.0).float(), error, atol=1e-4, rtol=0)


def test_large_problem_is_solved_by_the_randomized_decomposition_to_a_thousandth():
    error, inputs = problem(160, 120, tokens=500)
    adapter = lowrank.weighted(error, lowrank.root(inputs.T @ inputs, 0), 8, 2.0)
    best = float(torch.linalg.svdvals(inputs.double() @ error.double().T)[8:].norm())
    assert best * (1 - 1e-5) <= seen(error, adapter, 2.0, inputs) <= best * 1.001


def test_damping_counts_from_the_median_of_the_positive_diagonal():
    gram = torch.diag(torch.tensor([0.0, 1.0, 2.0, 1e6]))
    expected = torch.diag(torch.tensor([0.2, 1.2, 2.2, 1e6 + 0.2], dtype=torch.float64))
    torch.testing.assert_close(codes.damped(gram, 0.1), expected)
