"""The files of a merged model: which tensor goes where, known before any is computed."""

import json
from dataclasses import dataclass

from embedloom.merging.tensors import CODES, INDEX_FILE, WEIGHTS_FILE, TensorInfo
from embedloom.storage import Place


@dataclass(frozen=True, slots=True)
class WeightFile:
    """One safetensors file to write."""

    name: str
    infos: tuple[TensorInfo, ...]  # in the order of their bytes

    @property
    def header(self) -> bytes:
        """Length and JSON header, as the format asks, padded so that the tensors are aligned."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for info in self.infos:
            entries[info.name] = {
                "dtype": CODES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, offset + info.nbytes],
            }
            offset += info.nbytes
        encoded = json.dumps(entries, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        return len(encoded).to_bytes(8, "little") + encoded

    @property
    def nbytes(self) -> int:
        """Size of the finished file."""
        return len(self.header) + sum(info.nbytes for info in self.infos)


def weight_files(infos: list[TensorInfo], file_bytes: int) -> list[WeightFile]:
    """Cut tensors into files in the layout transformers loads.

    Args:
        infos: what will be written.
        file_bytes: no file's tensors exceed this, unless one tensor does. It decides the layout alone, so the same
            merge gives the same files on any number of workers.
    """
    # Wide types first keeps every tensor aligned, as the format asks.
    ordered = sorted(infos, key=lambda info: (-info.dtype.itemsize, info.name))
    cut: list[list[TensorInfo]] = [[]]
    size = 0
    for info in ordered:
        if cut[-1] and size + info.nbytes > file_bytes:
            cut.append([])
            size = 0
        cut[-1].append(info)
        size += info.nbytes
    if len(cut) == 1:
        return [WeightFile(WEIGHTS_FILE, tuple(cut[0]))]
    return [
        WeightFile(f"model-{number:05d}-of-{len(cut):05d}.safetensors", tuple(part))
        for number, part in enumerate(cut, start=1)
    ]


def write_index(place: Place, files: list[WeightFile]) -> None:
    """Write the index of several files; one file alone has none."""
    if len(files) == 1:
        return
    total = sum(info.nbytes for file in files for info in file.infos)
    mapping = {info.name: file.name for file in files for info in file.infos}
    place.write_json(INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": mapping})
