"""Probes of frozen features: how well simple classifiers read labels out of them.

Axes: N images, D feature width, F classes or findings, G values of the hyper-parameter, B batch. Labels are class ids
int32 [N], or {0, 1} float32 [N, F] for several findings an image. Every probe fits one classifier for each value of its
hyper-parameter on `train`; `valid` chooses the value; `test` is scored once, at the end.
"""

import dataclasses
import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax

from core.metrics import auroc
from vit_distill.linear_probe import train_linear

KINDS = ("linear", "logistic", "knn")
HYPER_PARAMETERS = {"linear": "learning_rate", "logistic": "c", "knn": "neighbours"}
SUMMARIES = ("top1", "balanced_accuracy", "auc", "mean_auc")  # of `score_metrics`, told of valid too
TEMPERATURE = 0.07  # of the votes of k-NN: Caron et al., DINO, arXiv 2104.14294

Predict = Callable[[np.ndarray], np.ndarray]  # features [n, D] -> scores [n, F]


class Labelled(NamedTuple):
    """Features float32 [N, D] and their labels; a plain pair serves as well."""

    features: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class ProbeOptions:
    """Budgets and grids; the grids are ascending.

    Attributes:
      epochs, warmup_epochs, batch_size: of the linear probe.
      learning_rates: of the linear probe, for 256 images a batch (scaled with the batch). WeCoLoRA's is 0.1; small sets
        see few updates and want more (sklearn's digits: 3 at 1000 images, 30 at 100).
      c_values: inverse strength of the L2 penalty of the logistic regression.
      max_iterations: of the logistic regression's solver.
      neighbours: of k-NN.
    """

    epochs: int
    warmup_epochs: int
    batch_size: int
    learning_rates: tuple[float, ...]
    c_values: tuple[float, ...]
    max_iterations: int
    neighbours: tuple[int, ...]


def probe(
    train: Labelled,
    valid: Labelled,
    test: Labelled,
    kind: str = "linear",
    *,
    options: ProbeOptions,
    classes: Sequence[str] = (),
    seeds: Sequence[int] = (0,),
) -> dict[str, float]:
    """Fits on `train`, chooses on `valid` by `wanted_metric`, scores `test` once.

    Equals of class ids are told apart by the cross-entropy on `valid` (k-NN has none); of what is equal then, and of
    findings, the more regular classifier is chosen.

    Args:
      kind: "linear" (batch norm and LARS: the protocol of MAE and WeCoLoRA), "logistic" (regression on standardised
        features), "knn" (cosine, votes weighted as DINO's).
      classes: names of the F classes; without them ids are counted from the labels.
      seeds: of initial weights and order, one run each; logistic regression and k-NN have neither and run once.

    Returns:
      Flat: of class ids "majority_share", the top1 on test of always naming its most frequent class; the metrics of
      `score_metrics` on test (mean over seeds), each also with "_std" where there are several seeds; "valid_top1",
      "valid_balanced_accuracy", "valid_auc" and "valid_mean_auc", those there are; the chosen hyper-parameter under
      its name (HYPER_PARAMETERS); "at_grid_edge" 1.0 if a wider grid might do better; "all_tied" 1.0 if `wanted_metric`
      is the same for all of several values; "num_seeds".

    Raises:
      ValueError: for another kind, or sets that do not fit together.
    """
    if kind not in KINDS:
        raise ValueError(f"probe kind: expected one of {KINDS}, found {kind!r}")
    names = list(classes)
    train, valid, test = (Labelled(np.asarray(x, np.float32), np.asarray(y)) for x, y in (train, valid, test))
    num_classes = _check({"train": train, "valid": valid, "test": test}, names)
    names = names or [str(i) for i in range(num_classes)]
    fit = {"linear": _fit_linear, "logistic": _fit_logistic, "knn": _fit_knn}[kind]
    runs = fit(train, num_classes, options, tuple(seeds))
    findings = valid.labels.ndim == 2
    # Logits are not comparable between images, as an AUC of one class against the rest needs; shares of votes are.
    logits = kind != "knn" and not findings

    def scores_of(predict: Predict, found: Labelled) -> np.ndarray:
        scores = predict(found.features)
        return log_softmax(scores.astype(np.float64), axis=1) if logits else scores

    on_valid, likelihoods = {}, {}
    for value, fits in runs.items():
        scores = [scores_of(predict, valid) for predict in fits]
        on_valid[value] = mean_over_seeds([score_metrics(each, valid.labels, names) for each in scores])
        likelihoods[value] = float(np.mean([_likelihood(each, valid.labels) for each in scores])) if logits else 0.0
    wanted = wanted_metric(num_classes, valid.labels)
    criterion = {value: found[wanted] for value, found in on_valid.items()}
    chosen, at_edge = choose(criterion, likelihoods)
    on_test = [score_metrics(scores_of(predict, test), test.labels, names) for predict in runs[chosen]]
    result = mean_over_seeds(on_test) | {
        HYPER_PARAMETERS[kind]: float(chosen),
        **{f"valid_{name}": on_valid[chosen][name] for name in SUMMARIES if name in on_valid[chosen]},
        # Fewer than one neighbour there is not.
        "at_grid_edge": float(at_edge and not (kind == "knn" and chosen == 1)),
        "all_tied": float(len(criterion) > 1 and len(set(criterion.values())) == 1),
        "num_seeds": float(len(on_test)),
    }
    if findings:
        return result
    return {"majority_share": float(np.unique(test.labels, return_counts=True)[1].max() / len(test.labels))} | result


