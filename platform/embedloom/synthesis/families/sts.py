"""Semantic similarity: three texts with target scores, drawn per attempt and kept in ``attributes``.

S1 and S2 aim at 4 to 5 of 5, S1 and S3 at 2.5 to 3.5 (arXiv 2401.00368, appendix). Training uses the order alone:
S2 is the positive, S3 the hard negative.
"""

from embedloom.config.families import STSConfig
from embedloom.synthesis.families.opposite import Opposite


class STS(Opposite[STSConfig]):
    """One graded triple an attempt."""

    name = "sts"
    task_type = "sts"
