"""Where KubeRay's own definitions are, for the tests that hold our manifests against them."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def kuberay_crds() -> Path:
    """Folder of KubeRay's custom resource definitions: $KUBERAY_CRDS, or shared/data beside the project; a megabyte each."""
    beside = Path(__file__).parents[3] / "shared/data/kuberay_crds"
    folder = Path(os.environ.get("KUBERAY_CRDS", beside))
    if not folder.is_dir():
        pytest.skip(
            "no folder of KubeRay's definitions: neither $KUBERAY_CRDS nor shared/data beside the project"
        )
    return folder
