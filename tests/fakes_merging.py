"""Models with made-up weights to merge, and arrays merged through the same readers and blocks."""

import itertools
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from embedloom.config.merging import MergingConfig
from embedloom.core.artefacts import ArtefactWriter
from embedloom.core.storage import Place
from embedloom.merging import stage
from embedloom.merging.methods import PREPARE
from embedloom.merging.plan import check_weights
from embedloom.merging.tensors import Operands, TensorFolder, open_tensors

_NUMBERS = itertools.count()


def stored(folder: Path, array: np.ndarray, name: str, dtype: torch.dtype = torch.float32) -> TensorFolder:
    place = folder / f"arrays-{next(_NUMBERS)}"
    place.mkdir(parents=True)
    tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32)).to(dtype)
    save_file({name: tensor}, place / "model.safetensors")
    return TensorFolder(Place(str(place)))


def merge_arrays(
    folder, method, arrays, weights=None, base=None, *, threads=1, name="w", **settings
) -> np.ndarray:
    """The merged array, flat, float32."""
    config = MergingConfig(method=method, weights=weights, **settings)
    used = check_weights(config, [f"m{number}" for number in range(len(arrays))], [name])
    folders = [stored(folder, np.asarray(array), name) for array in arrays]
    folders += [] if base is None else [stored(folder, np.asarray(base), name)]
    pool = ThreadPoolExecutor(threads) if threads > 1 else None
    with open_tensors(folders, name) as readers:
        models, origin = readers[: len(arrays)], None if base is None else readers[-1]
        operands = Operands(name, models[0].info.elements, models, origin, pool)
        block = PREPARE[method](operands, used, config)
        return torch.cat(list(operands.each(lambda start, stop: block(start, stop).clone()))).numpy()


def writer(folder):
    return ArtefactWriter(Place(str(folder)), "model", "config", {}, "local")


def merge(config, models, out, base=None, **settings):
    places = {name: Place(str(folder)) for name, folder in models.items()}
    return stage.merge(config, places, None if base is None else Place(str(base)), out, **settings)


def variant(source, folder, seed, dtype=torch.float32):
    """The same model with other weights."""
    shutil.copytree(source, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensors[name] = (tensor + 0.05 * torch.randn(tensor.shape, generator=generator)).to(dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def shard(folder, parts):
    """Cut the folder's weights into several files with an index, as transformers does."""
    tensors = load_file(folder / "model.safetensors")
    names, mapping = sorted(tensors), {}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        mapping |= dict.fromkeys(names[part::parts], file)
        save_file(
            {name: tensors[name] for name in names[part::parts]}, folder / file, metadata={"format": "pt"}
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    (folder / "model.safetensors").unlink()


def edit_json(path, **changes):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, **changes}))
