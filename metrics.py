"""Numbers from logits: what one network gets right, and how two differ, with 95% intervals.

    N images   C classes   p (N, C) probabilities   labels (N,)

To add a number of a network, add a row to METRICS. evaluate.py prints it, writes it into
metrics.json and shows it in the report.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import binomtest, bootstrap
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support

from cli import UserError

BINS = 15  # of the reliability diagram
DRAWS = 10_000  # of a bootstrap
MISTAKES = 4  # of each kind and network, to look at


# ---------------------------------------------------------------- one network


def f1(p: np.ndarray, labels: np.ndarray, average: str) -> float:
    """Mean over the classes that have images: "macro" equally, "weighted" by their images."""
    return precision_recall_fscore_support(
        labels, p.argmax(1), labels=np.unique(labels), average=average, zero_division=0
    )[2]


def brier_score(p: np.ndarray, labels: np.ndarray) -> float:
    """Squared distance of the probabilities from the true class, from 0 to 2 (Brier 1950)."""
    return ((p - np.eye(p.shape[1])[labels]) ** 2).sum(1).mean()


def reliability(p: np.ndarray, labels: np.ndarray) -> list[dict]:
    """Confidence and accuracy of the images in each bin (low, high] of confidence.

    The bins have equal width (Guo et al. 2017, arXiv 1706.04599, sec. 2).
    """
    confidence, right = p.max(1), p.argmax(1) == labels
    edges, bins = np.linspace(0, 1, BINS + 1), []
    number = np.digitize(confidence, edges[1:-1], right=True)
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        inside = number == i
        bin = {"low": low, "high": high, "images": int(inside.sum())}
        for name, values in (("confidence", confidence), ("accuracy", right)):
            bin[name] = values[inside].mean() if inside.any() else None
        bins.append(bin)
    return bins


def calibration_error(p: np.ndarray, labels: np.ndarray) -> float:
    """Mean distance of accuracy from confidence over images, by bins: ECE (the same, eq. 3)."""
    bins = [bin for bin in reliability(p, labels) if bin["images"]]
    gaps = [bin["images"] * abs(bin["accuracy"] - bin["confidence"]) for bin in bins]
    return sum(gaps) / len(labels)


def accuracy_by_coverage(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Accuracy (N,) of the 1, 2, ..., N images with the highest confidence.

    Images of one confidence are in random order, and this is the mean over those orders.
    """
    confidence, right = p.max(1), p.argmax(1) == labels
    _, group = np.unique(-confidence, return_inverse=True)  # the highest first
    share = np.bincount(group, right) / np.bincount(group)
    return share[np.sort(group)].cumsum() / np.arange(1, 1 + len(labels))


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number of a network: how it is computed from (p, labels), written and explained."""

    compute: Callable[[np.ndarray, np.ndarray], float]
    title: str
    form: str
    says: str


METRICS = {
    "accuracy": Metric(
        lambda p, labels: accuracy_score(labels, p.argmax(1)), "accuracy", "{:.2%}",
        "the fraction of images that are right",
    ),
    "macro_f1": Metric(
        lambda p, labels: f1(p, labels, "macro"), "macro F1", "{:.4f}",
        "the mean of F1 over the classes that have images; F1 is high if precision and recall are",
    ),
    "weighted_f1": Metric(
        lambda p, labels: f1(p, labels, "weighted"), "weighted F1", "{:.4f}",
        "the same, each class weighted by its images",
    ),
    "log_loss": Metric(
        lambda p, labels: -np.log(np.take_along_axis(p, labels[:, None], 1)).mean(),
        "log loss", "{:.4f}",
        "the mean cross-entropy in nats; lower is better",
    ),
    "brier": Metric(
        brier_score, "Brier score", "{:.4f}",
        "the squared error of the probabilities, from 0 to 2; lower is better",
    ),
    "ece": Metric(
        calibration_error, "ECE", "{:.2%}",
        "the expected calibration error: by how much confidence differs from accuracy",
    ),
}  # fmt: skip


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Logits (N, C) -> probabilities, float64, none of them exactly 0.

    Raises UserError: a logit is not finite.
    """
    if not np.isfinite(logits).all():
        bad = (~np.isfinite(logits)).any(1).sum()
        raise UserError(f"the logits of {bad} of {len(logits)} images are not finite: train again")
    return np.exp(log_softmax(logits.astype(np.float64), axis=1)).clip(np.finfo(float).tiny)


