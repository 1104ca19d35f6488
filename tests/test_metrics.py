"""Numbers beside scikit-learn, scipy, statsmodels, or formulas written apart."""

import itertools
import json
import math

import numpy as np
import pytest
import sklearn.metrics as sk
from scipy import stats

import metrics
from cli import UserError

CLASSES = list("abcde")


def cases():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(300, 5)), rng.integers(0, 5, 300)
    never = logits.copy()
    never[:, 2] = -50
    yield "random", logits, labels
    yield "a class is never predicted", never, labels
    yield "a class has no images", logits, labels % 4
    yield "one class", logits, np.full(300, 3)
    yield "ties", logits.round(), labels
    yield "confidence 1", 1000 * logits.round(), labels
    yield "all right", 40 * np.eye(5)[labels], labels
    yield "one image", logits[:1], labels[:1]


@pytest.fixture(params=list(cases()), ids=lambda case: case[0])
def case(request):
    _, logits, labels = request.param
    return logits, labels


def test_scores_are_those_of_scikit_learn(case):
    logits, labels = case
    ours = metrics.measure(logits, labels, CLASSES)
    p, ids = metrics.probabilities(logits), range(5)
    guess, present = p.argmax(1), sorted(set(labels.tolist()))
    onehot = np.eye(5)[labels]
    assert ours["accuracy"] == pytest.approx(sk.accuracy_score(labels, guess))
    for average in ("macro", "weighted"):
        theirs = sk.f1_score(labels, guess, labels=present, average=average, zero_division=0)
        assert ours[f"{average}_f1"] == pytest.approx(theirs)
    p_true = p[np.arange(len(labels)), labels]
    assert ours["log_loss"] == pytest.approx(-np.log(p_true).mean())
    if p_true.min() > 1e-15:  # scikit-learn clips
        assert ours["log_loss"] == pytest.approx(sk.log_loss(labels, p, labels=ids))
    by_class = [sk.brier_score_loss(onehot[:, i], p[:, i].clip(0, 1)) for i in ids]
    assert ours["brier"] == pytest.approx(sum(by_class))
    assert ours["confusion_matrix"] == sk.confusion_matrix(labels, guess, labels=ids).tolist()
    assert ours["confidence"] == pytest.approx(p.max(1).mean())
    assert ours["coverage"]["100%"] == pytest.approx(ours["accuracy"])
    right, N = guess == labels, len(labels)
    assert ours["accuracy_interval"] == pytest.approx(metrics.wilson(right.sum(), N))
    for i in present:
        expected = metrics.wilson(right[labels == i].sum(), (labels == i).sum())
        assert ours["per_class"][CLASSES[i]]["recall_interval"] == pytest.approx(expected)
    curve = metrics.accuracy_by_coverage(p, labels)
    assert ours["coverage"]["80%"] == pytest.approx(curve[max(1, N * 4 // 5) - 1])
    json.dumps(ours, allow_nan=False)


def expected_calibration_error(p, labels):
    """Written apart: image by image, the number of a bin by division."""
    bins = {}
    for row, label in zip(p, labels, strict=True):
        number = max(0, math.ceil(round(float(row.max()) * 15, 9)) - 1)
        bins.setdefault(number, []).append((float(row.max()), float(row.argmax() == label)))
    total = 0
    for pairs in bins.values():
        confidence, right = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        total += len(pairs) * abs(confidence - right)
    return total / len(labels)


def test_calibration_error_is_that_written_apart(case):
    logits, labels = case
    p = metrics.probabilities(logits)
    ours = metrics.calibration_error(p, labels)
    assert ours == pytest.approx(expected_calibration_error(p, labels), abs=1e-9)
    assert sum(bin["images"] for bin in metrics.reliability(p, labels)) == len(labels)


def test_confidence_on_the_edge_of_a_bin():
    p = np.array([[1.0, 0.0], [1.0, 0.0], [0.6, 0.4]])  # .6 is the end of bin 9
    bins = metrics.reliability(p, np.array([0, 1, 0]))
    assert (bins[-1]["images"], bins[-1]["accuracy"], bins[8]["images"]) == (2, 0.5, 1)


def test_coverage_is_the_mean_over_all_orders_of_ties():
    confidence, right = [0.9, 0.6, 0.6, 0.6, 0.5], [1, 1, 0, 0, 1]
    p = np.array([[c, 1 - c] for c in confidence])
    labels = np.array([0 if good else 1 for good in right])
    orders = [o for o in itertools.permutations(range(5))
              if all(confidence[a] >= confidence[b] for a, b in itertools.pairwise(o))]  # fmt: skip
    curves = [np.cumsum([right[i] for i in order]) / np.arange(1, 6) for order in orders]
    assert metrics.accuracy_by_coverage(p, labels) == pytest.approx(np.mean(curves, axis=0))


def test_temperature_has_the_least_log_loss():
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(2000, 5))
    labels = np.array([rng.choice(5, p=row) for row in metrics.probabilities(logits)])
    for factor in (0.5, 3.0):  # logits of a network that is underconfident, or overconfident
        T = metrics.fit_temperature(factor * logits, labels)
        assert factor / T == pytest.approx(1, abs=0.1)
        grid = np.linspace(0.9 * T, 1.1 * T, 41)
        losses = [
            sk.log_loss(labels, metrics.probabilities(factor * logits / t), labels=range(5))
            for t in grid
        ]
        assert grid[np.argmin(losses)] == pytest.approx(T, rel=0.01)


def test_there_is_no_temperature_without_a_mistake_or_without_an_answer():
    labels = np.arange(50) % 5
    assert metrics.fit_temperature(4 * np.eye(5)[labels], labels) is None
    assert metrics.fit_temperature(np.zeros((50, 5)), labels) is None
    with pytest.raises(UserError, match="not finite"):
        metrics.fit_temperature(np.full((50, 5), np.nan), labels)


def test_logits_that_are_not_finite_are_refused():
    logits = np.zeros((3, 5))
    logits[1, 2] = np.nan
    with pytest.raises(UserError, match="1 of 3 images are not finite"):
        metrics.measure(logits, np.zeros(3, dtype=int), CLASSES)


def test_intervals_and_mcnemars_test():
    assert metrics.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998
    assert metrics.wilson(0, 10)[0] == 0 and metrics.wilson(10, 10)[1] == pytest.approx(1)
    rng = np.random.default_rng(2)
    a, b = rng.random(500) < 0.8, rng.random(500) < 0.75
    found = metrics.difference(a, b)
    value, (low, high) = found["difference"], found["interval"]
    theirs = stats.bootstrap(
        (a.astype(float), b.astype(float)), lambda x, y, axis: x.mean(axis) - y.mean(axis),
        paired=True, method="percentile", n_resamples=9999, rng=np.random.default_rng(3),
    ).confidence_interval  # fmt: skip
    assert value == pytest.approx(a.mean() - b.mean())
    assert (low, high) == pytest.approx(tuple(theirs), abs=0.003)
    found = metrics.difference(a, a)  # it may be luck that they never differ
    value, (low, high) = found["difference"], found["interval"]
    assert value == 0 and -0.01 < low < 0 < high < 0.01
    found = metrics.difference(np.array([True]), np.array([False]))
    value, (low, high) = found["difference"], found["interval"]
    assert value == 1 and low < 0
    assert metrics.mcnemar(0, 0) == 1
    statsmodels = pytest.importorskip("statsmodels.stats.contingency_tables")
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    for _ in range(20):
        p = dict(zip("abcdefgh", rng.random(8) ** 4, strict=True))
        rejected, *_ = multitest.multipletests(list(p.values()), method="holm")
        assert metrics.holm(p) == {name for name, no in zip(p, rejected, strict=True) if no}
    for only_a, only_b in ((0, 1), (3, 12), (40, 25), (0, 30), (7, 7)):
        theirs = statsmodels.mcnemar([[90, only_a], [only_b, 5]], exact=True).pvalue
        assert metrics.mcnemar(only_a, only_b) == pytest.approx(min(1, theirs))


def test_comparison_worked_out_by_hand():
    labels = np.array([0, 0, 0, 1, 1, 1])
    a, b = np.eye(3)[[0, 0, 1, 1, 1, 2]], np.eye(3)[[0, 1, 1, 1, 0, 1]]
    found = metrics.compare(a, b, labels, ["x", "y", "z"])
    assert found["right"] == {"both": 2, "first": 2, "second": 1, "neither": 1}
    assert found["difference"] == pytest.approx(1 / 6) and found["agreement"] == 0.5
    assert found["mcnemar_p"] == 1.0
    assert {k: v["difference"] for k, v in found["per_class"].items()} == pytest.approx(
        {"x": 1 / 3, "y": 0}
    )
    assert found["confusion_difference"] == [[1, -1, 0], [-1, 0, 1], [0, 0, 0]]
    swapped = metrics.compare(b, a, labels, ["x", "y", "z"])
    assert swapped["difference"] == -found["difference"]
    pairs = metrics.confused_pairs([[5, 2, 0], [1, 5, 4], [0, 0, 5]], ["x", "y", "z"])
    assert pairs == [{"classes": ["y", "z"], "images": [4, 0]},
                     {"classes": ["x", "y"], "images": [2, 1]}]  # fmt: skip


def test_seeds_are_averaged_and_recipes_compared():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 50)
    p = [metrics.probabilities(rng.normal(size=(50, 3)) + np.eye(3)[labels]) for _ in range(4)]
    rows = [metrics.measure(np.log(x), labels, list("xyz")) for x in p]
    named = dict(zip("abcd", (row | {"seed": i} for i, row in enumerate(rows)), strict=True))
    found = metrics.compare_all(named, ["one", "one", "one", "two"], p, labels, list("xyz"))
    (group,), accuracies = found["recipes"], [row["accuracy"] for row in rows]
    assert group["checkpoints"] == ["a", "b", "c"]
    assert group["std"] == pytest.approx(np.std(accuracies[:3], ddof=1))
    assert [(pair["first"], pair["second"]) for pair in found["pairs"]] == [
        ("a", "d"), ("b", "d"), ("c", "d")]  # fmt: skip
    assert group["mean"] == pytest.approx(np.mean(accuracies[:3]))
    ensemble, best = found["ensemble"], max("abcd", key=lambda name: named[name]["accuracy"])
    assert ensemble["accuracy"] == (np.mean(p, axis=0).argmax(1) == labels).mean()
    assert ensemble["best"] == best
    gain = ensemble["accuracy"] - named[best]["accuracy"]
    assert ensemble["difference"] == pytest.approx(gain)
    named["b"]["seed"] = 0  # best.pt and last.pt of one run
    again = metrics.compare_all(named, ["one", "one", "one", "two"], p, labels, list("xyz"))
    assert not again["recipes"] and len(again["pairs"]) == 6


def test_mistakes_are_the_most_confident_ones():
    labels = np.zeros(6, dtype=int)
    a = np.array([[0.9, 0.1], [0.1, 0.9], [0.3, 0.7], [0.8, 0.2], [0.2, 0.8], [0.6, 0.4]])
    b = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.1, 0.9], [0.4, 0.6], [0.7, 0.3]])
    rows = metrics.choose_mistakes([a, b], labels)
    assert rows["mistakes"].tolist() == [1, 4, 2, 3]  # of a, then what b adds
    assert rows["disagreements"].tolist() == [3, 1, 2]
