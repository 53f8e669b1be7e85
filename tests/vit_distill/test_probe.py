"""Probes against numpy in float64, scikit-learn and values by hand; the test set is scored once.

Axes: N images, D feature width, F classes or findings, G learning rates.
"""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from vit_distill import probe as module
from vit_distill.linear_probe import train_linear
from vit_distill.probe import HYPER_PARAMETERS, Labelled, ProbeOptions, probe, score_metrics

WIDTH, CLASSES = 6, 3
OPTIONS = ProbeOptions(
    epochs=40,
    warmup_epochs=2,
    batch_size=32,
    learning_rates=(3.0, 30.0),
    c_values=(0.01, 1.0),
    max_iterations=1000,
    neighbours=(1, 5),
)


def make_set(num: int, seed: int, multi: bool = False, noise: float = 1.0) -> Labelled:
    """Three Gaussian clusters with an offset and unequal scales; with `multi`, three findings from the features."""
    rng = np.random.default_rng(seed)
    centres = 2.0 * np.random.default_rng(99).normal(size=(CLASSES, WIDTH))
    labels = np.arange(num) % CLASSES
    x = centres[labels] + noise * rng.normal(size=(num, WIDTH))
    if multi:
        labels = (x[:, :CLASSES] + 0.3 * rng.normal(size=(num, CLASSES)) > 0).astype(np.float32)
    return Labelled((5.0 + x * np.geomspace(0.1, 10.0, WIDTH)).astype(np.float32), labels)


SETS = make_set(120, 0), make_set(60, 1), make_set(90, 2)


def reference_lars(data: Labelled, kernel: np.ndarray, orders: list[np.ndarray], peak: float, schedule: Any) -> tuple:
    """MAE's linear probe in float64: batch norm, gradient by hand, LARS with the rate outside the momentum.

    Returns kernel, bias, mean and variance.
    """
    x, y = data.features.astype(np.float64), data.labels
    target = y if y.ndim == 2 else np.eye(kernel.shape[1])[y]
    kernel, bias = kernel.astype(np.float64), np.zeros(kernel.shape[1])
    speed_kernel, speed_bias = np.zeros_like(kernel), np.zeros_like(bias)
    for step, rows in enumerate(orders):
        batch = x[rows]
        normed = (batch - batch.mean(0)) / np.sqrt(batch.var(0) + 1e-6)
        logits = normed @ kernel + bias
        if y.ndim == 2:
            error = (1 / (1 + np.exp(-logits)) - target[rows]) / target[rows].size
        else:
            weights = np.exp(logits)
            error = (weights / weights.sum(1, keepdims=True) - target[rows]) / len(rows)
        grad = normed.T @ error
        rate = peak * schedule(step)
        speed_kernel = 0.9 * speed_kernel + 0.001 * np.linalg.norm(kernel) / np.linalg.norm(grad) * grad
        speed_bias = 0.9 * speed_bias + error.sum(0)
        kernel, bias = kernel - rate * speed_kernel, bias - rate * speed_bias
    return kernel, bias, x.mean(0), x.var(0)


