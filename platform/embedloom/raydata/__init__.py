"""Embedding as an operation on any ``ray.data.Dataset``."""
