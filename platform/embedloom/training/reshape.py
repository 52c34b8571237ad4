"""Going on with another number of workers: ZeRO checkpoints are cut for the number that wrote them.

DeepSpeed's universal form holds every weight's states whole, so any number of workers can load it. Converting costs a
copy of the checkpoint on each node's disk, once a change; checkpoints stay as they are written.
"""

import contextlib
import io
import os
import shutil
import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from embedloom.errors import DataError


def load_resized(engine: Any, folder: Path, tag: str, name: str) -> None:
    """Load weights and optimizer state that another number of workers saved.

    Args:
        engine: a DeepSpeed engine of ZeRO stage 1, 2 or 3.
        folder: of the checkpoint, on this node.
        tag: of the checkpoint in the folder.
        name: the same on all workers and different for different checkpoints.

    Raises:
        DataError: DeepSpeed cannot convert the checkpoint.
    """
    root = Path(tempfile.gettempdir()) / f"embedloom-universal-{name}"
    converts = os.environ.get("LOCAL_RANK", "0") == "0"
    if converts:
        _convert(folder / tag, root / tag)
    dist.barrier()
    engine._config.load_universal_checkpoint = True
    try:
        engine.load_checkpoint(str(root), tag=tag)
    finally:
        engine._config.load_universal_checkpoint = False
    dist.barrier()
    if converts:
        shutil.rmtree(root, ignore_errors=True)


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(target.parent, ignore_errors=True)
    target.mkdir(parents=True)
    settings = Namespace(
        input_folder=str(source), output_folder=str(target), num_extract_workers=1, num_merge_workers=1,
        keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            ds_to_universal.main(settings)
    except Exception as error:
        raise DataError(f"{source}: not convertible for another number of workers: {error}") from error
