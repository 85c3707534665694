"""The reference checked by hand-computed numbers and by identities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference as ref
from numpy.testing import assert_allclose, assert_array_equal

A = np.array


def _draw(seed: int, count: int, shape: tuple[int, ...] = (6, 5)) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape)
    return base, [base + 0.1 * rng.standard_normal(shape) for _ in range(count)]


# ---- numbers worked out by hand -------------------------------------------------------------------------------------


def test_linear_by_hand() -> None:
    # (1*2 + 3*6) / 4 = 5; (1*0 + 3*4) / 4 = 3
    assert_allclose(ref.linear(None, [A([2.0, 0.0]), A([6.0, 4.0])], weight=[1, 3]), [5, 3])
    assert_allclose(ref.linear(None, [A([2.0, 0.0]), A([6.0, 4.0])], weight=[1, 3], normalize=False), [20, 12])
    with pytest.raises(ValueError, match="sum to 0"):
        ref.linear(None, [A([1.0]), A([2.0])], weight=[1, -1])


def test_task_arithmetic_by_hand() -> None:
    base, models = A([1.0, 1.0]), [A([2.0, 1.0]), A([1.0, 4.0])]  # tau = (1, 0), (0, 3)
    assert_allclose(ref.task_arithmetic(base, models, weight=[0.5, -1.0]), [1.5, -2.0])
    assert_allclose(ref.task_arithmetic(base, models, normalize=True, lambda_=2.0), [2.0, 4.0])
    # weights that cancel: the divisor counts as 1
    assert_allclose(ref.task_arithmetic(base, models, weight=[1, -1], normalize=True), [2.0, -2.0])


def test_keep_count_and_lowest_index_first() -> None:
    assert [ref.keep_count(d, 10) for d in (0, 0.01, 0.1, 0.29, 0.99, 1)] == [0, 1, 1, 2, 9, 10]
    assert_array_equal(ref.trim(A([1.0, -2.0, 2.0, -2.0, 0.5]), 0.4), [0, -2, 2, 0, 0])
    assert_array_equal(ref.trim(A([[1.0, 1.0], [-1.0, 1.0]]), 0.75), [[1, 1], [-1, 0]])


def test_trim_rescale_by_hand() -> None:
    # l1: 10 before, 7 after
    assert_allclose(ref.trim(A([1.0, 2.0, -3.0, 4.0]), 0.5, rescale=True), A([0, 0, -3, 4]) * 10 / 7)


def test_ties_by_hand() -> None:
    base = np.zeros(4)
    one, two, three = A([4.0, -1.0, 3.0, 0.1]), A([-1.0, -2.0, 3.0, 0.1]), A([2.0, 5.0, -1.0, 0.2])
    # density 0.5 keeps the two largest: (4,0,3,0), (0,-2,3,0), (2,5,0,0)
    # sums 6, 3, 6, 0: signs + + + +; means: (4+2)/2, 5/1, (3+3)/2, 0
    assert_allclose(ref.ties(base, [one, two, three], density=0.5), [3, 5, 3, 0])
    assert_allclose(ref.ties(base, [one, two, three], density=0.5, normalize=False, lambda_=0.5), [3, 2.5, 3, 0])
    # weights vote: 1*4 + 6*(-1) < 0
    assert_allclose(ref.ties(np.zeros(1), [A([4.0]), A([-1.0])], weight=[1, 6]), [-1.0])


def test_ties_zero_sum_takes_plus_or_majority() -> None:
    base, models = np.zeros(3), [A([1.0, -2.0, -3.0]), A([-1.0, -2.0, -3.0])]
    assert_allclose(ref.ties(base, models), [1, -2, -3])
    assert_allclose(ref.ties(base, models, zeros="majority"), [-1, -2, -3])


def test_ties_trim_model_by_hand() -> None:
    taus = {"b": A([[5.0, 1.0]]), "a": A([-1.0, 1.0, 4.0])}  # sorted order: a, b: [-1, 1, 4, 5, 1]
    kept = ref.ties_trim_model(taus, 0.6)  # 3 of 5: 5, 4, then the first of the ones
    assert_array_equal(kept["a"], [-1, 0, 4])
    assert_array_equal(kept["b"], [[5, 0]])
    assert list(kept) == ["b", "a"]
    assert all(not v.any() for v in ref.ties_trim_model(taus, 0.0).values())


def test_breadcrumbs_by_hand() -> None:
    x = A([1.0, -5.0, 3.0, 4.0, -2.0, 6.0, 7.0, 8.0, 9.0, 10.0])
    # 20 % outliers: 10, 9 go; 30 % stay: 8, 7, 6
    assert_array_equal(ref.breadcrumbs_sparsify(x, 0.3, 0.2), [0, 0, 0, 0, 0, 6, 7, 8, 0, 0])
    # 90 % must stay, so only one outlier goes
    assert_array_equal(ref.breadcrumbs_sparsify(x, 0.9, 0.2), x * (x != 10))
    # int(0.05 * 10) = 0 entries: one stays all the same
    assert_array_equal(ref.breadcrumbs_sparsify(x, 0.05, 0.2), x * (x == 8))
    assert not ref.breadcrumbs_sparsify(x, 0.0, 0.2).any()
    assert_array_equal(ref.breadcrumbs_sparsify(x, 1.0, 0.2), x)
    # equal magnitudes: the lower index counts as the larger, so index 0 is the outlier
    assert_array_equal(ref.breadcrumbs_mask(np.ones(4), 0.5, 0.25), [False, True, True, False])


def test_breadcrumbs_merge_by_hand() -> None:
    base = np.ones(4)
    models = [base + A([4.0, 3.0, 2.0, 1.0]), base + A([-1.0, -2.0, 30.0, -3.0])]
    # one outlier goes, two stay: (0,3,2,0) and (0,-2,0,-3)
    assert_allclose(ref.breadcrumbs(base, models, density=0.5, gamma=0.25), base + A([0, 1, 2, -3]))
    assert_allclose(ref.breadcrumbs_ties(base, models, density=0.5, gamma=0.25), base + A([0, 3, 2, -3]))


def test_dare_by_hand() -> None:
    tau, u = A([1.0, 2.0, -3.0, 4.0]), A([0.1, 0.5, 0.3, 0.9])
    assert_array_equal(ref.dare_sparsify(tau, 0.5, u, rescale=False), [1, 0, -3, 0])  # u < 0.5, strictly
    assert_array_equal(ref.dare_sparsify(tau, 0.5, u, rescale="density"), [2, 0, -6, 0])
    assert_allclose(ref.dare_sparsify(tau, 0.5, u), A([1, 0, -3, 0]) * 10 / 4)
    assert not ref.dare_sparsify(tau, 0.0, u, rescale="density").any()
    base = np.zeros(4)
    assert_allclose(ref.dare_linear(base, [tau], [u], density=0.5, rescale="density", weight=3.0), [6, 0, -18, 0])
    other = A([-5.0, 1.0, 1.0, 1.0])
    merged = ref.dare_ties(base, [tau, other], [u, np.zeros(4)], density=0.5, rescale=False)
    assert_allclose(merged, [-5, 1, -3, 1])


def test_della_by_hand() -> None:
    x = A([[3.0, -1.0, 2.0], [0.0, 0.0, 5.0]])
    # ranks: (2, 0, 1) and, the lower index larger, (1, 0, 2); p = 0.4, 0.5, 0.6
    assert_allclose(ref.della_probabilities(x, 0.5, 0.1), [[0.6, 0.4, 0.5], [0.5, 0.4, 0.6]])
    assert_allclose(ref.della_probabilities(A([3.0, -1.0, 2.0]), 0.5, 0.1), [0.6, 0.4, 0.5])
    assert_allclose(ref.della_probabilities(A([[3.0], [1.0]]), 0.5, 0.1), [[0.5], [0.5]])
    u = np.full((2, 3), 0.45)
    assert_array_equal(ref.della_sparsify(x, 0.5, u, 0.1, rescale=False), [[3, 0, 2], [0, 0, 5]])
    assert_allclose(ref.della_sparsify(x, 0.5, u, 0.1, rescale="density"), [[5, 0, 4], [0, 0, 25 / 3]])
    assert_allclose(ref.della_sparsify(x, 0.5, u, 0.1), A([[3, 0, 2], [0, 0, 5]]) * 11 / 10)
    with pytest.raises(ValueError, match="epsilon"):
        ref.della_probabilities(x, 0.1, 0.15)


def test_sce_by_hand() -> None:
    base, models = np.zeros(2), [A([3.0, 1.0]), A([-1.0, 1.0])]
    # energies 5 and 1: weights 5/6, 1/6; signs + +; entry 0: only the first; entry 1: both equal 1
    assert_allclose(ref.sce(base, models), [3, 1])
    # variances 4, 0: one nonzero, int(1 * 0.9) = 0 kept
    assert_allclose(ref.sce(base, models, select_topk=0.9), [0, 0])
    models = [A([3.0, 1.0, 2.0]), A([1.0, 1.0, 6.0])]  # variances 1, 0, 4; topk 0.5 of 2: entry 2
    # energies 4 and 36: weights 0.1, 0.9: 0.2 + 5.4
    assert_allclose(ref.sce(np.zeros(3), models, select_topk=0.5), [0, 0, 5.6])
    # equal variances: the lowest index
    assert_allclose(ref.sce(base, [A([1.0, 1.0]), A([3.0, 3.0])], select_topk=0.5), [2.8, 0])


def test_slerp_by_hand() -> None:
    x, y = A([1.0, 0.0]), A([0.0, 1.0])
    assert_allclose(ref.slerp(x, [y], 0.5), [math.sqrt(0.5)] * 2)
    assert_allclose(ref.slerp(2 * x, [y], 1 / 3), [2 * math.sin(math.pi / 3), math.sin(math.pi / 6)])
    assert_allclose(ref.slerp(x, [-x], 0.25), [0.5, 0.0])  # antipodal: linear


def test_nuslerp_by_hand() -> None:
    x, y = A([1.0, 0.0]), A([0.0, 1.0])
    assert_allclose(ref.nuslerp(None, [x, y], weight=[2, 1]), [math.sin(math.pi / 3), math.sin(math.pi / 6)])
    assert_allclose(ref.nuslerp(A([1.0, 1.0]), [A([2.0, 1.0]), A([1.0, 2.0])]), 1 + math.sqrt(0.5) * np.ones(2))
    a, b = A([[1.0, 0.0], [0.0, 2.0]]), A([[0.0, 1.0], [0.0, 4.0]])
    # each row: (1,0)-(0,1) turns, (0,2)-(0,4) is colinear: linear
    assert_allclose(ref.nuslerp(None, [a, b], flatten=False), [[math.sqrt(0.5)] * 2, [0, 3]])
    # each column: (1,0)-(0,0) and (0,2)-(1,4)
    out = ref.nuslerp(None, [a, b], flatten=False, row_wise=True)
    half = math.acos(4 / math.sqrt(17)) / 2
    scale = math.sin(half) / math.sin(2 * half)
    assert_allclose(out[:, 1], [scale, 6 * scale])
    assert_allclose(out[:, 0], [math.sqrt(0.5), 0])


def test_multislerp_by_hand() -> None:
    x, y = A([1.0, 0.0]), A([0.0, 1.0])
    assert_allclose(ref.multislerp(None, [3 * x, y]), [math.sqrt(2)] * 2, rtol=1e-6)  # direction 45 deg, mean norm 2
    assert_allclose(ref.multislerp(None, [x, -3 * x]), [-1, 0], atol=1e-6)  # cancel, two models: linear
    with pytest.raises(ValueError, match="cancel"):
        ref.multislerp(None, [x, -x, np.zeros(2)])
    base = A([1.0, 2.0])
    assert_allclose(ref.multislerp(base, [base, base, base]), base)


def test_karcher_by_hand() -> None:
    x, y = A([1.0, 0.0]), A([0.0, 1.0])
    assert_allclose(ref.karcher(None, [3 * x, y]), [math.sqrt(2)] * 2, rtol=1e-6)
    # on a circle the Karcher mean of 0, 0 and 90 degrees is 30 degrees
    out = ref.karcher(None, [x, x, y])
    assert_allclose(out, [math.cos(math.pi / 6), math.sin(math.pi / 6)], rtol=1e-5)
    assert not ref.karcher(None, [np.zeros(2), np.zeros(2)]).any()
    assert_allclose(ref.karcher(None, [2 * x, np.zeros(2)]), [1, 0])  # the zero counts in the mean norm only


def test_model_stock_by_hand() -> None:
    base = np.zeros(2)
    # cos 60 degrees = 1/2: t = 2 * 0.5 / 1.5 = 2/3
    models = [A([1.0, 0.0]), A([0.5, math.sqrt(0.75)])]
    assert_allclose(ref.model_stock(base, models), 2 / 3 * (models[0] + models[1]) / 2)
    two = np.zeros((2, 2))
    models = [A([[1.0, 0.0], [1.0, 0.0]]), A([[1.0, 0.0], [0.0, 1.0]])]  # rows: cos 1 (t = 1), cos 0 (t = 0)
    assert_allclose(ref.model_stock(two, models, filter_wise=True), [[1, 0], [0, 0]])
    assert_allclose(ref.model_stock(base, [A([1.0, 0.0]), A([-1.0, 0.0])]), base)  # singular


def test_nearswap_passthrough_by_hand() -> None:
    assert_allclose(ref.nearswap(A([0.0, 0.0, 1.0]), [A([4.0, 0.5, 1.0])], 1.0), [1.0, 0.5, 1.0])
    assert_allclose(ref.passthrough(None, [A([1.0, 2.0])]), [1, 2])
    assert_allclose(ref.passthrough(None, [A([1.0, 2.0])], scale=-2.0), [-2, -4])


def test_consensus_by_hand() -> None:
    base, models = A([1.0, 1.0, 1.0]), [A([2.0, 11.0, 1.0]), A([2.0, 1.5, 1.0]), A([2.0, 1.5, 1.0])]
    # entry 0: each 1 >= 0.6 * 2? no: none. entry 1: 10 >= 0.6, 0.5 >= 6.3? no: one. entry 2: zero anyway
    assert_allclose(ref.consensus_ta(base, models), base)
    # mu = 0.4: entry 0: 1 >= 0.8, all three
    assert_allclose(ref.consensus_ta(base, models, mu=0.4, lambda_=0.5), [2.5, 1, 1])


def test_anchor_by_hand() -> None:
    assert [ref.anchor_fraction(i, 3) for i in range(3)] == [0, 0.5, 1]
    assert_allclose([ref.anchor_fraction(i, 4, "cosine") for i in range(4)], [0, 0.25, 0.75, 1])
    assert [ref.anchor_fraction(i, 4, "step") for i in range(4)] == [0, 0, 1, 1]
    assert_allclose(ref.anchor_schedule(None, [A([0.0]), A([4.0])], anchor=1, a=0.25), [2.5])


# ---- identities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_identities(seed: int) -> None:
    base, models = _draw(seed, 3)
    mean = sum(models) / 3
    ones = [np.zeros_like(base)] * 3
    assert_allclose(ref.linear(base, models), mean)
    assert_allclose(ref.task_arithmetic(base, models, normalize=True), mean)
    assert_allclose(ref.task_arithmetic(base, models, weight=1 / 3), mean)
    total = ref.task_arithmetic(base, models)
    assert_allclose(ref.dare_linear(base, models, ones, density=1.0), total)
    assert_allclose(ref.dare_linear(base, models, ones, density=0.5, rescale=False), total)  # u = 0 keeps all
    assert_allclose(ref.della_linear(base, models, ones, density=1.0), total)
    assert_allclose(ref.breadcrumbs(base, models, density=1.0), total)
    assert_allclose(ref.dare_ties(base, models, ones, density=1.0, normalize=True), ref.ties(base, models))
    assert_allclose(ref.della(base, models, ones, density=1.0), ref.ties(base, models))
    assert_allclose(ref.breadcrumbs_ties(base, models, normalize=True), ref.ties(base, models))
    assert_allclose(
        ref.breadcrumbs_ties(base, models, density=0.3, gamma=0.0, normalize=True), ref.ties(base, models, density=0.3)
    )
    assert_allclose(ref.consensus_ta(base, models, mu=0.0), total)
    assert_allclose(ref.nearswap(base, models[:1], 1e9), models[0])
    assert_allclose(ref.nearswap(base, models[:1], 0.0), base)


def test_ties_of_agreeing_signs_is_the_mean() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((4, 4))
    models = [base + rng.uniform(0.1, 1.0, (4, 4)) for _ in range(4)]
    assert_allclose(ref.ties(base, models), sum(models) / 4)


@pytest.mark.parametrize("seed", range(3))
def test_spheres_at_their_ends(seed: int) -> None:
    base, models = _draw(seed, 2)
    rng = np.random.default_rng(seed + 10)
    far = [rng.standard_normal(base.shape) for _ in range(2)]
    for model in (models[0], far[0]):
        assert_allclose(ref.slerp(base, [model], 0.0), base)
        assert_allclose(ref.slerp(base, [model], 1.0), model)
    for flatten, row_wise in ((True, False), (False, False), (False, True)):
        for origin in (None, base):
            ends = [ref.nuslerp(origin, far, weight=w, row_wise=row_wise, flatten=flatten) for w in ([1, 0], [0, 1])]
            assert_allclose(ends[0], far[0])
            assert_allclose(ends[1], far[1])
    assert_allclose(ref.nuslerp(None, far, weight=[0.3, 0.7]), ref.slerp(far[0], [far[1]], 0.7))
    assert_allclose(ref.karcher(None, [far[0]] * 3), far[0])
    assert_allclose(ref.multislerp(None, [far[0]] * 3), far[0], rtol=1e-6)
    assert_allclose(ref.model_stock(base, [far[0]] * 3), far[0])


def test_karcher_of_two_is_the_geodesic_middle() -> None:
    rng = np.random.default_rng(5)
    a, b = (x / np.linalg.norm(x) for x in rng.standard_normal((2, 7)))
    assert_allclose(ref.karcher(None, [a, b]), ref.slerp(a, [b], 0.5), rtol=1e-8)


def test_trim_model_of_one_tensor_is_trim_tensor() -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(-3, 4, (7, 9)).astype(float)  # many ties
    for density in (0.0, 0.001, 0.2, 0.5, 0.99, 1.0):
        assert_array_equal(ref.ties_trim_model({"x": x}, density)["x"], ref.trim(x, density))
        assert np.count_nonzero(ref.trim_mask(x, density)) == ref.keep_count(density, x.size)
