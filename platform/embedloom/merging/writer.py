"""Writing the files of a merge, block by block, in this process or spread over Ray tasks."""

import math
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from embedloom.compute.shards import run_tasks
from embedloom.config.cluster import PoolConfig
from embedloom.core.progress import Progress
from embedloom.core.storage import Place
from embedloom.errors import DataError, StageError
from embedloom.merging.checks import BASE
from embedloom.merging.methods import PREPARE
from embedloom.merging.plan import MergePlan
from embedloom.merging.tensors import (
    BlockFunction,
    Operands,
    Scratch,
    TensorInfo,
    TensorReader,
    WeightFile,
    open_tensors,
)

# Writing one weight file of a merge: block by block, under another name, renamed when whole.


Report = Callable[[int], None]


def write_file(
    plan: MergePlan, file: WeightFile, place: Place, threads: int, report: Report | None = None
) -> None:
    """Merge the tensors of one file and put it into ``place``, whole or not at all.

    Memory is a few blocks a thread, whatever the size and number of the models; a file for an object store grows on
    the scratch disk first.

    Args:
        plan: the merge.
        file: one of its files.
        place: the folder of the merged model.
        threads: that compute; they change nothing in the result.
        report: called with the bytes of each tensor written.

    Raises:
        DataError: a value that is not finite, or integers that differ between models.
        StageError: the disk did not take the file.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # blocks go over threads; torch's own would only wait for each other
    pool = ThreadPoolExecutor(threads) if threads > 1 else None
    try:
        with tempfile.TemporaryDirectory(prefix="embedloom-") as scratch:
            folder = place.local if place.is_local else Path(scratch)
            temporary = folder / f"_tmp-{os.getpid()}-{file.name}"
            _write(plan, file, temporary, pool, report)
            place.put_file(temporary, file.name)
    except OSError as error:
        raise StageError(f"merge: {place.uri}/{file.name} could not be written: {error}") from error
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _write(
    plan: MergePlan, file: WeightFile, path: Path, pool: Executor | None, report: Report | None
) -> None:
    scratch = Scratch()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)  # less the umask
    try:
        offset = _put(descriptor, file.header, 0)
        for info in file.infos:
            _write_tensor(plan, info, descriptor, offset, pool, scratch)
            offset += info.nbytes
            if report is not None:
                report(info.nbytes)
        os.fsync(descriptor)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _write_tensor(
    plan: MergePlan, info: TensorInfo, descriptor: int, offset: int, pool: Executor | None, scratch: Scratch
) -> None:
    folders = [*plan.models.values(), *([] if plan.base is None else [plan.base])]
    with open_tensors(folders, info.name, scratch) as readers:
        models = readers[: len(plan.models)]
        base = None if plan.base is None else readers[-1]
        operands = Operands(info.name, info.elements, models, base, pool)
        if info.dtype.is_floating_point:
            merged = PREPARE[plan.config.method](operands, plan.tensor_weights(info.name), plan.config)
            compute = _checked(plan, operands, merged, info.dtype)
        else:
            compute = _common(plan, operands)

        def block(start: int, stop: int) -> None:
            values = compute(start, stop).view(torch.uint8).numpy()
            _put(descriptor, memoryview(values), offset + start * info.dtype.itemsize)

        for _ in operands.each(block):
            pass


def _checked(plan: MergePlan, operands: Operands, merged: BlockFunction, dtype: torch.dtype) -> BlockFunction:
    """Blocks in the written type; a value that is not finite in it names the models it comes from."""

    def block(start: int, stop: int) -> Tensor:
        values = merged(start, stop).to(dtype)
        # The extremes decide, in one pass: both are NaN if any value is.
        if not all(map(math.isfinite, map(float, torch.aminmax(values)))):
            named = dict(zip(plan.models, operands.models, strict=True))
            named |= {} if operands.base is None else {BASE: operands.base}
            guilty = [name for name, reader in named.items() if not _finite(reader, start, stop)]
            source = (
                ", ".join(map(repr, guilty)) or f"the merged model in {str(dtype).removeprefix('torch.')}"
            )
            raise DataError(f"merging: tensor {operands.name!r} is not finite in {source}")
        return values

    return block


def _finite(reader: TensorReader, start: int, stop: int) -> bool:
    return bool(torch.isfinite(reader.raw(start, stop)).all())


def _common(plan: MergePlan, operands: Operands) -> BlockFunction:
    """Blocks of a tensor of integers, which all models must share."""
    (first, reader), *others = zip(plan.models, operands.models, strict=True)

    def block(start: int, stop: int) -> Tensor:
        values = reader.raw(start, stop)
        for name, other in others:
            if not torch.equal(values, other.raw(start, stop)):
                raise DataError(
                    f"merging: tensor {operands.name!r} holds integers that differ between {first!r} and {name!r}; they cannot be averaged"
                )
        return values

    return block


def _put(descriptor: int, content: bytes | memoryview, offset: int) -> int:
    """Write all of ``content`` at ``offset``; returns the offset behind it."""
    rest = memoryview(content)
    while len(rest):
        written = os.pwrite(descriptor, rest, offset)
        rest, offset = rest[written:], offset + written
    return offset


# Writing the files of a merge: one after another in this process, or spread over Ray tasks.


def write_here(
    plan: MergePlan, files: Sequence[WeightFile], place: Place, threads: int, progress: Progress
) -> None:
    """Write files without Ray, each with all threads."""
    for file in files:
        write_file(plan, file, place, threads, progress.advance)


def write_with_ray(
    plan: MergePlan, files: Sequence[WeightFile], place: Place, pool: PoolConfig, progress: Progress
) -> None:
    """Write files in Ray tasks, at most ``pool.max_actors`` at a time; a task whose worker dies is run again.

    Raises:
        EmbedloomError: whatever a task raised.
        StageError: a task could not be placed, or died too often.
    """
    shared = (plan, place.absolute(), pool.compute_threads)
    for nbytes in run_tasks("merge", _write_one, files, *shared, pool=pool):
        progress.advance(nbytes)


def _write_one(file: WeightFile, plan: MergePlan, place: Place, threads: int) -> int:
    write_file(plan, file, place, threads)
    return sum(info.nbytes for info in file.infos)
