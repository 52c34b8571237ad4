"""Memory and start of an endpoint's second replica beside its first, with weights in the object store.

    python benchmarks/replica_start.py [--quick] [--json] [--gib 3]

Work: a random Llama of about 3 GiB in float32 (0.4 with --quick), served by one replica of the deployment that
`embedloom serve` uses, then by two. Memory is the proportional set size (PSS) of all processes of this Ray together, so
a page that several map counts once, and that of each replica; start is from the call until all replicas answer. The
peer is the same deployment whose replicas read the folder themselves.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

MIB = 2**20


def make_model(folder: Path, gib: float) -> Path:
    """Save a random bidirectional Llama whose layers hold about so many GiB."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    from embedloom.core.prompting import PromptContract

    hidden = 2048 if gib > 1 else 1024
    layer_bytes = 4 * (4 * hidden**2 + 3 * 4 * hidden**2)
    config = LlamaConfig(
        vocab_size=3000, hidden_size=hidden, intermediate_size=4 * hidden,
        num_hidden_layers=max(2, round(gib * 2**30 / layer_bytes)), num_attention_heads=hidden // 64,
        max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaModel(config).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "loom": 1, "weave": 2}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")
    tokenizer.save_pretrained(folder)
    PromptContract(template="{text}", add_bos=False, add_eos=False, attention="bidirectional").save(folder)
    return folder


def pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


def memory() -> tuple[int, list[int]]:
    """Bytes of all children of this process, and of each replica."""
    children = psutil.Process().children(recursive=True)
    sizes = {child.pid: pss(child) for child in children}
    replicas = [child.pid for child in children if ":encoder" in _title(child)]
    return sum(sizes.values()), [sizes[pid] for pid in replicas]


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def start(application: Any, replicas: int) -> float:
    """Seconds until so many replicas answer."""
    from ray import serve

    from embedloom.serving.applications import run
    from embedloom.serving.messages import EncodeJob, Part

    started = time.monotonic()
    run(application, "measured", None)
    handle = serve.get_deployment_handle("encoder", "measured")
    handle.encode.remote(EncodeJob((Part("document", ["loom weave"]),))).result(timeout_s=120)
    status = serve.status().applications["measured"].deployments["encoder"].replica_states
    if sum(status.values()) != replicas:
        raise RuntimeError(f"{replicas} replicas wanted, found {dict(status)}")
    return time.monotonic() - started


def measure(model: Path, shared: bool) -> dict[str, Any]:
    """One replica, then two; in a Ray of its own."""
    from embedloom.cluster.session import ray_session
    from embedloom.config.cluster import AuthConfig, Profile, ServeScaling
    from embedloom.config.serving import ServingConfig

    store = int(sum(path.stat().st_size for path in model.iterdir()) * 1.3 / MIB) + 200
    auth = AuthConfig(token_path=str(model.parent / "token"))
    with ray_session(Profile(logical_cpus=8, object_store_mib=store), auth):
        from ray import serve

        from embedloom.config.serving import ApplicationArgs
        from embedloom.serving.app import build_encoders

        serve.start(proxy_location="Disabled")
        args = ApplicationArgs(
            model_folder=str(model), served_name="m", serving=ServingConfig(require_gate=False),
            scaling=ServeScaling(min_replicas=2, max_replicas=2, threads=1),
        )  # fmt: skip
        encoders = build_encoders(args)
        deployment = encoders._bound_deployment
        spec = deployment.init_args[0]
        spec = spec if shared else dataclasses.replace(spec, shared=False)
        # A version of its own name makes the change of num_replicas one that keeps the first replica.
        options = {"version": "1"} | ({} if shared else {"deployment_actors": None})

        def of(replicas: int) -> Any:
            return deployment.options(num_replicas=replicas, _internal=True, **options).bind(spec)

        before, _ = memory()
        first_seconds = start(of(1), 1)
        time.sleep(3)  # the process that read the weights is gone by then
        first, _ = memory()
        second_seconds = start(of(2), 2)
        second, each = memory()
        serve.shutdown()
    return {
        "first_mib": round((first - before) / MIB), "second_mib": round((second - first) / MIB),
        "replicas_pss_mib": [round(size / MIB) for size in each],
        "first_seconds": round(first_seconds, 1), "second_seconds": round(second_seconds, 1),
        "memory_share": round((second - first) / (first - before), 3),
        "start_share": round(second_seconds / first_seconds, 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a model of 0.4 GiB")
    parser.add_argument("--json", action="store_true", help="one JSON object on the last line")
    parser.add_argument("--gib", type=float, default=3.0)
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure(Path(options.side[1]), options.side[0] == "shared")))
        return
    gib = 0.4 if options.quick else options.gib
    with tempfile.TemporaryDirectory(prefix="el-", dir="/tmp") as temporary:
        model = make_model(Path(temporary) / "model", gib)
        found = {}
        for side in ("shared", "own"):
            run = subprocess.run(
                [sys.executable, __file__, "--side", side, str(model)], stdout=subprocess.PIPE, text=True, check=True,
                env=os.environ,
            )  # fmt: skip
            found[side] = json.loads(run.stdout.splitlines()[-1])
    ours, peer = max(1, found["shared"]["second_mib"]), found["own"]["second_mib"]
    result = {
        "name": "replica_start", "ours": ours, "peer": peer, "peer_name": "every replica reads the folder",
        "ratio": round(peer / ours, 2), "unit": "MiB that the second replica adds",
        "work": {"gib": gib, **found},
    }  # fmt: skip
    print(json.dumps(result) if options.json else json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
