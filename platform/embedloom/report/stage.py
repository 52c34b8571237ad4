"""Writing ``summary.json`` and ``report.html`` of a run."""

from embedloom.report.page import render_page
from embedloom.report.summary import build_summary, loss_curve, read_score_file, read_stages
from embedloom.storage import Place

SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"


def write_report(run_place: Place) -> str:
    """Write both files from the manifests of a run, finished or not.

    Args:
        run_place: the run folder, ``runs/<name>``.

    Returns:
        Where the report is.

    Raises:
        DataError: no artefact there, or a corrupt manifest.
    """
    stages = read_stages(run_place)
    summary = build_summary(run_place, stages)
    curves = {stage.name: loss_curve(stage) for stage in stages if stage.name.startswith("training/")}
    run_place.write_json(SUMMARY_FILE, summary)
    run_place.write_bytes(REPORT_FILE, render_page(summary, stages, curves, read_score_file(stages)).encode())
    return f"{run_place.uri.rstrip('/')}/{REPORT_FILE}"
