"""The detector's report.html: how good it is, on which cases, beside which floors, and how to read it.

Everything shown was computed by the evaluation; this module only words and draws it. Axis alphabet: H W C image, N test
images, M calibration normals, T tasks, E experts.
"""

from pathlib import Path

import numpy as np
from markupsafe import Markup

from core import report as page
from core.metrics import roc_curve
from mtl_moe import report_figures as figures
from mtl_moe.report_calibration import calibration_section
from mtl_moe.report_comparison import drop_empty_columns, floors_section, tasks_section
from mtl_moe.report_data import Case, ReportData, span
from mtl_moe.report_painted import painted_section
from mtl_moe.report_patients import patients_section

DISCLAIMER = (
    "For research use. Not a medical device: not evaluated for, and not to be used for, diagnosis or any decision "
    "about a patient."
)
_METRIC_NAMES = {
    "image_auroc": "Image AUROC",
    "image_ap": "Image average precision",
    "pixel_auroc": "Pixel AUROC",
    "pixel_ap": "Pixel average precision",
    "aupro": "AUPRO (exact, to 30 % false positives)",
    "aupro_bmad": "AUPRO (BMAD's formula)",
    "matched_auroc": "Image AUROC over pairs of like contrast",
    "floor_matched_auroc": "Image AUROC over pairs alike in the strongest floor",
}


def write_report(path: str | Path, results: ReportData) -> None:
    """Writes the page as one self-contained HTML file; an earlier page stays whole when this fails."""
    normals_tested = results.tested and np.any(results.labels == 0)
    sections = [
        page.Section("Result", _result(results)),
        page.Section("How to read this page", _reading_guide(results)),
        page.Section("Scores", _scores(results)),
        page.Section("Patients", _patients(results)) if results.patients else None,
        page.Section("Painted defects", painted_section(results.painted)) if results.painted else None,
        page.Section("Thresholds", _thresholds(results)) if results.thresholds else None,
        page.Section("Cases", _cases(results)) if results.cases else None,
        page.Section("Tasks", tasks_section(results)) if results.grouped("task", "image_auroc") else None,
        page.Section("Floors", floors_section(results)) if results.grouped("floor", "image_auroc") else None,
        page.Section("Calibration", calibration_section(results)) if normals_tested else None,
        page.Section("Router", _router(results)) if results.router else None,
        page.Section("Training", _training(results)) if any("loss" in r for r in results.history) else None,
        page.Section("Provenance", _provenance(results)),
    ]
    page.write_page(
        path,
        title=f"Anomaly report: {results.dataset}",
        subtitle=f"{results.layout} · {DISCLAIMER}",
        sections=[section for section in sections if section is not None],
        footer=DISCLAIMER,
    )


def p_value_phrase(p_value: float, num_calibration: int) -> str:
    """A p-value in words, e.g. "1 of 200 normals looks this odd"."""
    if p_value * (num_calibration + 1) <= 1 + 1e-6:  # the smallest value that so many normals can give
        return f"odder than all {num_calibration} calibration normals"
    if p_value <= 0.1:
        return f"{figures.one_in(p_value)} normals looks this odd"
    return f"{figures.one_in(p_value)} normals look this odd"


def _result(results: ReportData) -> Markup:
    parts = [page.paragraph(results.headline, "lead")]
    if results.caution:
        parts.append(page.paragraph(results.caution, "callout warn"))
    if not results.has_both:
        known = "All labelled images are of one kind" if np.any(results.labels >= 0) else "No labels are known"
        return page.join(
            [
                *parts,
                page.paragraph(
                    f"{known}: this page shows scores, p-values and cases; accuracy cannot be stated."
                    + (" What is noticed of painted defects is shown below." if results.painted else ""),
                    "callout",
                ),
            ]
        )
    key = results.prefix + "image_auroc"
    auroc = results.metrics[key]
    interval = f" (95 % interval {span(results.intervals[key])})" if key in results.intervals else ""
    sentence = (
        f"Of 100 pairs of one abnormal and one normal image, the detector gives the abnormal one the higher score in "
        f"{round(100 * auroc)}: image AUROC {auroc:.3f}{interval}. Guessing would reach 50."
    )
    parts += [page.paragraph(sentence), *_floor_verdict(results)]
    if key in results.intervals and results.intervals[key][0] <= 0.5:
        parts.append(
            page.paragraph(
                "The interval includes 0.5: this test does not tell the detector from guessing.", "callout warn"
            )
        )
    cards = []
    for name, label in _METRIC_NAMES.items():
        metric = results.prefix + name
        if results.value(name):
            note = f"95 %: {span(results.intervals[metric])}" if metric in results.intervals else ""
            cards.append(page.stat(f"{results.metrics[metric]:.3f}", label, note))
    prevalence = np.mean(results.labels[results.labels >= 0])
    note = f"Chance level: 0.5 for AUROC, {prevalence:.2f} for image average precision (the share of abnormal images)."
    return page.join([*parts, page.block(cards, "stats"), page.paragraph(note, "note")])


