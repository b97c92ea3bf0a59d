"""One run of a kernel on one or two cores.

The cores run one at a time, each until it meets the other, so that a run is repeatable; what they may not do to each
other's tensors between two meetings is checked at every access (`_access.check_hazards`).
"""

import threading
from collections.abc import Callable
from typing import Any

from nki._errors import fail, kernel_line
from nki._machine import Core, enter
from nki._memory import Storage


class _Abandoned(BaseException):
    """The other core failed."""


class Launch:
    """The cores of a run, where they meet, and the tensors that they share."""

    def __init__(self, generation: int, num_cores: int, with_grid: bool) -> None:
        self.cores = [Core(generation, core, num_cores, with_grid, self) for core in range(num_cores)]
        self.shared: list[Storage] = []
        self._condition = threading.Condition()
        self._running = 0
        self._meeting: dict[int, tuple[Any, ...]] = {}
        self._ended: set[int] = set()
        self._error: BaseException | None = None

    def run(self, body: Callable[[], Any]) -> list[Any]:
        """Run `body` on each core and give the results."""
        if len(self.cores) == 1:
            enter(self.cores[0])
            try:
                return [body()]
            finally:
                enter(None)
        results: list[Any] = [None, None]
        threads = [threading.Thread(target=self._work, args=(core, body, results), daemon=True) for core in self.cores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error
        return results

    def _work(self, core: Core, body: Callable[[], Any], results: list[Any]) -> None:
        enter(core)
        try:
            with self._condition:
                self._wait(core)
            results[core.core] = body()
        except _Abandoned:
            pass
        except BaseException as error:
            self._error = self._error or error
        finally:
            with self._condition:
                self._ended.add(core.core)
                self._running = 1 - core.core
                self._condition.notify_all()

    def _wait(self, core: Core) -> None:
        self._condition.wait_for(lambda: self._running == core.core or self._error is not None)
        if self._error is not None:
            raise _Abandoned

    def meet(self, core: Core, kind: str, agreed: tuple[Any, ...], payload: Any = None) -> Any:
        """Wait for the other core at the same kind of event with the same arguments, and give its payload."""
        other = 1 - core.core
        with self._condition:
            line = kernel_line()
            if other not in self._meeting:
                meeting = self._meeting = {core.core: (kind, agreed, payload, line)}
                if other not in self._ended:
                    self._running = other
                    self._condition.notify_all()
                    self._wait(core)
                if other not in meeting:
                    rule = "follow the same sequence of dynamic loops, barriers and exchanges"
                    fail(kind, f"cores 0 and 1's control flow on core {core.core}", rule, f"the end of core {other}")
                return meeting[other][2]
            meeting, self._meeting = self._meeting, {}
            theirs = meeting[other]
            if theirs[:2] != (kind, agreed):
                rule = f"be that of core {other} ({theirs[0]} {theirs[1]} at {theirs[3]})"
                fail(kind, f"control flow of core {core.core}", rule, f"{kind} {agreed}")
            meeting[core.core] = (kind, agreed, payload, line)
            return theirs[2]


def meet(core: Core, kind: str, agreed: tuple[Any, ...] = (), payload: Any = None) -> Any:
    """Meet the other core; alone, go on."""
    if core.num_cores == 2 and core.launch is not None:
        return core.launch.meet(core, kind, agreed, payload)
    return None
