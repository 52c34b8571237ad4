"""Where things come from: ``explain``, ``diff`` and ``replay``."""

from embedloom.lineage.explain import explain, explain_subject

__all__ = ["explain", "explain_subject"]
