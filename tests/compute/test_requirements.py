import importlib.util
import sys

import pytest

from embedloom.compute.generation import require_engine
from embedloom.errors import MissingDependency


@pytest.mark.parametrize(("gpu", "extra"), [(False, "cpu"), (True, "gpu")])
def test_a_missing_engine_names_its_extra(monkeypatch: pytest.MonkeyPatch, gpu: bool, extra: str):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=rf"^synthesis needs .*pip install 'embedloom\[{extra}\]'$"):
        require_engine(gpu)


def test_looking_for_the_engine_does_not_import_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    before = set(sys.modules)
    require_engine(gpu=False)
    assert set(sys.modules) == before