@pytest.mark.parametrize("multi", [False, True])
def test_linear_probe_equals_lars_in_numpy(multi: bool):
    """70 images at batch 32: three batches of 23, one image sits out each epoch."""
    data, rates, epochs, warmup, seed = make_set(70, 0, multi), (1.0, 30.0), 5, 2, 3
    key_init, key_order = jax.random.split(jax.random.key(seed))
    kernel = 0.01 * np.asarray(jax.random.normal(key_init, (1, WIDTH, CLASSES)))[0]
    orders = [np.asarray(jax.random.permutation(jax.random.fold_in(key_order, e), 70)) for e in range(epochs)]
    batches = [order[start : start + 23] for order in orders for start in (0, 23, 46)]

    def schedule(step: int) -> float:
        """Linear to 1 at update 6, then half a cosine to 0 at update 16, one after the last."""
        t = step + 1
        return t / 6 if t <= 6 else 0.5 * (1 + np.cos(np.pi * (t - 6) / (16 - 6)))

    heads = train_linear(
        *data, CLASSES, learning_rates=rates, epochs=epochs, warmup_epochs=warmup, batch_size=32, seed=seed
    )
    for i, rate in enumerate(rates):
        expected = reference_lars(data, kernel, batches, rate * 23 / 256, schedule)
        found = heads.kernel[i], heads.bias[i], heads.mean, heads.variance
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)
    x = data.features[:4].astype(np.float64)
    logits = (x - expected[2]) / np.sqrt(expected[3] + 1e-6) @ expected[0] + expected[1]
    np.testing.assert_allclose(heads.scores(data.features[:4], 1), logits, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", module.KINDS)
@pytest.mark.parametrize("multi", [False, True])
def test_every_probe_learns_and_repeats(kind: str, multi: bool):
    sets = [make_set(120, 0, multi), make_set(60, 1, multi), make_set(90, 2, multi)]
    found = probe(*sets, kind, options=OPTIONS)
    assert found["mean_auc" if multi else "top1"] > (0.75 if multi else 0.85)
    assert found[HYPER_PARAMETERS[kind]] in (1.0, 5.0, 0.01, 30.0)
    assert found == probe(*sets, kind, options=OPTIONS)


def test_logistic_probe_equals_scikit_learn():
    train, valid, test = (make_set(n, s, noise=3.0) for n, s in ((60, 0), (60, 1), (90, 2)))
    mean, std = train.features.mean(0), train.features.std(0)
    scores, losses = {}, {}
    for c in OPTIONS.c_values:
        model = LogisticRegression(C=c, max_iter=1000).fit((train.features - mean) / std, train.labels)
        scores[c] = [model.score((s.features - mean) / std, s.labels) for s in (valid, test)]
        losses[c] = log_loss(valid.labels, model.predict_proba((valid.features - mean) / std))
    assert scores[0.01][0] == scores[1.0][0]  # as many images of each class: their balanced accuracies are equal too
    best = min(losses, key=losses.get)
    assert best == 1.0  # not the first
    found = probe(train, valid, test, "logistic", options=OPTIONS)
    assert found["c"] == best
    assert [found["valid_top1"], found["top1"]] == pytest.approx(scores[best])
    assert found["top1"] < 0.95  # hard enough to tell right from wrong


@pytest.mark.parametrize(
    ("iterations", "said"), [(3, "3 iterations did not suffice at C = 0.01, 1: raise"), (1000, "")]
)
def test_a_logistic_fit_that_was_cut_short_is_said_in_one_line(iterations: int, said: str, caplog, recwarn):
    probe(*SETS, "logistic", options=replace(OPTIONS, max_iterations=iterations))
    assert len(caplog.messages) == bool(said)
    assert said in caplog.text
    assert not list(recwarn)


def test_knn_equals_scikit_learn_and_its_votes_are_weighted():
    train, valid, test = (make_set(n, s, noise=3.0) for n, s in ((60, 0), (60, 1), (90, 2)))
    model = KNeighborsClassifier(5, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07))
    model.fit(*train)
    found = probe(train, valid, test, "knn", options=replace(OPTIONS, neighbours=(5,)))
    assert found["top1"] == pytest.approx(model.score(*test))
    assert found["valid_top1"] == pytest.approx(model.score(*valid))
    assert found["at_grid_edge"] == 0.0  # a fixed value is no edge
    fit = module._fit_knn(train, CLASSES, replace(OPTIONS, neighbours=(5, 500)), ())
    assert list(fit) == [60.0, 5.0]  # no more neighbours than images
    votes = fit[5.0][0](test.features)
    np.testing.assert_allclose(votes, model.predict_proba(test.features), rtol=1e-3, atol=1e-5)


def make_uneven(num: int, seed: int, multi: bool) -> Labelled:
    """Two kinds of images, one with nearer neighbours than the other; with `multi`, a finding and the lack of it."""
    rng = np.random.default_rng(seed)
    labels, dense = np.arange(num) % 2, np.arange(num) % 4 < 2
    centres, scale = 3.0 * np.random.default_rng(99).normal(size=(2, WIDTH)), np.where(dense, 0.3, 1.5)
    x = centres[dense.astype(int)] + rng.normal(size=(num, WIDTH)) * scale[:, None]
    x[:, 0] += 1.5 * scale * labels
    return Labelled(x.astype(np.float32), np.stack([labels, 1 - labels], 1).astype(np.float32) if multi else labels)


@pytest.mark.parametrize("k", [5, 20])
def test_auc_of_knn_is_that_of_scikit_learn_and_of_complements_equal(k: int):
    classes, findings = (
        [make_uneven(n, s, multi) for n, s in ((200, 0), (80, 1), (160, 2))] for multi in (False, True)
    )
    model = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07))
    train, _, test = classes
    expected = roc_auc_score(test.labels, model.fit(*train).predict_proba(test.features)[:, 1])
    options = replace(OPTIONS, neighbours=(k,))
    found = probe(*findings, "knn", classes=("yes", "no"), options=options)
    assert [found["auc/yes"], found["auc/no"]] == pytest.approx([expected] * 2, abs=1e-3)
    assert probe(*classes, "knn", options=options)["auc"] == pytest.approx(expected, abs=1e-3)


def test_of_equal_numbers_of_neighbours_the_larger_is_chosen():
    train, valid, test = (make_set(n, s, noise=0.01) for n, s in ((60, 0), (30, 1), (30, 2)))
    found = probe(train, valid, test, "knn", options=replace(OPTIONS, neighbours=(1, 5)))
    assert (found["valid_top1"], found["neighbours"], found["at_grid_edge"]) == (1.0, 5.0, 0.0)


