"""embedloom: from a document corpus to a served text-embedding model, on one Ray cluster."""

__version__ = "0.1.0"
