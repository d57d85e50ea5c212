"""Reading ahead and writing behind: the disk works while the caller computes, one step either way."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


def ahead(items: Iterable[Item], load: Callable[[Item], Loaded]) -> Generator[Loaded, None, None]:
    """`load` of each item in order; the next is loaded in a thread while the caller uses the last.

    At most two are in memory if the caller keeps none. What `load` raises is raised here, at its item's
    turn. Close the generator when leaving early (`contextlib.closing`): that waits for the load under way.
    """
    waiting = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:

        def start() -> Future[Loaded] | None:
            for item in waiting:
                return pool.submit(load, item)
            return None

        future = start()
        while future is not None:
            loaded = future.result()
            future = start()
            yield loaded
            del loaded


class Behind:
    """Calls in a thread, one after another, while the caller goes on; a context manager.

    `submit` waits for the call before, so that at most one is under way, and raises what that one raised.
    Leaving the block waits for the last; if the block itself failed, its own error is the one raised.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="behind")
        self._last: Future[None] | None = None

    def __enter__(self) -> Behind:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True)
        failed = None if self._last is None else self._last.exception()
        if failed is None:
            return
        if error is None:
            raise failed
        error.add_note(f"Besides, the step before could not be kept: {failed}")

    def submit(self, call: Callable[..., None], *arguments: Any) -> None:
        """Start `call(*arguments)` when the one before is done.

        Raises:
            Exception: What the call before raised.
        """
        if self._last is not None:
            last, self._last = self._last, None
            last.result()
        self._last = self._pool.submit(call, *arguments)