def _floor_verdict(results: ReportData) -> list[Markup]:
    floors = results.grouped("floor", "image_auroc")
    if not floors:
        return []
    name = max(floors, key=floors.__getitem__)
    what = f"“{name}”" + (f" ({results.floors[name]})" if name in results.floors else "")
    key = results.prefix + "image_auroc"
    auroc = results.metrics[key]
    alike = _floor_matched(results)
    if floors[name] >= auroc:
        text = (
            f"A floor is higher: {what} alone reaches {floors[name]:.3f}, the detector {auroc:.3f}. On these data the "
            f"detector has not shown by its AUROC that it adds anything to that.{alike}"
        )
        return [page.paragraph(text, "callout warn")]
    text = f"The strongest floor, {what}, reaches {floors[name]:.3f}"
    if key in results.intervals and floors[name] >= results.intervals[key][0]:
        text = f"{text}: lower, but inside the detector's interval, so the lead is not certain.{alike}"
        return [page.paragraph(text, "callout warn")]
    return [page.paragraph(f"{text}: the detector is {auroc - floors[name]:.3f} above it.{alike}", "callout")]


def _floor_matched(results: ReportData) -> str:
    """A sentence on pairs of images that the strongest floor of those without a network does not tell apart."""
    value = results.value("floor_matched_auroc")
    if not value:
        return ""
    (name, floor), *_ = results.grouped("floor", "floor_matched_auroc").items()
    return (
        f" Over pairs of a normal and an abnormal image alike in “{name}” it has {value}, “{name}” itself {floor:.3f}."
    )


def _reading_guide(results: ReportData) -> Markup:
    num = len(results.calibration_scores)
    items = [
        "The detector has seen normal images only. It solves several small tasks on an image (fill in hidden parts, "
        "remove noise, put tiles in order, …); where it fails, the image differs from the normals it knows. Different "
        "need not mean diseased: a rare position, a device or an artefact is odd as well.",
        "Score: how oddly an image behaves over all tasks, and how unusual the amount of its texture is, against "
        f"the {num} calibration normals, of which the first section says what they are. Higher is odder; there is no "
        "unit.",
        "p-value: the share of normal images that look at least as odd. 0.005 reads “1 of 200 normals looks this odd”. "
        "It is no probability of disease. It holds for images made like the calibration normals (same devices, same "
        "kind of patients); where test normals are known, the section Calibration checks it; where no label is, a box "
        "above says so if far more images are flagged than of normals would be.",
        "Map: where the tasks fail. All maps of all cases share one scale: 0 is the median of the calibration normals, "
        "1 their 95th percentile. A dark map says something too; no map is stretched to its own maximum.",
    ]
    if results.metrics:  # none are measured where no label is known
        items.append(
            "AUROC: the share of pairs of one abnormal and one normal image that the score puts in the right order. "
            "Floor: what simple means reach on the same images (mean brightness, contrast, an untrained network); a "
            "detector is worth what it adds to them."
        )
    return page.bullets(items)


def _scores(results: ReportData) -> Markup:
    labels, scores = results.labels, results.scores
    groups = {"calibration normals": results.calibration_scores}
    for label, name in ((0, "normal"), (1, "abnormal"), (-1, "unlabelled")):
        if results.tested and np.any(labels == label):
            groups[name] = scores[labels == label]
    histogram = page.chart(
        figures.score_figure(groups, results.thresholds),
        "Histograms of the scores",
        "Scores by group. Dotted: thresholds that flag the given share of normal images.",
    )
    if not results.has_both:
        return page.join([histogram, _ranking(results)])
    known = labels >= 0
    curve = roc_curve(scores[known], labels[known])[:2]
    evidences = {name: roc_curve(values[known], labels[known])[:2] for name, values in results.evidence_scores.items()}
    roc = page.chart(figures.roc_figure(curve, evidences), "ROC curves", "ROC curves on the test images.")
    return page.block([roc, histogram], "row")


