"""The GPU acceptance kit: its states, its arithmetic, and all its parts with toy models on the CPU."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from packaging.requirements import Requirement

KIT = Path(__file__).parent.parent / "benchmarks/gpu/accept.py"
# What benchmarks/gpu/README.md expects of a machine; pip would bring what these require.
IMAGE = (
    "torch", "transformers", "numpy", "pandas", "pyarrow", "fsspec", "PyYAML", "rich", "psutil", "tqdm", "packaging",
    "einops", "msgpack",
)  # fmt: skip
ALONE = ("env", "kernel", "parity", "embed", "train", "memory", "search", "serve", "resume", "ranks")
WITH_MORE = ("peer", "ray_train", "ray_pool", "ray_share")
SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["part", "state", "reasons", "seconds", "limit_seconds", "tiny", "date", "commit", "gpus", "rows"],
    "properties": {
        "part": {"enum": [*ALONE, *WITH_MORE]},
        "state": {"enum": ["passed", "REFUSED", "FAILED", "not run"]},
        "reasons": {"type": "array", "items": {"type": "string"}},
        "seconds": {"type": "number", "exclusiveMinimum": 0},
        "limit_seconds": {"type": "integer"},
        "tiny": {"type": "boolean"},
        "date": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00$"},
        "commit": {"type": "string", "minLength": 1},
        "gpus": {"type": "array", "items": {"type": "string"}},
        "cpus": {"type": "integer"},
        "python": {"type": "string"},
        "versions": {"type": "object", "required": ["torch", "transformers"]},
        "rows": {
            "type": "array",
            "items": {
                "type": "object",
                "additionalProperties": False,
                "required": ["name", "value", "kind", "limit", "ok"],
                "properties": {
                    "name": {"type": "string"},
                    "value": {},
                    "kind": {"enum": ["must", "aim", "seen"]},
                    "limit": {"type": ["string", "null"]},
                    "ok": {"type": ["boolean", "null"]},
                },
            },
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def kit():
    spec = importlib.util.spec_from_file_location("accept", KIT)
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.modules["accept"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.fixture(scope="module")
def packed(kit, tmp_path_factory) -> Path:
    """What is carried to a GPU machine."""
    folder = tmp_path_factory.mktemp("pack") / "kit"
    kit.pack(folder, f"{sys.version_info.major}.{sys.version_info.minor}")
    return folder


def required(names: tuple[str, ...], less: tuple[str, ...]) -> dict[str, importlib.metadata.Distribution]:
    """Distributions of these names and all that they require, without extras, and without some that images lack."""
    found: dict[str, importlib.metadata.Distribution] = {}
    todo = list(names)
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name in found or name in less:
            continue
        found[name] = importlib.metadata.distribution(name)
        requirements = map(Requirement, found[name].requires or ())
        todo += [one.name for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def image(kit, tmp_path_factory) -> Path:
    """A site folder that holds the packages of a bare PyTorch machine and no other."""
    site = tmp_path_factory.mktemp("image")
    distributions = required(IMAGE, kit.WHEELS)
    assert not {"ray", "vllm", "sentence-transformers"} & set(distributions)
    for distribution in distributions.values():
        for top in {file.parts[0] for file in distribution.files} - {".."}:
            target = Path(str(distribution.locate_file(top)))
            if target.exists() and not (site / top).exists():
                (site / top).symlink_to(target)
    return site


def on_bare_machine(packed: Path, image: Path, out: Path, only: str) -> subprocess.CompletedProcess[str]:
    """The kit in its folder, by an interpreter that has the packages of ``image`` alone."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "RAY_"))}
    environment |= {"PYTHONPATH": str(image), "OMP_NUM_THREADS": "1"}
    command = [sys._base_executable, "-s", "accept.py", "--tiny", "--out", str(out), "--only", only]
    return subprocess.run(
        command, cwd=packed, env=environment, capture_output=True, text=True, check=False, timeout=3600
    )


def part_files(out: Path) -> dict[str, dict]:
    """Files of all parts, each as the schema has it."""
    found = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json") if path.stem != "summary"}
    for content in found.values():
        jsonschema.validate(content, SCHEMA)
    return found


