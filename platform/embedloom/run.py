"""What the spine is made of: a run, and the artefacts (nodes) that it consists of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from embedloom.artefacts import Artefact, ArtefactWriter
from embedloom.cluster.config import ClusterConfig, Profile
from embedloom.config.rates import RatesConfig
from embedloom.config.run import RunConfig
from embedloom.contents import Contents
from embedloom.storage import Place

Inputs = dict[str, Artefact]
Build = Callable[["Run", Inputs, ArtefactWriter], Artefact]


@dataclass(frozen=True, slots=True)
class Run:
    """One run config on one profile."""

    config: RunConfig
    cluster: ClusterConfig
    profile_name: str
    rates: RatesConfig | None = None  # of the file beside the cluster config; None: there is none

    @property
    def profile(self) -> Profile:
        """What the machines offer."""
        return self.cluster.profile(self.profile_name)

    @property
    def place(self) -> Place:
        """Root of the run's artefacts."""
        return Place(self.profile.run_folder(self.config.folder))


@dataclass(frozen=True, slots=True)
class Node:
    """One artefact of the graph."""

    name: str  # its folder below the run
    verb: str  # the command that builds it
    settings: tuple[Any, ...]  # what of the config it depends on
    inputs: tuple[str, ...]
    build: Build
    # What the files it reads hold, by what the config calls them: settings have it as a hash.
    reads: Mapping[str, Contents] = field(default_factory=dict)
    # The models it opens that are no artefacts of the run, as the config names them.
    models: tuple[str, ...] = ()
