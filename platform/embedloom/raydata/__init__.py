"""Embedding, and writing what was embedded, as operations on any ``ray.data.Dataset``."""
