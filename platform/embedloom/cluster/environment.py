"""What every node of a cluster has in its environment, whoever starts it."""

from embedloom.cluster.config import ClusterConfig, NodePool, Profile
from embedloom.errors import ConfigError


def node_environment(profile: Profile, pool: NodePool) -> dict[str, str]:
    """Variables of a node's Ray process, by name."""
    found = serve_environment(profile)
    if pool.spot:
        found["RAY_NODE_MARKET_TYPE"] = "spot"  # Ray's own label ray.io/market-type
    return found


def serve_environment(profile: Profile) -> dict[str, str]:
    """What Serve's controller reads when it is imported, on whichever machine that is."""
    return {"RAY_SERVE_ENABLE_HA_PROXY": "1"} if profile.serve.haproxy else {}


def required_image(cluster: ClusterConfig) -> str:
    """The image of every node.

    Raises:
        ConfigError: none is stated.
    """
    if cluster.ray.image is None:
        raise ConfigError("ray.image: required to render a cluster's files, but missing")
    return cluster.ray.image
