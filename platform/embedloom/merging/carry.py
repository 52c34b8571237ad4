"""What a merged folder takes over from its first model, and the card and lineage that are its own."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from embedloom.core.artefacts import BUILDING_FILE, MANIFEST_FILE
from embedloom.core.prompting import CONTRACT_FILE, PromptContract
from embedloom.core.storage import Place
from embedloom.core.trained_prompts import hub_card, merged_contract, prompt_lines, reader_prompts
from embedloom.encoder.parity import Verdict, reader_lines
from embedloom.errors import DataError
from embedloom.merging.checks import CARD_FILE, CONFIG_FILE, PROMPTS_FILE, card_header, stated_base
from embedloom.merging.plan import MergePlan

LINEAGE_FILE = "lineage.json"
SEARCH_FILE = "search.json"
DATA_CARD_FILE = "data_card.md"
# Weights in any format, and what goes with them: the merged model's are written anew, in one format.
_WEIGHTS = (
    ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".onnx", ".onnx_data", ".gguf",
    ".h5", ".msgpack", ".ot",
)  # fmt: skip
_OTHER_FORMATS = ("onnx/", "openvino/")
# What an artefact folder adds to a model folder describes its own making, not the merged model's.
_OWN_FILES = {
    MANIFEST_FILE,
    BUILDING_FILE,
    LINEAGE_FILE,
    SEARCH_FILE,
    CARD_FILE,
    DATA_CARD_FILE,
    "gate.json",
    "int8.json",
    "metrics.jsonl",
}
_METHOD_PAPERS = {
    "linear": "arXiv 2203.05482", "slerp": "Shoemake 1985", "karcher": "arXiv 2603.04972",
    "task_arithmetic": "arXiv 2212.04089", "ties": "arXiv 2306.01708", "dare_linear": "arXiv 2311.03099",
    "dare_ties": "arXiv 2311.03099", "model_stock": "arXiv 2403.19522",
}  # fmt: skip


def contract_of(plan: MergePlan, default_task: str | None = None) -> PromptContract | None:
    """The merged model's contract; None for foreign models, which have none.

    Raises:
        DataError: a default task that no model knows.
    """
    places = {name: folder.place for name, folder in plan.models.items()}
    if not next(iter(places.values())).exists(CONTRACT_FILE):
        if default_task is not None:
            raise DataError(
                f"serving.default_task: {default_task!r}, but the merged models have no {CONTRACT_FILE}, so no named task"
            )
        return None
    contracts, weights = {}, []
    for (name, place), weight in zip(places.items(), plan.weights, strict=True):
        if place.exists(CONTRACT_FILE):  # one without it may have been allowed
            where = f"{place.uri}/{CONTRACT_FILE}"
            contracts[name] = PromptContract.parse(place.read_bytes(CONTRACT_FILE), where)
            weights.append(weight)
    return merged_contract(contracts, weights, default_task)


def carry_over(plan: MergePlan, target: Place, contract: PromptContract | None) -> None:
    """Copy everything of the first model but weights and artefact files, and state what is the merged model's own.

    That is the written dtype in ``config.json``, the contract, and its prompts for sentence-transformers.
    """
    source, dtype = next(iter(plan.models.values())).place, plan.config.dtype
    for name in source.files():
        parts = name.split("/")
        hidden = any(part.startswith(("_", ".")) for part in parts)
        if hidden or parts[-1] in _OWN_FILES or name.endswith(_WEIGHTS) or name.startswith(_OTHER_FORMATS):
            continue
        target.write_bytes(name, source.read_bytes(name))
    config = source.read_json(CONFIG_FILE)
    config.pop("torch_dtype", None)
    text = json.dumps({**config, "dtype": dtype}, indent=2) + "\n"
    target.write_bytes(CONFIG_FILE, text.encode())
    if contract is not None:
        target.write_bytes(CONTRACT_FILE, contract.as_file())
    if contract is not None and target.exists(PROMPTS_FILE):
        prompts = {**source.read_json(PROMPTS_FILE), "prompts": reader_prompts(contract)}
        target.write_bytes(PROMPTS_FILE, (json.dumps(prompts, indent=2) + "\n").encode())
    _keep_folders(source, target)


def _keep_folders(source: Place, target: Place) -> None:
    """Make the folders that sentence-transformers modules name; one without files (Normalize) is lost by copying."""
    if not target.is_local or not source.exists("modules.json"):
        return
    for module in json.loads(source.read_bytes("modules.json")):
        (target.local / str(module.get("path", ""))).mkdir(parents=True, exist_ok=True)


def lineage_of(
    plan: MergePlan, base: Place | None, search: Mapping[str, Any] | None, contract: PromptContract | None
) -> dict[str, Any]:
    """What the merged model is made of; sources that are artefacts are named by fingerprint too."""
    config = plan.config
    first = next(iter(plan.models.values())).place
    origin = stated_base(base, itself=True) if base is not None else stated_base(first)
    lineage: dict[str, Any] = {
        "made_by": "merge",
        "method": config.method,
        "dtype": config.dtype,
        "contract_hash": None if contract is None else contract.hash,
        "base": origin[1] if origin is not None else (base.uri if base is not None else None),
        "sources": [
            {"name": name, "weight": weight, "fingerprint": _fingerprint(folder.place)}
            for (name, folder), weight in zip(plan.models.items(), plan.weights, strict=True)
        ],
    }
    settings = config.model_dump(mode="json", include={"density", "scale", "seed"} & config.model_fields_set)
    lineage |= settings
    if config.layers:
        lineage["layers"] = [rule.model_dump(mode="json", exclude_none=True) for rule in config.layers]
    if plan.remarks:
        lineage["differences"] = plan.remarks
    if search is not None:
        lineage["search"] = {
            key: search[key] for key in ("kind", "chosen", "kept", "reason") if key in search
        }
    return lineage


def _fingerprint(place: Place) -> str | None:
    return str(place.read_json(MANIFEST_FILE).get("fingerprint")) if place.exists(MANIFEST_FILE) else None


def model_card(
    plan: MergePlan,
    lineage: Mapping[str, Any],
    base_model: str | None,
    contract: PromptContract | None,
    readers: Sequence[Verdict] = (),
) -> str:
    """``README.md`` of the merged model: the header the Hub reads, what was merged how, its prompts and who reads it."""
    headers = [card_header(folder.place) for folder in plan.models.values()]
    stated = base_model or next(
        (h["base_model"] for h in headers if isinstance(h.get("base_model"), str)), None
    )
    header: dict[str, Any] = {
        "base_model": stated if stated is not None else list(plan.models),
        "base_model_relation": "merge" if stated is None else "finetune",
    }
    for key in ("license", "language"):
        values = [h.get(key) for h in headers]
        if values[0] is not None and all(value == values[0] for value in values):
            header[key] = values[0]
    datasets = sorted({str(name) for h in headers for name in h.get("datasets") or []})
    if datasets:
        header["datasets"] = datasets
    paper = _METHOD_PAPERS.get(plan.config.method)
    rows = [f"| {s['name']} | {s['weight']:.6g} | {s['fingerprint'] or ''} |" for s in lineage["sources"]]
    settings = [
        f"- {key}: {lineage[key]}"
        for key in ("density", "scale", "seed", "base", "layers")
        if lineage.get(key)
    ]
    lines = [
        "# Merged embedding model", "",
        f"{len(rows)} models, method {plan.config.method}{f' ({paper})' if paper else ''}, summed in float32, written "
        f"in {plan.config.dtype}.", "", "| model | weight | fingerprint |", "|---|---|---|", *rows, "", *settings,
        "", *([] if contract is None else ["## Prompts", "", *prompt_lines(contract), ""]), f"Prompts, pooling and lengths are in `{CONTRACT_FILE}`; the sources by fingerprint in `{LINEAGE_FILE}`.",
        *(["", *reader_lines(readers)] if readers else []),
    ]  # fmt: skip
    return hub_card(header, lines, ["merge"])


def merged_data_card(plan: MergePlan) -> str | None:
    """What the merged models were trained on: their data cards, equal ones once; None if none has any."""
    found: dict[str, list[str]] = {}
    for name, folder in plan.models.items():
        if folder.place.exists(DATA_CARD_FILE):
            card = folder.place.read_bytes(DATA_CARD_FILE).decode(errors="replace")
            found.setdefault(card, []).append(name)
    lines = []
    for card, names in found.items():
        lines += [f"# Trained as {', '.join(names)}", "", card.replace("\n#", "\n##").replace("# ", "## ", 1)]
    return "\n".join(lines) if lines else None
