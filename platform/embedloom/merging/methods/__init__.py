"""The merge methods by name: how each turns one tensor of every model into blocks of the merged one."""

from collections.abc import Callable, Sequence

from embedloom.config.merging import MergeMethod, MergingConfig
from embedloom.merging.methods import (
    dare,
    karcher,
    linear,
    model_stock,
    multislerp,
    slerp,
    task_arithmetic,
    ties,
)
from embedloom.merging.operands import BlockFunction, Operands

Prepare = Callable[[Operands, Sequence[float], MergingConfig], BlockFunction]

PREPARE: dict[MergeMethod, Prepare] = {
    "linear": linear.prepare,
    "slerp": slerp.prepare,
    "multislerp": multislerp.prepare,
    "karcher": karcher.prepare,
    "task_arithmetic": task_arithmetic.prepare,
    "ties": ties.prepare,
    "dare_linear": dare.prepare,
    "dare_ties": dare.prepare,
    "model_stock": model_stock.prepare,
}
