"""Apps from their creation to their end, and what their containers print."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2 as pb

from support.modal_server.containers import Container
from support.modal_server.parts import Part, new_id

if TYPE_CHECKING:
    from support.modal_server.server import Server

# The version of Modal's own packages in images: the client requests it, and nothing depends on it here.
IMAGE_BUILDER = "2025.06"


@dataclass
class App:
    """A running app. lines: everything its containers have printed. ended: no more will come."""

    detached: bool
    published: pb.AppPublishRequest = field(default_factory=pb.AppPublishRequest)
    lines: list[pb.TaskLogsBatch] = field(default_factory=list)
    ended: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Apps(Part):
    """Apps of the running command."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.apps: dict[str, App] = {}

    def say(self, container: Container, number: int, text: str) -> None:
        """Log what a container printed. number: 1 for standard output, 2 for errors."""
        app = self.apps[container.function.app]
        descriptor = pb.FILE_DESCRIPTOR_STDOUT if number == 1 else pb.FILE_DESCRIPTOR_STDERR
        line = pb.TaskLogs(data=text, file_descriptor=descriptor, timestamp=time.time())
        app.lines.append(
            pb.TaskLogsBatch(
                task_id=container.id, function_id=container.function.id, items=[line], entry_id=f"{len(app.lines) + 1}-0"
            )
        )
        app.changed.set()

    async def ClientHello(self, request: Empty, container: Container | None) -> pb.ClientHelloResponse:
        return pb.ClientHelloResponse()

    async def EnvironmentGetOrCreate(
        self, request: pb.EnvironmentGetOrCreateRequest, container: Container | None
    ) -> pb.EnvironmentGetOrCreateResponse:
        settings = pb.EnvironmentSettings(image_builder_version=IMAGE_BUILDER)
        metadata = pb.EnvironmentMetadata(name=request.deployment_name or "main", settings=settings)
        return pb.EnvironmentGetOrCreateResponse(environment_id="en-main", metadata=metadata)

    async def AppCreate(self, request: pb.AppCreateRequest, container: Container | None) -> pb.AppCreateResponse:
        app_id = new_id("ap")
        self.apps[app_id] = App(detached=request.app_state == pb.APP_STATE_DETACHED)
        return pb.AppCreateResponse(app_id=app_id, app_page_url=f"http://offline.invalid/{app_id}")

    async def AppPublish(self, request: pb.AppPublishRequest, container: Container | None) -> pb.AppPublishResponse:
        self.apps[request.app_id].published = request
        return pb.AppPublishResponse(url=f"http://offline.invalid/{request.app_id}", deployed_at=time.time())

    async def AppHeartbeat(self, request: pb.AppHeartbeatRequest, container: Container | None) -> Empty:
        return Empty()

    async def AppClientDisconnect(self, request: pb.AppClientDisconnectRequest, container: Container | None) -> Empty:
        """A detached app continues, unless its client had finished."""
        done = request.reason == pb.APP_DISCONNECT_REASON_ENTRYPOINT_COMPLETED
        if done or not self.apps[request.app_id].detached:
            self.server.run(self._end(request.app_id))
        return Empty()

    async def _end(self, app_id: str) -> None:
        await self.server.containers.stop_app(app_id)
        self.apps[app_id].ended = True
        self.apps[app_id].changed.set()

    async def AppGetLogs(self, request: pb.AppGetLogsRequest, container: Container | None) -> AsyncIterator[pb.TaskLogsBatch]:
        """What was printed since the entry that the client saw last, and what will be until the app ends or it is time."""
        app = self.apps[request.app_id]
        sent = int(request.last_entry_id.split("-")[0] or 0)
        end = time.monotonic() + request.timeout
        while True:
            for line in app.lines[sent:]:
                yield line
                sent += 1
            if sent < len(app.lines):
                continue
            if app.ended:
                yield pb.TaskLogsBatch(app_done=True)
                return
            app.changed.clear()
            try:
                await asyncio.wait_for(app.changed.wait(), end - time.monotonic())
            except TimeoutError:
                return