def test_valid_chooses_and_test_is_scored_once(monkeypatch: pytest.MonkeyPatch):
    train, valid, test = SETS
    seen = []

    def counted(scores: np.ndarray, labels: np.ndarray, classes: Any) -> dict[str, float]:
        seen.append(len(labels))
        return score_metrics(scores, labels, classes)

    monkeypatch.setattr(module, "score_metrics", counted)
    first = probe(train, valid, test, "linear", seeds=(0, 1), options=OPTIONS)
    assert seen.count(len(test.labels)) == 2  # once a seed
    assert seen[-2:] == [len(test.labels)] * 2  # after every choice
    wrong = Labelled(test.features, (test.labels + 1) % CLASSES)
    second = probe(train, valid, wrong, "linear", seeds=(0, 1), options=OPTIONS)
    assert second["learning_rate"] == first["learning_rate"]
    assert second["valid_top1"] == first["valid_top1"]
    assert second["top1"] < 0.2 < first["top1"]


def test_seeds_give_mean_and_deviation():
    options = replace(OPTIONS, epochs=2, warmup_epochs=1, batch_size=32, learning_rates=(3.0,))
    single = [probe(*SETS, "linear", seeds=(s,), options=options)["top1"] for s in (0, 1, 2)]
    found = probe(*SETS, "linear", seeds=(0, 1, 2), options=options)
    assert len(set(single)) > 1
    assert found["top1"] == pytest.approx(np.mean(single))
    assert found["top1_std"] == pytest.approx(np.std(single, ddof=1))
    assert found["num_seeds"] == 3


def test_metrics_by_hand():
    scores = np.array([[0.1, 0.7, 0.2, 0, 0, 0], [6, 5, 4, 3, 2, 1], [1, 1, 0, 0, 0, 0]], np.float32)
    found = score_metrics(scores, np.array([1, 5, 1]), list("abcdef"))
    # Right; last of six; equal to class 0, which goes first.
    # Of class 1 half was found, of 5 nothing; class 1 is ranked behind the other image, class 5 before both.
    assert found == pytest.approx({"top1": 1 / 3, "top5": 2 / 3, "balanced_accuracy": 0.25, "mean_auc": 0.5})
    found = score_metrics(np.array([[0, 0.1], [0, 0.4], [0, 0.3], [0, 0.8]]), np.array([0, 0, 1, 1]), ["no", "yes"])
    assert found == pytest.approx({"top1": 0.5, "balanced_accuracy": 0.5, "auc": 0.75})
    found = score_metrics(np.eye(2)[[0, 0, 1]], np.array([0, 0, 0]), ["no", "yes"])
    assert found == pytest.approx({"top1": 2 / 3, "balanced_accuracy": 2 / 3})  # one class: no AUC
    labels = np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0]], np.float32)
    found = score_metrics(np.array([[2, 1, 0], [1, 1, 0], [0, 0, 0.0]]), labels, ["x", "y", "z"])
    assert found == pytest.approx({"mean_auc": 0.625, "auc/x": 0.5, "auc/y": 0.75, "auc/z": np.nan}, nan_ok=True)
    with pytest.raises(ValueError, match="no finding"):
        score_metrics(np.zeros((2, 3)), np.zeros((2, 3)), ["x", "y", "z"])


def test_choice_takes_the_first_of_equals_and_sees_the_edge():
    assert module.choose({1: 0.5, 2: 0.7, 3: 0.7}) == (2, False)
    assert module.choose({1: 0.7, 2: 0.7, 3: 0.6}) == (1, False)  # the grid goes on as it was: no better value in sight
    assert module.choose({1: 0.8, 2: 0.7, 3: 0.6}) == (1, True)
    assert module.choose({1: 0.5, 2: 0.7, 3: 0.8}) == (3, True)
    assert module.choose({1: 0.5}) == (1, False)
    assert module.choose({1: 0.7, 2: 0.7, 3: 0.6}, {1: -2.0, 2: -1.0, 3: 0.0}) == (2, False)
    assert module.choose({1: 0.7, 2: 0.7}, {1: -1.0, 2: -1.0}) == (1, False)


@pytest.mark.parametrize(
    ("num_classes", "labels", "wanted"),
    [
        (2, [[0, 1, 1], [0, 1]], "auc"),
        (2, [[0, 1, 1], [0, 0]], "balanced_accuracy"),  # no AUC of the second
        (3, [[0, 1, 1]], "balanced_accuracy"),
        (2, [[[0, 1], [1, 1]]], "mean_auc"),
    ],
)
def test_what_is_wanted_is_defined(num_classes: int, labels: list, wanted: str):
    assert module.wanted_metric(num_classes, *map(np.asarray, labels)) == wanted


