"""The artefacts of a run as a graph: columns by how far from the corpus, lines from what was made to what it was made from."""

from html import escape

from embedloom.report.summary import Stage

_WIDTH, _HEIGHT = 168, 40  # of a box, in pixels
_ACROSS, _DOWN = 46, 14  # between boxes
_SHOWN = 8  # digits of a fingerprint


def lineage_graph(stages: list[Stage]) -> str:
    """An inline SVG; inputs that were rebuilt since are drawn dashed."""
    columns = _columns(stages)
    place = {
        stage.name: (column * (_WIDTH + _ACROSS), row * (_HEIGHT + _DOWN))
        for column, found in enumerate(columns)
        for row, stage in enumerate(found)
    }
    width = len(columns) * (_WIDTH + _ACROSS) - _ACROSS
    height = max(len(found) for found in columns) * (_HEIGHT + _DOWN) - _DOWN
    title = "Artefacts and what they were made from"
    parts = [*_edges(stages, place), *(_box(stage, *place[stage.name]) for stage in stages)]
    return (
        f'<svg viewBox="-1 -1 {width + 2} {height + 2}" width="{width + 2}" height="{height + 2}" role="img" '
        f'aria-label="{title}"><title>{title}</title>{"".join(parts)}</svg>'
    )


def _columns(stages: list[Stage]) -> list[list[Stage]]:
    """Stages by the longest way to an artefact without inputs."""
    by_name = {stage.name: stage for stage in stages}
    depth: dict[str, int] = {}
    for stage in stages:  # pipeline order: inputs come first
        depth[stage.name] = max(
            (depth.get(name, -1) + 1 for name in stage.inputs if name in by_name), default=0
        )
    columns: list[list[Stage]] = [[] for _ in range(max(depth.values()) + 1)]
    for stage in stages:
        columns[depth[stage.name]].append(stage)
    return [column for column in columns if column]


def _edges(stages: list[Stage], place: dict[str, tuple[int, int]]) -> list[str]:
    now = {stage.name: stage.manifest["fingerprint"] for stage in stages if stage.manifest}
    lines = []
    for stage in stages:
        x, y = place[stage.name]
        for name, recorded in stage.inputs.items():
            if name in place:
                from_x, from_y = place[name]
                start, end = (from_x + _WIDTH, from_y + _HEIGHT // 2), (x, y + _HEIGHT // 2)
                middle = end[0] - _ACROSS // 2
                dashed = "" if now.get(name) == recorded else ' stroke-dasharray="4 3"'
                lines.append(
                    f'<path class="edge" d="M{start[0]} {start[1]} C{middle} {start[1]} {middle} {end[1]} {end[0]} {end[1]}"'
                    f"{dashed}><title>{escape(stage.name)} was made from {escape(name)}</title></path>"
                )
    return lines


def _box(stage: Stage, x: int, y: int) -> str:
    mark = stage.manifest["fingerprint"][:_SHOWN] if stage.manifest else "unfinished"
    name = stage.name.removeprefix("training/")
    return (
        f'<rect class="node" x="{x}" y="{y}" width="{_WIDTH}" height="{_HEIGHT}" rx="4"/>'
        f'<text x="{x + 8}" y="{y + 17}">{escape(name)}</text>'
        f'<text class="tick" x="{x + 8}" y="{y + 33}">{escape(mark)}</text>'
    )
