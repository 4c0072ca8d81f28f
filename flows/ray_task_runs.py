"""Each piece that a Ray cluster works on as a task run in Prefect, through prefect-ray: its state, node, log and duration.

prefect-ray's runner submits to Ray what Prefect calls a task; Ray places it (`num_cpus`, `num_gpus`) and moves it to another
node when its own dies. A task run reports to Prefect's API from where it runs, so the cluster's machines must reach that.
"""

import ipaddress
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.context import TaskRunContext
from prefect.settings import get_current_settings
from prefect.states import Failed

from models.compute import Pieces, Spec

if TYPE_CHECKING:
    from prefect_ray import RayTaskRunner


@task(persist_result=False, cache_policy=NO_CACHE)
def piece(number: int, function: str, spec: Spec, board: Any) -> Any:
    """A piece, on the node that Ray chose."""
    import ray

    from models.ray_engine import run_here

    logger = get_run_logger()
    logger.info("on node %s", ray.util.get_node_ip_address())
    found = run_here(number, function, spec, board, logger.info)
    return Failed(message=found["message"], data=found) if "error" in found else found


class TaskRuns:
    """Pieces as task runs."""

    def __init__(self, runner: "RayTaskRunner[Any]", options: dict[str, Any]) -> None:
        self._runner, self._options = runner, options

    def submit(self, name: str, number: int, function: str, spec: Spec, board: Any) -> Any:
        """Hand a piece to Ray; what `ray.wait` takes."""
        from prefect_ray.context import remote_options

        parameters = {"number": number, "function": function, "spec": spec, "board": board}
        named = piece.with_options(name=name)
        with remote_options(**self._options), _travelling(named):
            return self._runner.submit(named, parameters).wrapped_future

    def outcome(self, value: Any) -> dict[str, Any]:
        """What `piece` ended with: Ray returns its state. Raises what a piece died of that could not say so itself."""
        found: dict[str, Any] = value.result(raise_on_failure="error" not in getattr(value.data, "result", {}))
        return found


@contextmanager
def offer_task_runs(options: dict[str, Any], alone: bool, on_log: Callable[[str], None]) -> Iterator[Pieces | None]:
    """Task runs where the cluster's machines reach Prefect's API, else nothing. `alone`: the cluster is this machine."""
    api = get_current_settings().api.url or ""
    if not alone and _is_loopback(urlsplit(api).hostname or ""):
        on_log(
            f"pieces have no task runs of their own: the cluster's machines do not reach Prefect's API at {api or 'no address'}; "
            "name a server that they reach (PREFECT_API_URL) to see them"
        )
        yield None
        return
    from prefect_ray import RayTaskRunner

    with RayTaskRunner() as runner:
        yield TaskRuns(runner, options)


def _travelling(named: Any) -> AbstractContextManager[Any]:
    """What a task run takes along of the stage's: whose child it is, not the stage's own parameters (displays, open files)."""
    own = TaskRunContext.get()
    return own.model_copy(update={"task": named, "parameters": {}}) if own else nullcontext()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("", "localhost")
