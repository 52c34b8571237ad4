"""Several models behind one endpoint: which of them a request asks, and whether its key may.

Each model has ``Calls``, names and handlers of its own, as if it were alone; here a request's ``model`` is read and the request handed
to that model's handler. An endpoint of one model that every key may use has nothing of this in its way.
"""

import functools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from fastapi import Request, Response

from embedloom.serving.calls import Backend, Calls, EndpointSettings, not_served
from embedloom.serving.front import facts_of
from embedloom.serving.refusals import ApiError
from embedloom.serving.routes import READY_TIMEOUT_SECONDS, Routes, json_reply

Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Member:
    """One of the models: what encodes, and its names and limits."""

    backend: Backend
    settings: EndpointSettings


class Members:
    """The models of an endpoint, the served one first."""

    def __init__(self, calls: Sequence[Calls]) -> None:
        self._calls = calls
        self._places = {name: place for place, one in enumerate(calls) for name in one.settings.names}

    def visible(self, http: Request) -> list[int]:
        """Places of those that the key of a request may use."""
        client = facts_of(http.scope).client
        return [
            place
            for place, one in enumerate(self._calls)
            if client is None or one.settings.allowed_keys is None or client.name in one.settings.allowed_keys
        ]

    def place_of(self, http: Request, name: str) -> int:
        """The place of a model by any of its names.

        Raises:
            ApiError: 404, there is none of that name, or not for this key; which of the two is not told.
        """
        visible = self.visible(http)
        place = self._places.get(name)
        if place is None or place not in visible:
            raise not_served(name, [one for seen in visible for one in self._calls[seen].settings.names])
        return place

    async def asked(self, http: Request) -> int:
        """The place of the model that a request's body names; without a name the first that its key may use.

        Raises:
            ApiError: 404, see ``place_of``; or the body is not JSON.
        """
        value = await self._calls[0].value(http)
        name = value.get("model") if isinstance(value, dict) else None
        # What is no name is for the handler to refuse.
        if isinstance(name, str) and name:
            return self.place_of(http, name)
        visible = self.visible(http)
        if not visible:
            raise not_served("", [])
        return visible[0]

    def dispatched(self, handlers: Sequence[Handler | None]) -> Handler:
        """The handler that hands a request to that of the model it asks.

        Args:
            handlers: one a model, in order; None: the model has no such route. The first has one, whose name and summary it gets.
        """
        first = handlers[0]
        if first is None:
            raise RuntimeError("the served model has every route")

        async def handler(http: Request) -> Response:
            place = await self.asked(http)
            own = handlers[place]
            if own is None:
                name = self._calls[place].settings.served_name
                raise ApiError(
                    404,
                    f"model: {name!r} does not answer {http.url.path:.80}; allowed: {self._calls[0].settings.served_name!r}",
                    param="model",
                    code="model_not_found",
                )
            return await own(http)

        functools.update_wrapper(handler, first)
        return handler


class MemberRoutes:
    """What operators ask of all models together."""

    def __init__(self, members: Members, plain: Sequence[Routes]) -> None:
        self._members = members
        self._plain = plain

    async def models(self, http: Request) -> Response:
        """The models that this key may use and their other names: contract hash, fingerprint, lineage, the gate's verdict."""
        cards = [card for place in self._members.visible(http) for card in await self._plain[place].cards()]
        return json_reply({"object": "list", "data": [card.model_dump() for card in cards]})

    async def model(self, http: Request) -> Response:
        """One model by name."""
        place = self._members.place_of(http, http.path_params["name"])
        return await self._plain[place].model(http)

    async def ready(self, _: Request) -> Response:
        """Ready: every model has an encoder, or will have one for the next request (``replicas`` 0)."""
        replies = [await one.readiness(READY_TIMEOUT_SECONDS) for one in self._plain]
        return json_reply(replies[0])