def measure(logits: np.ndarray, labels: np.ndarray, classes: list[str]) -> dict:
    """All that is known of a network's logits (N, C): METRICS, intervals, numbers per class.

    `confusion_matrix[i][j]` counts the images of class i that were predicted as class j. What is
    undefined for a class, as the recall without images, is None. `coverage` has the accuracy of the
    most confident 5%, 10%, ..., 100% of the images.

    Raises UserError: a logit is not finite.
    """
    p, ids = probabilities(logits), range(len(classes))
    predictions, N = p.argmax(1), len(labels)
    found = {name: float(metric.compute(p, labels)) for name, metric in METRICS.items()}
    matrix = confusion_matrix(labels, predictions, labels=ids)
    by_coverage = accuracy_by_coverage(p, labels)
    precision, recall, f1_score, support = precision_recall_fscore_support(
        labels, predictions, labels=ids, zero_division=np.nan
    )
    per_class = {
        name: {
            "precision": _number(precision[i]),
            "recall": _number(recall[i]),
            "recall_interval": wilson(matrix[i, i], support[i]) if support[i] else None,
            "f1": _number(f1_score[i]) if support[i] else None,
            "support": int(support[i]),
        }
        for i, name in enumerate(classes)
    }
    return found | {
        "accuracy_interval": wilson((predictions == labels).sum(), N),
        "images": N,
        "confidence": float(p.max(1).mean()),
        "per_class": per_class,
        "confusion_matrix": matrix.tolist(),
        "reliability": reliability(p, labels),
        "coverage": {
            f"{share}%": by_coverage[max(1, round(share / 100 * N)) - 1]
            for share in range(5, 101, 5)
        },
    }


def _number(x: float) -> float | None:
    """A number, or None for NaN, which JSON does not have."""
    return None if np.isnan(x) else float(x)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float | None:
    """T from .05 to 20 with the least log loss of logits / T (Guo et al. 2017, eq. 9).

    None if there is none: all predictions are right, so T would be 0, or T is outside of the range.

    Raises UserError: a logit is not finite.
    """
    if (probabilities(logits).argmax(1) == labels).all():
        return None

    def loss(log_of_t):
        scaled = log_softmax(logits.astype(np.float64) / np.exp(log_of_t), axis=1)
        return -np.take_along_axis(scaled, labels[:, None], 1).mean()

    found = np.exp(minimize_scalar(loss, bounds=np.log([0.05, 20]), method="bounded").x)
    return float(found) if 0.051 < found < 19.9 else None


# ---------------------------------------------------------------- intervals and tests


