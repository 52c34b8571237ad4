"""What every node of a cluster has in its environment, whoever starts it."""

import math

from embedloom.cluster.config import ClusterConfig, NodePool, Profile
from embedloom.config.resources import LISTENER_VARIABLE
from embedloom.errors import ConfigError

# What Serve calls in every process that listens: serving/listener.py.
PROXY_CALLBACK = "embedloom.serving.listener.proxy_middlewares"


def node_environment(profile: Profile, pool: NodePool) -> dict[str, str]:
    """Variables of a node's Ray process, by name."""
    found = serve_environment(profile)
    if pool.spot:
        found["RAY_NODE_MARKET_TYPE"] = "spot"  # Ray's own label ray.io/market-type
    return found


def serve_environment(profile: Profile) -> dict[str, str]:
    """What Serve's controller and replicas read when they are imported, on whichever machine that is."""
    # The endpoint's handlers hand what takes long to threads, so they need no event loop in a thread of its own, to and
    # from which every request is passed: single runs on two cores, 64 clients, 404 requests a second instead of 373.
    found = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}
    found["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] = PROXY_CALLBACK
    found[LISTENER_VARIABLE] = profile.serve.listener.model_dump_json()
    if profile.serve.haproxy:
        found["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
        # HAProxy's own bounds: on the size of a request's headers, of which it keeps a kibibyte for itself, and on the
        # silence of a client that has not sent them all.
        found["RAY_SERVE_HAPROXY_TUNE_BUFSIZE"] = str(profile.serve.listener.max_header_bytes + 1024)
        found["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"] = str(math.ceil(profile.serve.listener.header_seconds))
    return found


def required_image(cluster: ClusterConfig) -> str:
    """The image of every node.

    Raises:
        ConfigError: none is stated.
    """
    if cluster.ray.image is None:
        raise ConfigError("ray.image: required to render a cluster's files, but missing")
    return cluster.ray.image
