"""Train, dev and test: drawn by group, so that neighbours (one module, one file) never stand on two sides."""

from embedloom.config.data import SplitConfig
from embedloom.records import content_id

SPLITS = ("train", "dev", "test")


def split_of(group: str, config: SplitConfig, seed: int) -> str:
    """Split of a group: a function of its name, the shares and the seed alone.

    Adding documents therefore never moves another group, and a larger test share only takes from train.
    """
    place = int(content_id("split", str(seed), group)[:16], 16) / 2**64  # uniform in [0, 1)
    if place < config.dev:
        return "dev"
    # Counted from the other end: a change of one share leaves the other split as it was.
    return "test" if place >= 1 - config.test else "train"