def _patients(results: ReportData) -> Markup:
    return patients_section(results.patients, results.names, results.value("patient_auroc"))


def _ranking(results: ReportData) -> Markup:
    order = np.argsort(-results.scores, kind="stable")[:20]
    num = len(results.calibration_scores)
    rows = [
        [
            results.names[i],
            f"{results.scores[i]:.3f}",
            f"{results.p_values[i]:.4f}",
            p_value_phrase(results.p_values[i], num),
        ]
        for i in order
    ]
    caption = f"The {len(rows)} highest scores of {len(results.names)}; all of them are in predictions.csv."
    return page.table(["Image", "Score", "p-value", "In words"], rows, caption, text_columns=(0, 3))


def _thresholds(results: ReportData) -> Markup:
    rows = []
    for row in results.thresholds:
        observed, found = row.get("observed_fpr"), row.get("tpr")
        rows.append(
            [
                f"{figures.one_in(row['fpr'])} normals would be flagged",
                f"{row['threshold']:.3f}" if np.isfinite(row["threshold"]) else "never: too few calibration normals",
                f"{np.sum(results.scores >= row['threshold'])} of {len(results.scores)}",
                "" if observed is None else f"{100 * observed:.1f} %",
                "" if found is None else f"{round(100 * found)} of 100",
            ]
        )
    header = ["By design", "Flag from score", "Images flagged", "Test normals flagged", "Abnormal images found"]
    rows, header = drop_empty_columns(rows, header)
    caption = "Set on calibration normals alone; no abnormal image had a part in it."
    return page.table(header, rows, caption)


def _cases(results: ReportData) -> Markup:
    ramp = figures.map_colors(np.linspace(0, figures.COLOR_LIMIT, 256))
    limit = int(figures.COLOR_LIMIT)
    ticks = ["0", *(str(i) for i in range(1, limit)), f"≥{limit}"]
    bar = page.color_bar(ramp, ticks, "0: median of the calibration normals · 1: their 95th percentile")
    intro = (
        "Left the image, then the fused map laid over it (clear at 0, full colour from 1), then each task's own map. "
        "Cyan: outline of the annotated lesion, where there is one. All maps have one scale, that of the bars."
    )
    parts = [page.paragraph(intro)]
    for title in dict.fromkeys(case.section for case in results.cases):
        parts += [page.heading(title), bar]
        parts += [_case(case, len(results.calibration_scores)) for case in results.cases if case.section == title]
    return page.join(parts)


def _case(case: Case, num_calibration: int) -> Markup:
    shown, blended = figures.overlay(case.image, case.anomaly_map, case.mask)
    label = {1: "abnormal", 0: "normal"}.get(int(case.label), "label unknown")
    line = Markup("<p><b>{}</b> · {} · score {} · p = {}: {}</p>").format(
        case.name, label, f"{case.score:.3f}", f"{case.p_value:.4f}", p_value_phrase(case.p_value, num_calibration)
    )
    small = [
        page.picture(figures.evidence_map_pixels(values), f"map of {name}", name)
        for name, values in case.evidence_maps.items()
    ]
    pictures = [
        page.picture(shown, f"image {case.name}", "image"),
        page.picture(blended, f"anomaly map over {case.name}", "fused map"),
        page.block(small, "row"),
    ]
    return page.block([line, page.block(pictures, "row")], "card")


def _router(results: ReportData) -> Markup:
    figure = page.chart(
        figures.router_figure(results.router, results.tasks),
        "Router use per task",
        "Percent of a task's routed tokens that go to each expert. Equal rows: the tasks share; different rows: "
        "experts have specialised.",
    )
    sizes = {utilisation.shape[1] for utilisation in results.router.values()}
    even = ", ".join(f"{100 / size:.1f} % with {size} experts" for size in sorted(sizes))
    return page.join([figure, page.paragraph(f"Even use would be {even}.", "note")])


def _training(results: ReportData) -> Markup:
    return page.chart(
        figures.loss_figure(results.history), "Training losses", "Training losses, in total and per task."
    )


def _provenance(results: ReportData) -> Markup:
    rows = [
        [key, f"{value:.4f}", span(results.intervals[key]) if key in results.intervals else ""]
        for key, value in results.metrics.items()
    ]
    parts = [page.provenance(results.provenance, results.config)]
    if rows:
        parts.append(page.details("All metrics", page.table(["Metric", "Value", "95 % interval"], rows)))
    return page.join(parts)