def wanted_metric(num_classes: int, *labels: np.ndarray) -> str:
    """What probes are compared by: a metric that sees rare classes and is defined on each of `labels`.

    "mean_auc" of findings; "auc" of two classes, where both occur; "balanced_accuracy" of others. By top1 a classifier
    that always names the most frequent class would do well where the other classes are rare.
    """
    if labels[0].ndim == 2:
        return "mean_auc"
    both = num_classes == 2 and all(len(np.unique(found)) == 2 for found in labels)
    return "auc" if both else "balanced_accuracy"


def _likelihood(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean log-probability of the right class (minus the cross-entropy), over images of classes seen in training."""
    own = np.take_along_axis(scores, labels[:, None].astype(np.int64), axis=1)
    seen = own > -np.inf
    return float(own[seen].mean()) if seen.any() else 0.0


def choose(on_valid: Mapping[float, float], ties: Mapping[float, float] | None = None) -> tuple[float, bool]:
    """The value with the highest score, and whether a wider grid might hold a better one.

    Args:
      on_valid: score of each value, in the order of the grid, the most regular first.
      ties: of equals the value for which this is highest is taken, of what is equal then, or without it, the first.
    """
    grid, scores = list(on_valid), list(on_valid.values())
    best = max(range(len(grid)), key=lambda i: (scores[i], ties[grid[i]] if ties else 0.0))
    inner = scores[1:2] if best == 0 else scores[best - 1 : best]
    return grid[best], best in (0, len(grid) - 1) and any(scores[best] > other for other in inner)


def mean_over_seeds(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each metric and, of several runs, its standard deviation (n - 1) as "<metric>_std"."""
    result = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
    if len(runs) > 1:
        result |= {f"{key}_std": float(np.std([run[key] for run in runs], ddof=1)) for key in runs[0]}
    return result


def score_metrics(scores: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """Metrics of scores [N, F] (higher: more likely, of one image and among images).

    Class ids: "top1"; "top5" with more than five classes; "balanced_accuracy", the mean recall of the classes that
    occur; where two classes occur at least, "auc" of the second of two, or "mean_auc" of each against the rest. Equal
    scores are ranked by class id. Several findings: "auc/<name>" for each and "mean_auc" over those that are defined
    (NaN where all or no image has the finding).

    Raises:
      ValueError: if no finding has both kinds of images.
    """
    if labels.ndim == 1:
        labels = labels.astype(np.int64)
        own = np.take_along_axis(scores, labels[:, None], axis=1)
        earlier = np.arange(scores.shape[1])[None] < labels[:, None]
        rank = ((scores > own) | ((scores == own) & earlier)).sum(1)
        metrics = {"top1": float(np.mean(rank < 1))}
        if scores.shape[1] > 5:
            metrics["top5"] = float(np.mean(rank < 5))
        occur, counts = np.unique(labels, return_counts=True)
        metrics["balanced_accuracy"] = float(np.mean(np.bincount(labels, rank < 1)[occur] / counts))
        if len(occur) > 1 and scores.shape[1] == 2:
            metrics["auc"] = auroc(scores[:, 1] - scores[:, 0], labels)
        elif len(occur) > 1:
            metrics["mean_auc"] = float(np.mean([auroc(scores[:, i], labels == i) for i in occur]))
        return metrics
    defined = (labels > 0.5).any(0) & (labels <= 0.5).any(0)
    if not defined.any():
        raise ValueError(f"no finding has images with and without it among {len(labels)}: AUC is not defined")
    values = [auroc(scores[:, f], labels[:, f] > 0.5) if defined[f] else float("nan") for f in range(labels.shape[1])]
    return {"mean_auc": float(np.nanmean(values))} | {f"auc/{n}": v for n, v in zip(classes, values, strict=True)}


def _check(sets: Mapping[str, Labelled], classes: Sequence[str]) -> int:
    """The number of classes; raises ValueError on sets that do not fit together."""
    width, multi = sets["train"].features.shape[-1], sets["train"].labels.ndim == 2
    for name, (x, y) in sets.items():
        if len(x) == 0:
            raise ValueError(
                f"{name}: no images; a probe needs train, valid and test (data.valid_fraction makes valid)"
            )
        if x.ndim != 2 or x.shape[1] != width or len(y) != len(x) or y.ndim != (2 if multi else 1):
            raise ValueError(
                f"{name}: expected features [N, {width}] and labels {'[N, F]' if multi else '[N]'}, "
                f"found {list(x.shape)} and {list(y.shape)}"
            )
        if multi and (y.shape[1] != sets["train"].labels.shape[1] or not np.isin(y, (0, 1)).all()):
            raise ValueError(
                f"{name}: expected labels 0 or 1 for the {sets['train'].labels.shape[1]} findings of train"
            )
        if not multi and y.min() < 0:
            raise ValueError(f"{name}: {(y < 0).sum()} of {len(y)} images have no label; a probe needs labels")
    if not multi and len(np.unique(sets["train"].labels)) < 2:
        raise ValueError("train: expected images of two classes at least, found one class")
    found = sets["train"].labels.shape[1] if multi else max(int(y.max()) for _, y in sets.values()) + 1
    if classes and (found > len(classes) or (multi and found != len(classes))):
        raise ValueError(f"expected labels of {len(classes)} classes, found {found}")
    return max(found, len(classes))


def _fit_linear(
    train: Labelled, num_classes: int, options: ProbeOptions, seeds: Sequence[int]
) -> dict[float, list[Predict]]:
    fits = [
        train_linear(
            *train,
            num_classes,
            learning_rates=options.learning_rates,
            epochs=options.epochs,
            warmup_epochs=options.warmup_epochs,
            batch_size=options.batch_size,
            seed=seed,
        )
        for seed in seeds
    ]
    return {
        rate: [functools.partial(head.scores, index=i) for head in fits]
        for i, rate in enumerate(options.learning_rates)
    }


def _fit_logistic(
    train: Labelled, num_classes: int, options: ProbeOptions, seeds: Sequence[int]
) -> dict[float, list[Predict]]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    del seeds  # a convex problem
    mean, std = train.features.mean(0, dtype=np.float64), train.features.std(0, dtype=np.float64)
    std = np.where(std > 0, std, 1.0)
    standardise = lambda x: (x - mean[None]) / std[None]  # noqa: E731
    x, findings = standardise(train.features), np.asarray(train.labels)
    # One problem for class ids, one a finding otherwise; each warm-started along the grid.
    targets = [findings] if findings.ndim == 1 else [findings[:, f] for f in range(num_classes)]
    solvers = [LogisticRegression(max_iter=options.max_iterations, warm_start=True) for _ in targets]
    stopped = set()  # values of C

    def fit(value: float) -> Predict:
        parts = []
        for column, (solver, y) in enumerate(zip(solvers, targets, strict=True)):
            seen = np.unique(y).astype(np.int64)
            if len(seen) < 2:  # nothing to separate: no score tells images apart
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)  # eight lines for each fit: one says it below
                solver.set_params(C=value).fit(x, y)
            if max(solver.n_iter_) >= options.max_iterations:
                stopped.add(value)
            columns = [column] if findings.ndim == 2 else seen if len(seen) > 2 else seen[1:]
            parts.append((columns, seen, solver.coef_.T.copy(), solver.intercept_.copy()))

        def predict(features: np.ndarray) -> np.ndarray:
            # Classes never seen in training come last; the first of two has the logit 0.
            scores = np.full((len(features), num_classes), 0.0 if findings.ndim == 2 else -np.inf)
            for columns, seen, kernel, bias in parts:
                if findings.ndim == 1:
                    scores[:, seen[0]] = 0.0
                scores[:, columns] = standardise(features) @ kernel + bias[None]
            return scores

        return predict

    found = {value: [fit(value)] for value in options.c_values}
    if stopped:
        logging.warning(
            "logistic probe: %d iterations did not suffice at C = %s: raise probe.max_iterations to fit these in full",
            options.max_iterations,
            ", ".join(f"{value:g}" for value in sorted(stopped)),
        )
    return found


def _fit_knn(
    train: Labelled, num_classes: int, options: ProbeOptions, seeds: Sequence[int]
) -> dict[float, list[Predict]]:
    del seeds  # nothing is random
    # Descending: of equals the first is chosen, and more neighbours are the more regular classifier.
    sizes = sorted({min(k, len(train.features)) for k in options.neighbours}, reverse=True)
    bank, chunk = jnp.asarray(train.features), int(np.clip(2**27 // len(train.features), 1, 4096))
    last: list = [None, None]  # features and their neighbours: the grid asks for the same images with every k

    def predict(features: np.ndarray, k: int) -> np.ndarray:
        if last[0] is not features:
            parts = (features[i : i + chunk] for i in range(0, len(features), chunk))
            found = [_nearest(jnp.asarray(part), bank, sizes[0]) for part in parts]
            last[:] = features, [np.concatenate(x) for x in zip(*found, strict=True)]
        similarity, nearest = last[1]
        return _votes(similarity[:, :k], train.labels[nearest[:, :k]], num_classes)

    return {float(k): [functools.partial(predict, k=k)] for k in sizes}


@functools.partial(jax.jit, static_argnames="k")
def _nearest(queries: jax.Array, bank: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Cosines [n, k] and rows [n, k] of the k nearest of `bank`, the nearest first."""
    unit = lambda x: x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)  # noqa: E731
    # In full: GPUs and TPUs would round the operands, and with them which neighbour is nearer.
    similarities = jnp.matmul(unit(queries), unit(bank).T, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.top_k(similarities, k)


def _votes(similarity: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Shares [n, F] of the weighted votes of neighbours: cosines [n, k], labels [n, k] or [n, k, F]."""
    weights = np.exp((similarity - 1.0) / TEMPERATURE)
    # Shares of an image's own votes: sums would rank it among other images by how near its neighbours are. Where all
    # neighbours agree the share is 1 to the bit, so that such images are equal.
    if labels.ndim == 3:
        votes, against = (np.einsum("nk,nkf->nf", weights, y) for y in (labels, 1 - labels))
        return votes / (votes + against)
    votes = np.zeros((len(labels), num_classes), weights.dtype)
    np.add.at(votes, (np.arange(len(labels))[:, None], labels), weights)
    return votes / votes.sum(1, keepdims=True)
