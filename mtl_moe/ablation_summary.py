"""From the outcomes of an ablation to its table: means over seeds, paired differences, the choice, the files.

Every difference to the base has an interval from the paired bootstrap of the test images by patient or group; within
it, metrics are means over seeds. Axes: K seeds, N test images.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from core.bootstrap import bootstrap_difference, possible_resamples
from core.files import write_json, write_text
from core.provenance import environment
from core.report import save_png
from core.table import mean_and_std
from mtl_moe.ablation_cell import Measured, Stored
from mtl_moe.ablation_report import figure, markdown, write_page
from mtl_moe.ablation_rows import Row


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One row with one seed: what it is and cost (cell.json), and what it scored; None if it does not train."""

    row: str
    facts: Mapping[str, Any]
    measured: Measured | None = None
    stored: Stored | None = None


def summarise(rows: Mapping[str, Row], outcomes: Sequence[Outcome], num_resamples: int) -> list[dict[str, Any]]:
    """One dict for each row that has outcomes, in the order of `rows`; the first row is the base.

    Keys: row, title, trained, n (seeds with results), error; num_params, gflops, num_steps; the means over seeds
    image_auroc, image_ap, normal_vs_calibration, abnormal_vs_calibration, painted_unseen, painted_trained,
    pixel_auroc, aupro, train_seconds, score_images_per_second (None where there are none; "_std": sample deviation,
    None for one seed); difference to the base over the seeds that both have, with interval (low, high) and
    difference_std; rank_test, rank_painted (1 is best); evidences and painted: the means by evidence, and by evidence
    (FUSED among them) and family.
    """
    by_row: dict[str, list[Outcome]] = {name: [] for name in rows}
    for outcome in outcomes:
        by_row[outcome.row].append(outcome)
    base_name = next(iter(rows))
    base = _good(by_row[base_name])
    table = []
    for name, members in by_row.items():
        if not members:
            continue
        good, facts = _good(members), members[0].facts
        entry = {"row": name, "title": rows[name].title, "trained": rows[name].trained, "n": len(good)}
        entry["error"] = next((member.facts["error"] for member in members if "error" in member.facts), None)
        entry |= {key: facts[key] for key in ("num_params", "gflops", "num_steps")}
        entry |= _means(good)
        entry |= _difference(good if name != base_name else [], base, num_resamples)
        entry["evidences"] = _mean_of([m.measured.evidences for m in good])
        names = good[0].measured.painted if good else ()
        entry["painted"] = {key: _mean_of([m.measured.painted[key] for m in good]) for key in names}
        table.append(entry)
    for rank, key in (("rank_test", "image_auroc"), ("rank_painted", "painted_unseen")):
        ranked = sorted((entry[key] for entry in table if entry[key] is not None), reverse=True)
        for entry in table:
            entry[rank] = None if entry[key] is None else 1 + ranked.index(entry[key])
    return table


def _good(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.measured is not None]


