"""``embedloom explain``: from a model, an endpoint or a row back to corpus shard, prompt, generator, seed and code."""

from collections.abc import Iterator

from embedloom.artefacts import Artefact
from embedloom.errors import DataError
from embedloom.instructions import CONTRACT_FILE, PromptContract
from embedloom.lineage.read import FIXED, artefacts_of
from embedloom.lineage.rows import explain_row
from embedloom.lineage.subject import find_subject
from embedloom.lineage.tree import run_tree, tree
from embedloom.run_file import RUN_FILE, read_run_file
from embedloom.storage import Place
from embedloom.trained_prompts import prompt_lines


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