def wilson(correct: int, total: int) -> tuple[float, float]:
    """The ends of the 95% interval of a fraction (Wilson 1927)."""
    found = binomtest(int(correct), int(total)).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def mcnemar(only_a: int, only_b: int) -> float:
    """The p-value of McNemar's test (1947): the exact binomial test of the discordant pairs."""
    return float(binomtest(int(only_a), int(only_a + only_b)).pvalue) if only_a + only_b else 1.0


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of (N,), and the ends of its 95% bootstrap interval over images."""
    x = np.asarray(values, dtype=np.float64)
    if x.min() == x.max():
        return (x[0].item(),) * 3
    found = bootstrap((x,), np.mean, method="percentile", n_resamples=2000, random_state=0)
    return (x.mean().item(), *map(float, found.confidence_interval))


def difference(a: np.ndarray, b: np.ndarray) -> dict:
    """Accuracy of a minus that of b, its 95% bootstrap interval over images, McNemar's p-value.

    a, b (N,): whether each image is right. Drawing N images again is drawing how many of them are
    right in a alone, in b alone, or neither, from a multinomial distribution. If one of these never
    occurs, each is counted half an image more: otherwise it could never be drawn.
    """
    N, only_a, only_b = len(a), int((a & ~b).sum()), int((b & ~a).sum())
    counts = np.array([only_a, only_b, N - only_a - only_b], dtype=float)
    counts += 0.5 * (counts == 0).any()
    draws = np.random.default_rng(0).multinomial(N, counts / counts.sum(), DRAWS)
    ends = np.quantile((draws[:, 0] - draws[:, 1]) / N, [0.025, 0.975]).tolist()
    value = (only_a - only_b) / N
    return {"difference": value, "interval": ends, "mcnemar_p": mcnemar(only_a, only_b)}


def holm(p_values: dict[str, float], level: float = 0.05) -> set[str]:
    """The tests that reject at this family-wise error rate (Holm 1979)."""
    rejected = set()
    for rank, name in enumerate(sorted(p_values, key=p_values.get)):
        if p_values[name] > level / (len(p_values) - rank):
            break
        rejected.add(name)
    return rejected


# ---------------------------------------------------------------- two networks


def compare(p_a: np.ndarray, p_b: np.ndarray, labels: np.ndarray, classes: list[str]) -> dict:
    """How two networks differ on the same images; each difference is a minus b.

    `right` counts the images that both, a alone, b alone, or neither get right. A class without
    images has no difference.
    """
    a, b = p_a.argmax(1), p_b.argmax(1)
    right_a, right_b = a == labels, b == labels
    per_class = {}
    for i in np.unique(labels):
        own = labels == i
        row = difference(right_a[own], right_b[own])
        per_class[classes[i]] = row | {"images": int(own.sum())}
    matrices = [confusion_matrix(labels, x, labels=range(len(classes))) for x in (a, b)]
    return difference(right_a, right_b) | {
        "right": {
            "both": int((right_a & right_b).sum()),
            "first": int((right_a & ~right_b).sum()),
            "second": int((right_b & ~right_a).sum()),
            "neither": int((~right_a & ~right_b).sum()),
        },
        "agreement": float((a == b).mean()),
        "per_class": per_class,
        "confusion_difference": (matrices[0] - matrices[1]).tolist(),
    }


def confused_pairs(
    matrix: list[list[int]], classes: list[str], most: int | None = 10
) -> list[dict]:
    """The pairs of classes that are taken for each other most often, in either direction."""
    counts = np.array(matrix)
    both = np.triu(counts + counts.T, 1)
    order = np.argsort(-both, axis=None, kind="stable")[:most]
    pairs = [np.unravel_index(i, both.shape) for i in order if both.flat[i]]
    return [
        {"classes": [classes[i], classes[j]], "images": [int(counts[i, j]), int(counts[j, i])]}
        for i, j in pairs
    ]


def compare_all(metrics: dict[str, dict], recipes: list[str], p: list, labels, classes) -> dict:
    """Each two networks of different recipes; the seeds of each recipe; the mean of all networks.

    Networks of equal `recipes` differ in the seed alone. They are only averaged, since their
    differences are luck. Two files of one seed, as best.pt and last.pt, are compared.

    Args:
        metrics: of each network; `accuracy` and `seed` are used.
        recipes: of each network.
        p: probabilities (N, C) of each network.
        labels: (N,).
        classes: names.
    """
    names, groups = list(metrics), {}
    for name, key in zip(names, recipes, strict=True):
        groups.setdefault(key, []).append(name)
    repeated = [
        group
        for group in groups.values()
        if 1 < len(group) == len({metrics[name]["seed"] for name in group})
    ]
    pairs = [
        {"first": a, "second": b, **compare(p[names.index(a)], p[names.index(b)], labels, classes)}
        for a, b in itertools.combinations(names, 2)
        if not any(a in group and b in group for group in repeated)
    ]
    seeds = []
    for group in repeated:
        accuracies = [metrics[name]["accuracy"] for name in group]
        mean, std = np.mean(accuracies), np.std(accuracies, ddof=1)
        seeds.append({"checkpoints": group, "mean": mean, "std": std})
    ensemble = None
    if len(names) > 1:
        best = max(names, key=lambda name: metrics[name]["accuracy"])
        right = (sum(p) / len(p)).argmax(1) == labels
        gain = difference(right, p[names.index(best)].argmax(1) == labels)
        ensemble = {"accuracy": right.mean(), "best": best} | gain
    return {"pairs": pairs, "recipes": seeds, "ensemble": ensemble}


def choose_mistakes(p: list[np.ndarray], labels: np.ndarray) -> dict[str, np.ndarray]:
    """Rows of the most confident mistakes of each network, and where the first two disagree."""
    rows = {"mistakes": [], "disagreements": []}
    most = min(MISTAKES, 10 // len(p))  # 10 images fit into a figure
    right = [x.argmax(1) == labels for x in p]
    for x, good in zip(p, right, strict=True):
        surest = np.argsort(-x.max(1) * ~good, kind="stable")[: min(most, (~good).sum())]
        rows["mistakes"] += surest.tolist()
    if len(p) > 1:
        both = p[0].max(1) * p[1].max(1)
        for only in (right[0] & ~right[1], right[1] & ~right[0]):
            surest = np.argsort(-both * only, kind="stable")[: min(MISTAKES, only.sum())]
            rows["disagreements"] += surest.tolist()
    return {kind: np.array(list(dict.fromkeys(found))) for kind, found in rows.items() if found}