def _means(outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    readers: dict[str, Callable[[Outcome], float | None]] = {
        "image_auroc": lambda o: o.measured.test["image_auroc"],
        "image_ap": lambda o: o.measured.test["image_ap"],
        "normal_vs_calibration": lambda o: o.measured.test["normal_vs_calibration"],
        "abnormal_vs_calibration": lambda o: o.measured.test["abnormal_vs_calibration"],
        "painted_unseen": lambda o: o.measured.criteria["unseen"],
        "painted_trained": lambda o: o.measured.criteria["trained"],
        "pixel_auroc": lambda o: o.facts["pixels"].get("pixel_auroc"),
        "aupro": lambda o: o.facts["pixels"].get("aupro"),
        "train_seconds": lambda o: o.facts["train_seconds"],
        "score_images_per_second": lambda o: o.facts["score_images_per_second"],
    }
    means: dict[str, float | None] = {}
    for key, read in readers.items():
        values = [value for value in map(read, outcomes) if value is not None]
        means[key], means[f"{key}_std"] = mean_and_std(values)
    return means


def _mean_of(dicts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.fmean(one[key] for one in dicts) for key in dicts[0]} if dicts else {}


def _difference(outcomes: Sequence[Outcome], others: Sequence[Outcome], num_resamples: int) -> dict[str, Any]:
    """Mean over the common seeds of the difference in image AUROC, with its paired interval and deviation over seeds.

    Without resamples there is no interval.

    Raises:
      ValueError: if the two were not scored on the same images.
    """
    partner = {other.facts["seed"]: other for other in others}
    pairs = [(o, partner[o.facts["seed"]]) for o in outcomes if o.facts["seed"] in partner]
    if not pairs:
        return {"difference": None, "interval": None, "difference_std": None}
    reference = pairs[0][1].stored
    for outcome in itertools.chain.from_iterable(pairs):
        if not np.array_equal(outcome.stored.names, reference.names):
            raise ValueError(
                f"row {outcome.row}, seed {outcome.facts['seed']} was scored on other test images than the base: the "
                "data have changed since; use another --workdir"
            )
    differences = [a.measured.test["image_auroc"] - b.measured.test["image_auroc"] for a, b in pairs]
    interval = None
    if num_resamples:
        scores = (np.stack([pair[side].measured.scores for pair in pairs]) for side in (0, 1))
        labels, groups = reference.labels, reference.groups
        interval = list(bootstrap_difference("auroc", *scores, labels, groups, num_resamples))
    mean, std = mean_and_std(differences)
    return {"difference": mean, "interval": interval, "difference_std": std}


def choose(
    table: Sequence[Mapping[str, Any]], outcomes: Sequence[Outcome], num_resamples: int
) -> dict[str, Any] | None:
    """What the normal-only criterion chooses, beside what the test split would have chosen; None below two rows.

    Returns:
      {chosen, best_on_test, same; difference in image AUROC of the first to the second with its paired interval;
      num_rows, spearman and p_value of the two orders of rows (None for two rows, or where all are alike)}.
    """
    found = [entry for entry in table if entry["n"]]
    if len(found) < 2:
        return None
    chosen = max(found, key=lambda entry: entry["painted_unseen"])["row"]
    best = max(found, key=lambda entry: entry["image_auroc"])["row"]
    compared = [_good([outcome for outcome in outcomes if outcome.row == name]) for name in (chosen, best)]
    columns = [[entry[key] for entry in found] for key in ("painted_unseen", "image_auroc")]
    varied = len(found) > 2 and all(len(set(column)) > 1 for column in columns)
    correlation = stats.spearmanr(*columns) if varied else None
    difference = _difference(*compared, num_resamples)
    return {
        "chosen": chosen,
        "best_on_test": best,
        "same": chosen == best,
        "difference": difference["difference"],
        "interval": difference["interval"],
        "num_rows": len(found),
        "spearman": float(correlation.statistic) if varied else None,
        "p_value": float(correlation.pvalue) if varied else None,
    }


def write_summary(
    config: Any, facts: Mapping[str, str], rows: Mapping[str, Row], outcomes: Sequence[Outcome], workdir: Path
) -> list[dict[str, Any]]:
    """Writes table.md, table.json, table.png and report.html of the outcomes there are; returns `summarise`'s rows.

    Args:
      facts: what all rows share, for readers, its "data" the page's subtitle.
    """
    stored = next((outcome.stored for outcome in outcomes if outcome.stored is not None), None)
    resamples = possible_resamples(stored.labels, stored.groups, config.score.bootstrap) if stored else 0
    table = summarise(rows, outcomes, resamples)
    choice = choose(table, outcomes, resamples)
    title = f"Ablation on {config.data.name}"
    write_text(workdir / "table.md", markdown(title, facts, table, choice))
    content = {"facts": facts, "rows": table, "choice": choice, "provenance": environment()}
    write_json(workdir / "table.json", content)
    save_png(workdir / "table.png", figure(table))
    write_page(
        workdir / "report.html",
        title=title,
        facts=facts,
        table=table,
        choice=choice,
        provenance=content["provenance"],
        config=config.to_dict(),
    )
    return table
