"""Where artefacts and rows come from (``explain``), and why those of two runs differ (``diff``)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow.compute as pc

from embedloom.config.reranker import BASE_NODE, GATE_NODE, MODEL_NODE, SCORES_NODE
from embedloom.config.run import RUN_FILE, read_run_file
from embedloom.core.artefacts import MANIFEST_FILE, Artefact
from embedloom.core.prompting import CONTRACT_FILE, PromptContract
from embedloom.core.storage import Place
from embedloom.core.trained_prompts import prompt_lines
from embedloom.errors import DataError, ServeError
from embedloom.serving.address import ask

# Finding the artefacts of a run, and rows in their tables.


FIXED = (
    "corpus", "encoder", "synthesis", "mining", "rescoring", "examples", "merged", "evaluation", "gate", "vectors", BASE_NODE, MODEL_NODE,
    SCORES_NODE, GATE_NODE,
)  # fmt: skip
# kind of row -> (artefact, folder) where such rows are
TABLES = {
    "document": (("corpus", "documents/train"), ("corpus", "documents/dev"), ("corpus", "documents/test")),
    "pair": (
        ("corpus", "pairs/train"),
        ("corpus", "pairs/dev"),
        ("corpus", "pairs/test"),
        ("synthesis", "pairs"),
    ),
    "example": (("examples", "examples"),),
    "candidates": (("mining", "candidates"), ("rescoring", "candidates")),
    "vector": (("vectors", "vectors"),),
    "reject": (
        ("corpus", "rejects"),
        ("synthesis", "rejects"),
        ("mining", "rejects"),
        ("examples", "rejects"),
        ("vectors", "rejects"),
    ),
}

Row = dict[str, Any]


def artefacts_of(run: Place) -> dict[str, Artefact]:
    """Finished artefacts of a run by name, corpus first.

    Raises:
        DataError: a corrupt manifest.
    """
    trained = [name for candidate in run.names("training") for name in run.names(candidate)]
    names = [*FIXED, *trained]
    return {name: Artefact.open(run.child(name)) for name in names if run.child(name).exists(MANIFEST_FILE)}


def rows_with(
    artefacts: dict[str, Artefact], kind: str, row_id: str, column: str = "id"
) -> Iterator[tuple[str, Row]]:
    """Rows with this id and the place each stands, ``corpus/pairs/train/part-000000.parquet:17``."""
    for name, folder in TABLES[kind]:
        if name not in artefacts:
            continue
        place = artefacts[name].place
        for file in place.names(folder, ".parquet"):
            hits = pc.equal(place.read_table(file, columns=[column]).column(column), row_id)
            positions = pc.indices_nonzero(hits).to_pylist()
            if positions:
                table = place.read_table(file)
                for position in positions:
                    yield f"{name}/{file}:{position}", table.slice(position, 1).to_pylist()[0]


def first_row(
    artefacts: dict[str, Artefact], kind: str, row_id: str, column: str = "id"
) -> tuple[str, Row] | None:
    """The first such row, if there is one."""
    return next(rows_with(artefacts, kind, row_id, column), None)


# The artefacts below an artefact: what it was made from, back to the corpus.


def run_tree(artefacts: dict[str, Artefact]) -> Iterator[str]:
    """The tree of inputs below the merged model, or below whatever is furthest along without one."""
    used = {name for artefact in artefacts.values() for name in artefact.manifest["inputs"]}
    roots = ["merged"] if "merged" in artefacts else [name for name in artefacts if name not in used]
    shown: set[str] = set()
    for root in roots:
        yield from tree(artefacts, root, None, "", shown)


def tree(
    artefacts: dict[str, Artefact], name: str, expected: str | None, indent: str, shown: set[str]
) -> Iterator[str]:
    """One artefact and, below it, what it was made from.

    Args:
        artefacts: of the run.
        name: where to begin.
        expected: the fingerprint its user recorded; None: whatever is there.
        indent: what stands before the line.
        shown: names that had their line; each is described once.
    """
    artefact = artefacts.get(name)
    if artefact is None:
        yield f"{indent}{name}  {expected}  no longer there"
        return
    if expected is not None and artefact.fingerprint != expected:
        yield f"{indent}{name}  {expected}  was rebuilt since, now {artefact.fingerprint}"
        return
    if name in shown:
        yield f"{indent}{name}  {artefact.fingerprint}  (see above)"
        return
    shown.add(name)
    yield f"{indent}{name}  {artefact.fingerprint}  {facts(artefact)}"
    for parent, recorded in artefact.manifest["inputs"].items():
        yield from tree(artefacts, parent, recorded, f"{indent}    ", shown)


def facts(artefact: Artefact) -> str:
    """Details and counts of an artefact, when it was built, by which settings and which code."""
    manifest = artefact.manifest
    counts = {key: value for key, value in manifest["counts"].items() if not isinstance(value, dict | list)}
    details = {key: value for key, value in manifest["details"].items() if not isinstance(value, dict | list)}
    found = [f"{key} {value}" for key, value in {**details, **counts}.items()]
    return ", ".join(
        [
            *found,
            f"built {manifest['created']}",
            f"config {manifest['config_fingerprint']}",
            code_of(artefact),
        ]
    )


def code_of(artefact: Artefact) -> str:
    """Version of the code that built it; artefacts of before it was recorded have the release alone."""
    versions = artefact.manifest["versions"]
    return f"code {versions.get('embedloom')}" + (f" {versions['code']}" if "code" in versions else "")


# One row: what it is, where it stands, and the rows it was made from.


_PREVIEW = 160  # characters of a text
_LISTED = 5  # pairs of a document, negatives of an example


def explain_row(run: Place, artefacts: dict[str, Artefact], row_id: str) -> Iterator[str]:
    """Lines about a vector, document, pair, example or refused row.

    Raises:
        DataError: no such row.
    """
    vector = first_row(artefacts, "vector", row_id)
    document = first_row(artefacts, "document", row_id)
    pair = first_row(artefacts, "pair", row_id)
    example = first_row(artefacts, "example", row_id)
    reject = first_row(artefacts, "reject", row_id)
    if not any((vector, document, pair, example, reject)):
        raise DataError(f"{run.uri}: no document, pair or example has the id {row_id!r}")
    if pair is not None:
        document = document or first_row(artefacts, "document", pair[1]["document_id"])
    if vector is not None:
        yield from _describe_vector(artefacts, *vector)
    if example is not None:
        yield from _describe_example(*example)
    if pair is not None:
        yield from _describe_pair(artefacts, *pair)
        for where, row in rows_with(artefacts, "candidates", pair[1]["id"], column="query_id"):
            yield from _describe_candidates(where, row)
    if document is not None:
        yield from _describe_document(artefacts, *document)
        if pair is None:
            yield from _describe_uses(artefacts, row_id)
    if reject is not None:
        yield f"rejected  {row_id}  in {reject[0]}: {reject[1]['reason']} ({reject[1]['detail']})"


def _describe_vector(artefacts: dict[str, Artefact], where: str, row: Row) -> Iterator[str]:
    """The vector, and the model that made it, back to its candidates."""
    details = artefacts["vectors"].manifest["details"]
    yield f"vector  {row['id']}  in {where}"
    yield f"    dimensions   {len(row['vector'])}, contract {details.get('contract_hash')}, {_made(artefacts, where)}"
    model_id = details.get("model_id")
    maker = next((name for name, one in artefacts.items() if one.fingerprint == model_id), None)
    yield f"    model        {maker or 'none of this run'} {model_id}"
    for parent, fingerprint in artefacts[maker].manifest["inputs"].items() if maker else ():
        found = artefacts.get(parent)
        counts = found.counts if found is not None and found.fingerprint == fingerprint else {}
        facts = ", ".join(
            f"{key} {counts[key]:,}"
            for key in ("steps", "rows", "tokens")
            if isinstance(counts.get(key), int)
        )
        yield f"        made from {parent} {fingerprint}{f', {facts}' if facts else ''}"


def _describe_document(artefacts: dict[str, Artefact], where: str, row: Row) -> Iterator[str]:
    yield f"document  {row['id']}  in {where}"
    yield f"    source       {row['source']}"
    if row.get("title"):
        yield f"    title        {_preview(row['title'])}"
    yield f"    text         {_preview(row['text'])}"
    yield f"    made by      {_made(artefacts, where)}"


def _describe_uses(artefacts: dict[str, Artefact], document_id: str) -> Iterator[str]:
    pairs = list(rows_with(artefacts, "pair", document_id, column="document_id"))
    yield f"    pairs        {len(pairs)}"
    for _, row in pairs[:_LISTED]:
        by = f" by {row['generator']}, prompt {row['prompt_hash']}" if row.get("generator") else ""
        yield f"        {row['id']}  {row['origin']}{by}  {_preview(row['query'])}"


def _describe_pair(artefacts: dict[str, Artefact], where: str, row: Row) -> Iterator[str]:
    yield f"pair  {row['id']}  in {where}"
    yield f"    query        {_preview(row['query'])}"
    yield f"    instruction  {row['instruction']}"
    yield f"    origin       {row['origin']}, task type {row['task_type']}"
    if row.get("generator"):
        yield f"    generator    {row['generator']}, prompt {row['prompt_hash']}{_prompt_of(artefacts, row)}"
    yield f"    document     {row['document_id']}"
    yield f"    made by      {_made(artefacts, where)}"


def _prompt_of(artefacts: dict[str, Artefact], row: Row) -> str:
    """Families whose prompt has the row's hash."""
    prompts: Any = (
        artefacts["synthesis"].manifest["details"].get("prompts") if "synthesis" in artefacts else None
    )
    rows = prompts.get("rows", {}) if isinstance(prompts, dict) else {}
    names = [key for key, value in rows.get(row["generator"], {}).items() if value == row["prompt_hash"]]
    return f" of {', '.join(names)}" if names else ""