def test_a_part_is_in_the_state_that_its_rows_say(kit):
    right = kit.Row("cosine", 1.0, "must", ">= 0.99", True)
    wrong = kit.Row("cosine", 0.5, "must", ">= 0.99", False)
    slow = kit.Row("share", 0.3, "aim", ">= 0.55", False)
    unjudged = kit.Row("share", 0.3, "aim", ">= 0.55", None)
    assert kit.judge([right, kit.Row("seconds", 3)]) == ("passed", [])
    assert kit.judge([right, slow]) == ("REFUSED", ["share: 0.3, needed >= 0.55"])
    assert kit.judge([slow, wrong])[0] == "FAILED"
    assert kit.judge([right, unjudged])[0] == "passed"
    assert kit.judge([right], error="over its limit of 60 s")[0] == "FAILED"
    assert kit.judge([])[0] == "FAILED"
    assert kit.judge([], absent="Ray is not installed here") == ("not run", ["Ray is not installed here"])


def test_a_number_that_is_none_is_wrong_and_stays_readable(kit, tmp_path):
    report = kit.Report(tmp_path / "rows.json", judges_aims=True)
    error = float("nan")
    report.must("error", error, error < 0.02, "< 0.02")
    report.aim("share", error, least=0.5)
    assert kit.judge(report.rows)[0] == "FAILED"
    assert [row["value"] for row in json.loads((tmp_path / "rows.json").read_text())] == ["nan", "nan"]


def test_aims_have_two_ends(kit, tmp_path):
    report = kit.Report(tmp_path / "rows.json", judges_aims=True)
    for value in (0.89, 0.9, 1.1, 1.11):
        report.aim("peak by the arithmetic", value, 0.9, 1.1)
    assert [row.ok for row in report.rows] == [False, True, True, False]


