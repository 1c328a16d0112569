"""The server: it answers the command line and containers of the `modal` package, on this machine and offline."""

from __future__ import annotations

import asyncio
import inspect
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any

import grpclib.server
from google.protobuf.message import Message
from grpclib import GRPCError, Status
from modal_proto import api_grpc

from support.modal_server.apps import Apps
from support.modal_server.calls import Calls
from support.modal_server.containers import Container, Containers
from support.modal_server.functions import Functions
from support.modal_server.parts import Event, Settings
from support.modal_server.store import Store
from support.modal_server.volumes import Volumes


class Server:
    """Modal's servers for one command at a time: `with Server(...) as server`, in a thread of its own.

    state: the account's folder, with its Volumes in `volumes`; everything else ends with the block, containers too.
    `environment` has what the `modal` command needs to find this server; `events` has what happened.
    """

    def __init__(self, state: Path, settings: Settings) -> None:
        self.state, self.settings = state, settings
        self.events: list[Event] = []

    def __enter__(self) -> Server:
        for name in ("volumes", "images"):
            (self.state / name).mkdir(parents=True, exist_ok=True)
        # Paths of sockets are short: not below the state.
        self.folder = Path(tempfile.mkdtemp(prefix="modal-"))
        self._token = secrets.token_urlsafe(16)
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="modal-server", daemon=True)
        self._thread.start()
        self._wait(self._start())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._wait(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """Variables for a command that is to use this server."""
        return {
            "MODAL_SERVER_URL": f"unix://{self.folder / 'socket'}",
            "MODAL_TOKEN_ID": "ak-offline",
            "MODAL_TOKEN_SECRET": self._token,
            "MODAL_CONFIG_PATH": str(self.folder / "none.toml"),
        }

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something in the background."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def note(self, event: Event) -> None:
        """Add an event to what happened."""
        self.events.append(event)

    async def listen(self, socket: Path, container: Container | None) -> grpclib.server.Server:
        """Answer on a socket, which one container uses, or any client that has the token."""
        handlers = {name: self._handler(name, container) for name in api_grpc.ModalClientBase.__abstractmethods__}
        service = type("Service", (api_grpc.ModalClientBase,), handlers)()
        server = grpclib.server.Server([service])
        await server.start(path=str(socket))
        return server

    async def _start(self) -> None:
        self.store, self.volumes, self.functions = Store(self), Volumes(self), Functions(self)
        self.apps, self.calls, self.containers = Apps(self), Calls(self), Containers(self)
        self._parts = (self.store, self.volumes, self.functions, self.apps, self.calls, self.containers)
        await self.store.start()
        self._server = await self.listen(self.folder / "socket", None)

    async def _stop(self) -> None:
        await self.containers.kill_all()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._server.close()
        await self._server.wait_closed()
        await self.store.stop()

    def _handler(self, name: str, container: Container | None) -> Callable[[Any, Any], Coroutine[Any, Any, None]]:
        procedure = next((getattr(part, name) for part in self._parts if hasattr(part, name)), None)

        async def handle(_: object, stream: grpclib.server.Stream[Message, Message]) -> None:
            request = await stream.recv_message()
            assert stream.metadata is not None
            if container is None and stream.metadata.get("x-modal-token-secret") != self._token:
                raise GRPCError(Status.UNAUTHENTICATED, "Token missing or wrong")
            if procedure is None:
                raise GRPCError(
                    Status.UNIMPLEMENTED, f"{name} is not a part of the offline server in tests/support/modal_server"
                )
            answer = procedure(request, container)
            if inspect.isasyncgen(answer):
                async for message in answer:
                    await stream.send_message(message)
            else:
                await stream.send_message(await answer)

        return handle

    def _wait(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result()