def make_rare(num: int, seed: int, classes: int = 2, share: float = 0.06) -> Labelled:
    """Class 0 but for a share of images, which lie a little aside, each class in a direction of its own."""
    rng = np.random.default_rng(seed)
    labels = np.where(np.arange(num) < share * num, 1 + np.arange(num) % (classes - 1), 0)
    return Labelled((rng.normal(size=(num, 24)) + 1.2 * np.eye(24)[labels]).astype(np.float32), labels)


@pytest.mark.parametrize("kind", ["linear", "logistic"])
def test_a_rare_class_has_a_say_in_the_choice(kind: str):
    """By top1 every value that always says "normal" would be as good, and the first of them barely trained."""
    options = replace(OPTIONS, epochs=20, batch_size=128, learning_rates=(0.01, 100.0), c_values=(1e-6, 0.1))
    sets = make_rare(400, 0), make_rare(100, 1), make_rare(400, 2)
    found = probe(*sets, kind, options=options)
    assert found[HYPER_PARAMETERS[kind]] in (100.0, 0.1)
    assert found["auc"] > 0.8
    assert found["valid_auc"] > 0.7
    assert (found["majority_share"], found["all_tied"]) == (0.94, 0.0)


def test_values_that_are_all_equal_are_said():
    options = replace(OPTIONS, c_values=(1e-6, 1e-5, 1e-4))
    found = probe(make_rare(200, 0, 3), make_rare(60, 1, 3), make_rare(100, 2, 3), "logistic", options=options)
    assert (found["all_tied"], found["valid_balanced_accuracy"], found["balanced_accuracy"]) == (1.0, 1 / 3, 1 / 3)
    assert found["top1"] == found["majority_share"] == 0.94
    assert found["c"] == 1e-4  # by the cross-entropy
    assert probe(*SETS, "logistic", options=replace(options, c_values=(1.0,)))["all_tied"] == 0.0


def test_metrics_of_uneven_classes_equal_scikit_learn():
    train, valid, test = (make_rare(n, s, 4, share=0.4) for n, s in ((300, 0), (100, 1), (500, 2)))
    mean, std = train.features.mean(0), train.features.std(0)
    model = LogisticRegression(C=1.0, max_iter=1000).fit((train.features - mean) / std, train.labels)
    found = probe(train, valid, test, "logistic", options=replace(OPTIONS, c_values=(1.0,)))
    for prefix, (features, labels) in (("", test), ("valid_", valid)):
        shares = model.predict_proba((features - mean) / std)
        assert found[f"{prefix}balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, shares.argmax(1)))
        expected = roc_auc_score(labels, shares, multi_class="ovr")
        assert found[f"{prefix}mean_auc"] == pytest.approx(expected, abs=1e-4)
    neighbours = KNeighborsClassifier(5, metric="cosine", algorithm="brute", weights=lambda d: np.exp(-d / 0.07))
    expected = roc_auc_score(test.labels, neighbours.fit(*train).predict_proba(test.features), multi_class="ovr")
    found = probe(train, valid, test, "knn", options=replace(OPTIONS, neighbours=(5,)))
    assert found["mean_auc"] == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind", module.KINDS)
def test_a_class_that_train_lacks_is_never_the_answer(kind: str):
    """Two of three classes in train: the third is wrong, the other two are told apart."""
    train, valid, test = SETS
    kept = train.labels != 1
    found = probe(Labelled(train.features[kept], train.labels[kept]), valid, test, kind, options=OPTIONS)
    assert 0.5 < found["top1"] <= 2 / 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kind="svm"), "probe kind: expected one of .*'knn'.*found 'svm'"),
        (dict(valid=Labelled(np.zeros((0, WIDTH)), np.zeros(0))), "valid: no images.*data.valid_fraction"),
        (dict(test=Labelled(np.zeros((2, 5)), np.zeros(2))), r"test: expected features \[N, 6\].*found \[2, 5\]"),
        (dict(train=Labelled(SETS[0].features, SETS[0].labels - 1)), "train: 40 of 120 images have no label"),
        (dict(train=Labelled(SETS[0].features, 0 * SETS[0].labels)), "two classes"),
        (dict(classes=("a", "b")), "expected labels of 2 classes, found 3"),
        (dict(train=make_set(9, 0, multi=True)), r"valid: .*labels \[N, F\]"),
        (dict(options=replace(OPTIONS, epochs=0)), "epochs 0"),
        (dict(options=replace(OPTIONS, batch_size=1)), "two images a batch"),
    ],
)
def test_what_does_not_fit_is_named(change: dict, message: str):
    arguments = dict(zip(("train", "valid", "test"), SETS, strict=True)) | change
    with pytest.raises(ValueError, match=message):
        probe(**{"options": OPTIONS} | arguments)