def test_a_part_that_hangs_or_crashes_says_so(kit, tmp_path):
    hangs = kit._ended([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "a.log", 1)
    crashes = kit._ended([sys.executable, "-c", "raise MemoryError('no room')"], tmp_path / "b.log", 600)
    assert hangs == "over its limit of 1 s; see a.log"
    assert crashes == "exit 1: MemoryError: no room; see b.log"


def test_flops_and_shapes_are_those_of_the_public_models(kit):
    # Llama-3.1-8B without its head: 32 layers of 218,112,000 with norms, 128,256 x 4,096 embeddings, the last norm.
    whole = kit.make_backbone("8b", "meta", None)
    assert sum(weight.numel() for weight in whole.parameters()) == 7_504_924_672
    # A text of 1,000 tokens, forward: 2 x 6,979,588,096 x 1,000, and 4 x 32 x 4,096 x 1,000² of attention.
    assert kit.flops_of(whole, [1000], 1) == pytest.approx(2 * 6_979_588_096e3 + 5.24288e11, rel=1e-12)
    assert kit.flops_of(whole, [500, 500], 3) == pytest.approx(
        3 * (2 * 6_979_588_096e3 + 2.62144e11), rel=1e-12
    )
    # BERT-base: 12 layers of 7,087,872 are multiplied; beside its tables one norm.
    bert = kit.make_backbone("110m", "meta", None)
    assert kit.flops_of(bert, [1], 1) == 2 * (12 * 7_087_872 + 1536) + 4 * 12 * 768


def test_texts_have_the_tokens_that_they_are_made_of(kit):
    tokenizer = kit.word_tokenizer(100)
    assert tokenizer(kit.text_of([17, 23]))["input_ids"] == [1, 17, 23]
    lengths = kit.lengths_of("natural", 50_000, np.random.default_rng(0))
    assert min(lengths) >= 4 and max(lengths) == 512 and 70 < np.mean(lengths) < 140
    assert kit.lengths_of("full", 2048, None) == [512] * 4


def test_the_exact_search_is_brute_force(kit):
    rng = np.random.default_rng(0)
    documents = rng.integers(-4, 5, (300, 8)).astype(np.float32)  # small integers: many ties, no rounding
    queries = rng.integers(-4, 5, (5, 8)).astype(np.float32)
    positions, scores = kit.exact_top_k(queries, documents, 50)
    for row, query in enumerate(queries.tolist()):
        products = [sum(a * b for a, b in zip(query, own, strict=True)) for own in documents.tolist()]
        assert scores[row].tolist() == sorted(products, reverse=True)[:50]
        assert [products[position] for position in positions[row]] == scores[row].tolist()


def test_older_kernels_get_the_arguments_they_know(kit, monkeypatch):
    import torch
    from torch.nn.attention import varlen

    asked = {}

    def older(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):
        asked.update(heads=(q.shape[1], k.shape[1]), causal=is_causal, first=q[0, 0, 0].item())
        return q

    monkeypatch.setattr(varlen, "varlen_attn", older)
    assert kit.use_older_varlen().startswith("through a shim")
    q, k = torch.ones(5, 8, 4), torch.ones(5, 2, 4)
    varlen.varlen_attn(q, k, k, None, None, 5, 5, scale=0.25, window_size=(-1, 0), enable_gqa=True)
    # Twice two heads of four; scores of scale 1 / 4 are those of 1 / sqrt(4) with half the query.
    assert asked == {"heads": (8, 8), "causal": True, "first": 0.5}


def test_a_pack_holds_the_kit_the_package_and_its_wheels(kit, packed):
    assert {path.name for path in packed.iterdir()} == {"accept.py", "embedloom", "site", "packed.json"}
    packages = {path.name for path in (packed / "site").iterdir() if not path.name.endswith(".dist-info")}
    assert packages == {
        "pydantic",
        "pydantic_core",
        "annotated_types",
        "typing_inspection",
        "hjson",
        "deepspeed",
    }
    assert json.loads((packed / "packed.json").read_text())["wheels"].keys() == set(kit.WHEELS)
    with pytest.raises(SystemExit, match="is there already"):
        kit.pack(packed, "3.12")


def test_a_wrong_kernel_is_reported_as_failed(packed, image, tmp_path):
    """On a machine with nothing but PyTorch: attention that is 5 % too large must not pass."""
    wrong = tmp_path / "kit"
    subprocess.run(["cp", "-r", str(packed), str(wrong)], check=True)
    with (wrong / "embedloom/encoder/attention.py").open("a") as stream:
        stream.write(
            "\n_right = packed_attention\n\n\ndef packed_attention(*sides, **options):\n"
            "    out, nothing = _right(*sides, **options)\n    return 1.05 * out, nothing\n"
        )
    run = on_bare_machine(wrong, image, tmp_path / "out", "kernel")
    assert run.returncode == 1, run.stdout + run.stderr
    (found,) = part_files(tmp_path / "out").values()
    errors = [row["value"] for row in found["rows"] if row["kind"] == "must"]
    assert found["state"] == "FAILED" and len(found["reasons"]) == len(errors) == 15
    assert all(0.04 < error < 0.07 for error in errors)
    assert "needed < 0.02 of float64's largest value" in found["reasons"][0]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_all_parts_pass_on_a_bare_machine(packed, image, tmp_path):
    run = on_bare_machine(packed, image, tmp_path, ",".join([*ALONE, *WITH_MORE]))
    found = part_files(tmp_path)
    states = {name: part["state"] for name, part in found.items()}
    reasons = {name: part["reasons"] for name, part in found.items() if part["reasons"]}
    assert states == dict.fromkeys(ALONE, "passed") | dict.fromkeys(WITH_MORE, "not run"), reasons
    assert reasons["peer"] == ["sentence-transformers is not installed here"]
    assert (
        reasons["ray_train"] == reasons["ray_pool"] == reasons["ray_share"] == ["Ray is not installed here"]
    )
    assert run.returncode == 0, run.stdout + run.stderr
    table = (tmp_path / "summary.md").read_text()
    assert all(f"| {name} | {state} |" in table for name, state in states.items())
    # Aims are for GPUs.
    assert {row["ok"] for part in found.values() for row in part["rows"] if row["kind"] == "aim"} == {None}
    assert "torch sees no CUDA device" not in table


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.drill
@pytest.mark.timeout(3600)
def test_parts_with_ray_and_the_peer_pass(tmp_path):
    command = [sys.executable, str(KIT), "--tiny", "--out", str(tmp_path), "--only", ",".join(WITH_MORE)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_AUTH")}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=3600)
    states = {name: (part["state"], part["reasons"]) for name, part in part_files(tmp_path).items()}
    assert states == dict.fromkeys(WITH_MORE, ("passed", [])), run.stdout + run.stderr
