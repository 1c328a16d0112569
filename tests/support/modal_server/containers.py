"""Containers: started as inputs come, stopped when idle or preempted, and what they ask of the server."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import defaultdict, deque
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf.empty_pb2 import Empty
from modal_proto import api_pb2 as pb

from support import warm
from support.modal_server.parts import Event, Part, new_id
from support.modal_server.processes import ONE_THREAD, Process, numba_cache, start, starter_of
from support.starter import Specification

if TYPE_CHECKING:
    from support.modal_server.calls import Input
    from support.modal_server.functions import Function
    from support.modal_server.server import Server
    from support.modal_server.volumes import WorkingCopy

# An idle container waits this long for another input, unless its function says otherwise, as on Modal.
IDLE_SECONDS = 60
# What a container that is preempted, or whose app ends, has for its exit methods and commits. Modal gives 30.
GRACE_SECONDS = 10.0
# An input that takes its container down so often is not delivered again.
MAX_DELIVERIES = 4


@dataclass
class Container:
    """A container.

    working: inputs that it has not answered. waiting: whether it waits for one. was_used: whether it ever took one. stopping:
    it gets no more.
    """

    id: str
    function: Function
    folder: Path
    process: Process | None = None
    volumes: dict[str, WorkingCopy] = field(default_factory=dict)
    working: dict[str, Input] = field(default_factory=dict)
    waiting: bool = False
    was_used: bool = False
    stopping: bool = False
    preempted: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    def open_files(self) -> set[tuple[int, int]]:
        """Device and inode of each file that its process has open: paths are seen from its own file system."""
        found = set()
        if self.process is not None:
            with suppress(OSError):
                for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
                    with suppress(OSError):
                        found.add((link.stat().st_dev, link.stat().st_ino))
        return found


class Containers(Part):
    """Containers of the running command."""

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.containers: list[Container] = []
        self.queues: defaultdict[str, deque[Input]] = defaultdict(deque)
        self.changed: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._preempt = set(self.server.settings.preempt)

    def deliver(self, one: Input, *, first: bool = False) -> None:
        """Queue an input for the next container that is free, and start another container if there may be more."""
        function = one.call.function
        queue = self.queues[function.id]
        if first:
            queue.appendleft(one)
        else:
            queue.append(one)
        self.changed[function.id].set()
        alive = [container for container in self.containers if container.function.id == function.id and not container.stopping]
        limit = function.definition.autoscaler_settings.max_containers or self.server.settings.max_containers
        free = sum(not container.working for container in alive)
        if len(queue) > free and len(alive) < limit:
            container = Container(new_id("ta"), function, self.server.folder / f"container-{len(self.containers)}")
            self.containers.append(container)
            self.server.run(self._live(container))

    async def _live(self, container: Container) -> None:
        """Start a container, wait for its end, and see to the inputs that it left."""
        failure = ""
        try:
            container.folder.mkdir()
            connection = await self.server.listen(container.folder / "socket", container)
            code = await self._run(container)
            connection.close()
        except Exception as error:
            code, failure = None, f"the container could not be run: {error!r}"
            self.server.apps.say(container, 2, failure + "\n")
        container.stopping = True
        container.ended.set()
        self.server.note(Event(kind="container_end", container=container.id, function=container.function.name))
        for left in list(container.working.values()):
            if container.preempted:
                self.deliver(left, first=True)
            else:
                status = pb.GenericResult.GENERIC_STATUS_FAILURE
                result = pb.GenericResult(status=status, exception=f"Runner terminated (exit code {code})")
                self.server.run(
                    self.server.calls.finish(left, result, for_good=left.delivered >= MAX_DELIVERIES or code is None)
                )
        container.working.clear()
        queue = self.queues[container.function.id]
        if code and not container.was_used and not container.preempted and queue:
            # It could not even request an input, so the next one could not either.
            code, failure = None, f"the container ended with exit code {code} before it took an input"
        if code is None:
            status = pb.GenericResult.GENERIC_STATUS_INIT_FAILURE
            await self._fail(container, pb.GenericResult(status=status, exception=failure))
        elif queue and not self.server.apps.apps[container.function.app].ended:
            self.deliver(queue.popleft(), first=True)

    async def _run(self, container: Container) -> int:
        path = self._specify(container)
        self.server.note(Event(kind="container_start", container=container.id, function=container.function.name))
        settings = self.server.settings
        starter = starter_of(settings.python, settings.modules, self.server.functions.environment(container.function).variables)
        container.process = await start(starter, path, lambda number, text: self.server.apps.say(container, number, text))
        if container.stopping:
            container.process.kill()
        code = await container.process.wait()
        # What it has started and not stopped would keep its output open.
        with suppress(ProcessLookupError):
            os.killpg(container.process.pid, 9)
        await asyncio.gather(*container.process.readers)
        return code

    def _specify(self, container: Container) -> Path:
        """Write down what the container gets."""
        function, folder, definition = container.function, container.folder, container.function.definition
        environment = self.server.functions.environment(function)
        arguments = pb.ContainerArguments(
            task_id=container.id,
            function_id=function.id,
            app_id=function.app,
            function_def=definition,
            environment_name="main",
            app_layout=self.server.functions.layout(function.app),
            serialized_params=function.parameters,
        )
        (folder / "arguments").write_bytes(arguments.SerializeToString())
        for name in ("root", "tmp", "volumes"):
            (folder / name).mkdir()
        mounts = [(path, str(source), False) for path, source in environment.folders.items()]
        # Its /tmp is its own, and so the server's folder is shown elsewhere.
        mounts += [("/tmp", str(folder / "tmp"), False), ("/__modal", str(folder), False)]
        mounts.append(("/__numba", str(numba_cache()), False))
        for mount in definition.volume_mounts:
            copy = self.server.volumes.mount(mount.volume_id, folder / "volumes" / mount.volume_id)
            container.volumes[mount.volume_id] = copy
            source = copy.folder / mount.sub_path.strip("/")
            source.mkdir(parents=True, exist_ok=True)
            mounts.append((mount.mount_path.rstrip("/"), str(source), mount.read_only))
        files = [
            (path, str(self.server.store.path_of(sha256)))
            for mount_id in definition.mount_ids
            for path, sha256 in self.server.store.mounts[mount_id]
        ]
        variables = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "PYTHONUNBUFFERED": "1",
            **ONE_THREAD,
            **environment.variables,
            **self.server.settings.environment,
            "PYTHONPATH": ":".join(environment.python_path),
            "NUMBA_CACHE_DIR": "/__numba",
            "MODAL_SERVER_URL": "unix:///__modal/socket",
            "MODAL_TASK_ID": container.id,
            "MODAL_IS_REMOTE": "1",
            "MODAL_ENVIRONMENT": "main",
            "MODAL_CONTAINER_ARGUMENTS_PATH": "/__modal/arguments",
        }
        specification = Specification(
            module="modal._container_entrypoint",
            arguments=[],
            root=str(folder / "root"),
            workdir=environment.workdir,
            environment=variables,
            python_path=environment.python_path,
            cores=warm.cores_of_this_process(),
            mounts=mounts,
            files=files,
            # The interpreters' folders, visible even below the paths that containers have for themselves, such as /tmp.
            kept=sorted({sys.prefix, sys.base_prefix, str(self.server.settings.python.parent.parent)}),
        )
        (folder / "specification").write_text(json.dumps(asdict(specification)))
        return folder / "specification"

    async def stop_app(self, app: str) -> None:
        """Stop all containers of an app; their exit methods run."""
        mine = [one for one in self.containers if one.function.app == app]
        await asyncio.gather(*(self._stop(container) for container in mine))

    async def _stop(self, container: Container) -> None:
        container.stopping = True
        if container.waiting:
            self.changed[container.function.id].set()
        elif container.process is not None:
            container.process.interrupt()
        with suppress(TimeoutError):
            await asyncio.wait_for(container.ended.wait(), GRACE_SECONDS)
        if container.process is not None:
            container.process.kill()
        await container.ended.wait()

    async def kill_all(self) -> None:
        """End all containers at once."""
        for container in self.containers:
            container.stopping = True
            if container.process is not None:
                container.process.kill()
        await asyncio.gather(*(container.ended.wait() for container in self.containers))

    async def ContainerHello(self, request: Empty, container: Container | None) -> Empty:
        return Empty()

    async def ContainerHeartbeat(
        self, request: pb.ContainerHeartbeatRequest, container: Container | None
    ) -> pb.ContainerHeartbeatResponse:
        return pb.ContainerHeartbeatResponse()

    async def FunctionGetInputs(
        self, request: pb.FunctionGetInputsRequest, container: Container | None
    ) -> pb.FunctionGetInputsResponse:
        """The next input, one at a time; or, if none comes for some time, the order to stop."""
        assert container is not None
        queue, changed = self.queues[container.function.id], self.changed[container.function.id]
        idle = container.function.definition.autoscaler_settings.scaledown_window or IDLE_SECONDS
        end = asyncio.get_running_loop().time() + idle
        while not container.stopping:
            if queue:
                return pb.FunctionGetInputsResponse(inputs=[self._hand_over(queue.popleft(), container)])
            container.waiting = True
            changed.clear()
            try:
                await asyncio.wait_for(changed.wait(), end - asyncio.get_running_loop().time())
            except TimeoutError:
                container.stopping = True
            finally:
                container.waiting = False
        return pb.FunctionGetInputsResponse(inputs=[pb.FunctionGetInputsItem(kill_switch=True)])

    def _hand_over(self, one: Input, container: Container) -> pb.FunctionGetInputsItem:
        one.delivered += 1
        container.working[one.id] = one
        container.was_used = True
        name = container.function.name
        self.server.note(Event(kind="input", container=container.id, function=name, input=one.number))
        if one.call.is_map and one.number in self._preempt:
            self._preempt.remove(one.number)
            self.server.run(self._preempt_later(container, one))
        if container.function.definition.timeout_secs:
            self.server.run(self._time_out(container, one, one.delivered))
        return pb.FunctionGetInputsItem(
            input_id=one.id,
            input=one.item,
            function_call_id=one.call.id,
            function_call_invocation_type=one.call.invocation,
            retry_count=one.retry,
            function_map_idx=one.number,
        )

    async def _preempt_later(self, container: Container, one: Input) -> None:
        """Take the container away, unless it has answered the input by then."""
        await asyncio.sleep(self.server.settings.preempt_after)
        if one.id in container.working:
            name = container.function.name
            self.server.note(Event(kind="preempt", container=container.id, function=name, input=one.number))
            container.preempted = True
            await self._stop(container)

    async def _time_out(self, container: Container, one: Input, delivered: int) -> None:
        seconds = container.function.definition.timeout_secs
        await asyncio.sleep(seconds)
        if container.working.get(one.id) is one and one.delivered == delivered:
            del container.working[one.id]
            text = f"Task's current input hit its timeout of {seconds}s"
            result = pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_TIMEOUT, exception=text)
            self.server.run(self.server.calls.finish(one, result, task_id=container.id))
            await self._stop(container)

    async def FunctionPutOutputs(self, request: pb.FunctionPutOutputsRequest, container: Container | None) -> Empty:
        assert container is not None
        for output in request.outputs:
            one = container.working.pop(output.input_id, None)
            if one is not None:
                self.server.run(self.server.calls.finish(one, output.result, output.data_format, container.id))
        return Empty()

    async def TaskResult(self, request: pb.TaskResultRequest, container: Container | None) -> Empty:
        """Called by a container that could not start: so could no other."""
        assert container is not None
        await self._fail(container, request.result)
        return Empty()

    async def _fail(self, container: Container, result: pb.GenericResult) -> None:
        container.stopping = True
        queue = self.queues[container.function.id]
        left = [*container.working.values(), *queue]
        container.working.clear()
        queue.clear()
        for one in left:
            await self.server.calls.finish(one, result, task_id=container.id, for_good=True)
