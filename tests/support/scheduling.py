"""Which test process runs which tests: modules that compile the same functions, or share slow fixtures, go to the same one."""

from __future__ import annotations

from pathlib import PurePosixPath

from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped] # it has types, but does not say so


def folder_together(nodeid: str) -> str | None:
    """The folder of tests that one process runs, or None if the test's module may run in any.

    Two processes that need the same compiled function at about the same time would both compile it.
    """
    folders = PurePosixPath(nodeid.partition("::")[0]).parts[:-1]
    if folders[1:2] in {("analysis",), ("modal_jobs",)}:
        return "/".join(folders[:2])
    return "/".join(folders[:3]) if folders[1:2] == ("speculation",) else None


class FolderScheduling(LoadScopeScheduling):  # type: ignore[misc] # for want of its types
    """As `--dist loadscope`, but some folders are not divided."""

    def _split_scope(self, nodeid: str) -> str:
        return folder_together(nodeid) or str(super()._split_scope(nodeid))