def _describe_candidates(where: str, row: Row) -> Iterator[str]:
    yield f"candidates  in {where}"
    yield f"    teacher      {row['teacher']}, contract {row['contract_hash']}, {len(row['document_ids'])} kept"
    for document_id, score in list(zip(row["document_ids"], row["scores"], strict=True))[:_LISTED]:
        yield f"        {score:.5f}  {document_id}"


def _describe_example(where: str, row: Row) -> Iterator[str]:
    yield f"example  {row['id']}  in {where}"
    yield f"    query        {_preview(row['query'])}"
    yield f"    dataset      {row['dataset']}, task type {row['task_type']}"
    yield f"    positive     {row['positive_score']:.5f}  {_preview(row['positive'])}"
    for score, text in list(zip(row["negative_scores"], row["negatives"], strict=True))[:_LISTED]:
        yield f"    negative     {score:.5f}  {_preview(text)}"


def _made(artefacts: dict[str, Artefact], where: str) -> str:
    """The artefact a row stands in: fingerprint, settings and code."""
    artefact = artefacts[where.split("/")[0]]
    return f"{where.split('/')[0]} {artefact.fingerprint}, config {artefact.manifest['config_fingerprint']}, {code_of(artefact)}"


def _preview(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _PREVIEW else f"{line[: _PREVIEW - 1]}…"


# What ``explain`` is asked about: a run's folder, one artefact's folder, or the address of an endpoint.


TIMEOUT_SECONDS = 10.0
_DEPTH = 3  # training/<candidate>/<stage> lies this deep in its run


@dataclass(frozen=True, slots=True)
class Subject:
    """A run and, if one artefact of it was meant, its name; ``said`` are lines about how it was found."""

    run: Place
    artefact: str | None = None
    said: list[str] = field(default_factory=list)


def find_subject(text: str, runs: Place) -> Subject:
    """What a path or an address stands for.

    Args:
        text: a run's folder, an artefact's folder such as ``runs/quickstart/merged``, or ``http://host:port[/v1]``.
        runs: folder of runs, searched for the model that an endpoint says it serves.

    Raises:
        DataError: nothing of a run there, or an endpoint whose model is in none of the runs.
        ServeError: the endpoint does not answer as ours do.
    """
    if text.startswith(("http://", "https://")):
        return _served(text, runs)
    place = Place(text.rstrip("/"))
    if not place.exists(MANIFEST_FILE):
        return Subject(place)
    parts = place.uri.split("/")
    for depth in range(1, _DEPTH + 1):
        name = "/".join(parts[-depth:])
        if len(parts) > depth and (name in FIXED or (depth == _DEPTH and name.startswith("training/"))):
            return Subject(Place("/".join(parts[:-depth])), name)
    # A folder that was copied out of its run still says what it is.
    return _moved(Artefact.open(place), runs)


def _moved(artefact: Artefact, runs: Place) -> Subject:
    found = _with_fingerprint(artefact.fingerprint, runs)
    if found is None:
        raise DataError(
            f"{artefact.place.uri}: {artefact.manifest['kind']} {artefact.fingerprint} is of no run below {runs.uri}; "
            "give the folder of runs with --runs"
        )
    return found


def _served(url: str, runs: Place) -> Subject:
    """Ask the endpoint what it serves, then look for that model."""
    card = model_card(url)
    fingerprint = str(card.get("fingerprint"))
    said = [
        f"endpoint  {url}  model {card.get('id')}, fingerprint {fingerprint}, contract {card.get('contract_hash')}"
    ]
    instructions, task = card.get("instructions"), card.get("default_task")
    if isinstance(instructions, dict) and task in instructions:
        said.append(f"    default task {task}: {instructions[task]}")
    for name, own in dict(card.get("tasks") or {}).items():
        said.append(f"    task {name} ({own.get('task_type')}): {own.get('instruction')}")
    lineage = card.get("lineage")
    if isinstance(lineage, dict):
        made = ", ".join(f"{name} {value}" for name, value in lineage.get("inputs", {}).items())
        said.append(f"    built {lineage.get('created')} from {made or 'nothing recorded'}")
    gate = card.get("gate")
    if isinstance(gate, dict):
        said.append(f"    gate {gate.get('verdict')}")
    found = _with_fingerprint(fingerprint, runs)
    if found is None:
        raise DataError(
            f"{url} serves {fingerprint}, which is of no run below {runs.uri}; give the folder of runs with --runs"
        )
    return Subject(found.run, found.artefact, said)


def model_card(url: str) -> dict[str, Any]:
    """The first entry of ``GET /v1/models``.

    Raises:
        ServeError: no answer, or not one of ours.
    """
    address = url.rstrip("/").removesuffix("/models").removesuffix("/v1") + "/v1/models"
    content = ask(address, TIMEOUT_SECONDS)
    try:
        card = content["data"][0]
        card["fingerprint"]
    except (KeyError, IndexError, TypeError) as error:
        raise ServeError(f"{address}: no model with a fingerprint, so it is none of ours") from error
    return dict(card)


def _with_fingerprint(fingerprint: str, runs: Place) -> Subject | None:
    for run in _run_places(runs):
        for name, artefact in artefacts_of(run).items():
            if artefact.fingerprint == fingerprint:
                return Subject(run, name)
    return None


def _run_places(runs: Place) -> Iterator[Place]:
    """The folders in ``runs``, and the folder itself where it is a run."""
    yield runs
    for name in runs.names():
        yield runs.child(name)


# ``embedloom explain``: from a model, an endpoint or a row back to corpus shard, prompt, generator, seed and code.


def explain(run_place: Place, row_id: str | None) -> str:
    """Lineage of a run or of one of its rows, as text.

    Args:
        run_place: the run folder, ``runs/<name>``.
        row_id: id of a document (and so of its vector), pair or example; None for the whole run.

    Raises:
        DataError: no finished artefact there, a corrupt manifest, or no row with this id.
    """
    return "\n".join(_lines(run_place, None, row_id))


def explain_subject(subject: str, row_id: str | None, runs: Place) -> str:
    """The same for a run's folder, an artefact's folder or an endpoint's address.

    Raises:
        DataError: nothing of a run there, or no row with this id.
        ServeError: an endpoint that does not answer.
    """
    found = find_subject(subject, runs)
    return "\n".join([*found.said, *_lines(found.run, found.artefact, row_id)])


def _lines(run: Place, name: str | None, row_id: str | None) -> Iterator[str]:
    artefacts = artefacts_of(run)
    if not artefacts:
        raise DataError(
            f"{run.uri}: no finished artefact of a run here; expected folders such as {', '.join(FIXED)}"
        )
    if row_id is not None:
        yield from explain_row(run, artefacts, row_id)
    elif name is None:
        yield from run_tree(artefacts)
    else:
        yield from tree(artefacts, name, None, "", set())
    if row_id is None:
        yield from _prompts(artefacts, name)
    yield from _origin(run, artefacts)


def _prompts(artefacts: dict[str, Artefact], name: str | None) -> Iterator[str]:
    """Tasks of the model that is meant, or of the run's furthest one, and what stands before their texts."""
    models = [
        n
        for n in ("encoder", *sorted(n for n in artefacts if n.startswith("training/")), "merged")
        if n in artefacts
    ]
    chosen = name if name in models else (models[-1] if models and name is None else None)
    if chosen is None or not artefacts[chosen].place.exists(CONTRACT_FILE):
        return
    place = artefacts[chosen].place
    contract = PromptContract.parse(place.read_bytes(CONTRACT_FILE), f"{place.uri}/{CONTRACT_FILE}")
    yield f"prompts  {chosen}, contract {contract.hash}"
    yield from (f"    {line}" for line in prompt_lines(contract))


def _origin(run: Place, artefacts: dict[str, Artefact]) -> Iterator[str]:
    """Seeds of the run, as its config says them."""
    if not run.exists(RUN_FILE):
        return
    config = read_run_file(run)["resolved"]
    seeds = [f"run {config['run']['seed']}"]
    training = config["training"]
    runs = training.get("runs", training.get("candidates", []))  # the older name of the key
    seeds += [f"{one['name']} {one['seed']}" for one in runs if "seed" in one]
    sources = [str(s.get("path") or ", ".join(s.get("packages", ()))) for s in config["corpus"]["sources"]]
    yield f"config  {run.uri}/{RUN_FILE}  seeds: {', '.join(seeds)}; corpus sources: {'; '.join(sources)}"


# ``embedloom diff``: two runs side by side, and why their artefacts differ.


_IDENTITY = ("run.name", "run.output_dir", "run.description")  # different by nature, and of no effect
_NOT_COUNTS = ("seconds",)
_SCORES_FILE = "scores.json"


def diff(left: Place, right: Place) -> str:
    """Config differences, artefacts that differ and why, counts and scores side by side.

    Raises:
        DataError: a folder without artefacts, or a corrupt manifest.
    """
    sides = artefacts_of(left), artefacts_of(right)
    for place, found in zip((left, right), sides, strict=True):
        if not found:
            raise DataError(f"{place.uri}: no finished artefact of a run here")
    lines = [f"A  {left.uri}", f"B  {right.uri}", "config:", *_indented(_config_lines(left, right))]
    lines += ["artefacts:", *_indented(_artefact_lines(*sides))]
    lines += ["counts that differ, A and B:", *_indented(_count_lines(*sides))]
    scores = list(_score_lines(*sides))
    return "\n".join([*lines, *(["scores, A and B:", *_indented(scores)] if scores else [])])


def _indented(lines: Any) -> Iterator[str]:
    found = False
    for line in lines:
        found = True
        yield f"    {line}"
    if not found:
        yield "    the same"


def _config_lines(left: Place, right: Place) -> Iterator[str]:
    for place in (left, right):
        if not place.exists(RUN_FILE):
            yield f"not known: {place.uri} has no {RUN_FILE}"
            return
    a, b = (dict(flat(read_run_file(place)["resolved"])) for place in (left, right))
    for key in sorted({*a, *b}):
        if a.get(key, _MISSING) != b.get(key, _MISSING) and key not in _IDENTITY:
            yield f"{key}: {_shown(a.get(key, _MISSING))} -> {_shown(b.get(key, _MISSING))}"


_MISSING = object()


def _shown(value: object) -> str:
    return "not there" if value is _MISSING else repr(value)


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings and lists by dotted path; an empty one is a leaf."""
    entries: list[tuple[str, Any]] = []
    if isinstance(value, Mapping):
        entries = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list):
        entries = [(str(number), inner) for number, inner in enumerate(value)]
    if not entries:
        yield path, value
    for key, inner in entries:
        yield from flat(inner, f"{path}.{key}" if path else key)


def _artefact_lines(a: dict[str, Artefact], b: dict[str, Artefact]) -> Iterator[str]:
    for name in [*a, *(name for name in b if name not in a)]:
        if name not in b or name not in a:
            yield f"{name}: only in {'A' if name in a else 'B'}"
        elif a[name].fingerprint != b[name].fingerprint:
            yield f"{name}: {a[name].fingerprint} and {b[name].fingerprint}: {why(a[name], b[name])}"
        elif a[name].manifest["versions"] != b[name].manifest["versions"]:
            yield f"{name}: the same fingerprint, built by other code: {_versions(a[name])} and {_versions(b[name])}"


def why(a: Artefact, b: Artefact) -> str:
    """Whether settings or inputs make two artefacts of one name differ."""
    reasons = []
    if a.manifest["config_fingerprint"] != b.manifest["config_fingerprint"]:
        reasons.append("other settings")
    ours, theirs = a.manifest["inputs"], b.manifest["inputs"]
    changed = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    if changed:
        reasons.append(f"other inputs ({', '.join(changed)})")
    alone = sorted(set(ours) ^ set(theirs))
    if alone:
        reasons.append(f"inputs of one side only ({', '.join(alone)})")
    return " and ".join(reasons) or "another kind"


def _versions(artefact: Artefact) -> str:
    return " ".join(str(value) for value in artefact.manifest["versions"].values())


def _count_lines(a: dict[str, Artefact], b: dict[str, Artefact]) -> Iterator[str]:
    for name in (one for one in a if one in b):
        left, right = (
            dict(flat({**one[name].counts, "seconds": one[name].manifest["seconds"]})) for one in (a, b)
        )
        for key in [*left, *(key for key in right if key not in left)]:
            if key in _NOT_COUNTS and a[name].fingerprint == b[name].fingerprint:
                continue
            if left.get(key) != right.get(key):
                yield f"{name}.{key}: {left.get(key, '-')}  {right.get(key, '-')}"


def _score_lines(a: dict[str, Artefact], b: dict[str, Artefact]) -> Iterator[str]:
    if any("evaluation" not in one or not one["evaluation"].place.exists(_SCORES_FILE) for one in (a, b)):
        return
    tables = [one["evaluation"].place.read_json(_SCORES_FILE) for one in (a, b)]
    for group in ("models", "baselines"):
        left, right = (dict(flat(table.get(group, {}))) for table in tables)
        for key in [*left, *(key for key in right if key not in left)]:
            ours, theirs = left.get(key), right.get(key)
            both = isinstance(ours, float | int) and isinstance(theirs, float | int)
            change = f"  {theirs - ours:+.5f}" if both else ""  # type: ignore[operator]
            yield f"{key}: {_score(ours)}  {_score(theirs)}{change}"


def _score(value: Any) -> str:
    return f"{value:.5f}" if isinstance(value, float | int) else "-"
