"""Tensors of one backbone under one name: prefixes of wrapper classes taken off, heads that not all models have left out.

A causal language model is saved as ``model.layers.0...`` beside its ``lm_head``, the same backbone alone as
``layers.0...``; BERT for masked tokens as ``bert.encoder...`` beside ``cls``. Neither changes a vector.
"""

from collections.abc import Mapping

from embedloom.merging.tensors import TensorFolder

# Modules of transformers behind or beside a backbone, and buffers that older versions stored.
_HEADS = {
    "lm_head", "embed_out", "score", "classifier", "classification_head", "qa_outputs", "cls", "predictions", "pooler",
    "vocab_transform", "vocab_layer_norm", "vocab_projector", "generator_predictions", "generator_lm_head",
    "discriminator_predictions", "mlm_head", "head", "value_head", "v_head",
}  # fmt: skip
_BUFFERS = ("rotary_emb.inv_freq", "position_ids", "token_type_ids", "attn.bias", "attn.masked_bias")
_DEEPEST_PREFIX = 3  # "model.language_model."


def align(models: Mapping[str, TensorFolder]) -> tuple[dict[str, TensorFolder], dict[str, list[str]]]:
    """All folders under the first one's names.

    Where no prefix brings a folder's names to the first's, it is left as it is: the check of the tensors says what is
    missing.

    Args:
        models: by name; the base too, where the method reads it.

    Returns:
        The folders, and the tensors that were left out because not all have them, each with those that do.
    """
    (first, reference), *others = models.items()
    backbone = [name for name in reference.infos if not _is_beside(name)]
    names = {first: {name: name for name in reference.infos}}
    names |= {name: _names_of(folder, backbone) for name, folder in others}
    beside = {new for own in names.values() for new in own if _is_beside(new)}
    shared = {new for new in beside if all(new in own for own in names.values())}
    kept = {
        name: {new: own for new, own in found.items() if new not in beside or new in shared}
        for name, found in names.items()
    }
    left_out = {new: [name for name, own in names.items() if new in own] for new in sorted(beside - shared)}
    return {name: models[name].renamed(found) for name, found in kept.items()}, left_out


def _names_of(folder: TensorFolder, backbone: list[str]) -> dict[str, str]:
    """New name -> own name of a folder's tensors, so that those of the backbone are called as they are there."""
    own = set(folder.infos)
    for taken, given in [("", ""), *_prefixes(own, backbone)]:
        mapped = {name: given + name.removeprefix(taken) for name in backbone if name.startswith(taken)}
        if len(mapped) == len(backbone) and own.issuperset(mapped.values()):
            rest = own - set(mapped.values())
            return mapped | {taken + name.removeprefix(given): name for name in rest}
    return {name: name for name in own}


def _prefixes(own: set[str], backbone: list[str]) -> list[tuple[str, str]]:
    """(taken off the first model's names, put before them) that could fit, shortest first."""
    given = {prefix for name in own for prefix in _starts(name)}
    taken = set.intersection(*(set(_starts(name)) for name in backbone)) if backbone else set()
    pairs = [("", prefix) for prefix in given] + [(prefix, "") for prefix in taken]
    pairs += [(one, other) for one in taken for other in given]
    return sorted(pairs, key=lambda pair: (len(pair[0]) + len(pair[1]), pair))


def _starts(name: str) -> list[str]:
    parts = name.split(".")[:-1][:_DEEPEST_PREFIX]
    return [".".join(parts[:count]) + "." for count in range(1, len(parts) + 1)]


def _is_beside(name: str) -> bool:
    """Whether a tensor is of a head, or a buffer; both may stand behind a wrapper's prefix (``bert.pooler``)."""
    parts = name.split(".")
    return parts[0] in _HEADS or (len(parts) > 1 and parts[1] in _HEADS) or name.endswith(_BUFFERS)
