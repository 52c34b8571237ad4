"""The endpoint as a Serve application.

From the project root, with the package on the path:

    serve run serve.app:build model_folder=runs/quickstart/merged served_name=quickstart
    serve deploy serve/config.yaml

Without arguments the model comes from EMBEDLOOM_MODEL and its name from EMBEDLOOM_MODEL_NAME.
"""

import os
from typing import Any

from ray.serve import Application

from embedloom.serving.app import build as build_from_arguments


def build(args: dict[str, Any]) -> Application:
    """Bind the application; arguments are the fields of ``embedloom.config.serving.ApplicationArgs``."""
    environment = {"model_folder": "EMBEDLOOM_MODEL", "served_name": "EMBEDLOOM_MODEL_NAME"}
    given = {key: os.environ[name] for key, name in environment.items() if name in os.environ}
    return build_from_arguments({**given, **args})
