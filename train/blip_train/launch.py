"""Starts the ranks of a run. Under torchrun or DeepSpeed's launcher it starts
nothing: this process is a rank."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip_train.engine.agreement import STOPPED
from blip_train.engine.environment import rank_environment
from blip_train.prepare import EXPORT, check_directory, check_sources
from blip_train.recipe import Recipe

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

SAVING = 600  # seconds that ranks may take to save after they were asked to stop
ENDING = 20.0  # seconds that a failed rank may take to end
# Environment variable: the process that started this rank, and checked the recipe.
LAUNCHER = "BLIP_FAST_LAUNCHER"
# What gloo and NCCL say on a rank that did not fail itself.
LOST = re.compile(r"connection (closed|reset) by (remote )?peer|remote process exited", re.IGNORECASE)


def carry_out(recipe: Recipe, resume: bool = False, profile: int = 0) -> Path:
    """Run a recipe from start to end, on as many processes as it says, and trace `profile` of its steps.

    Data and directory are checked once, before anything starts: by the process that starts the ranks, or by
    each rank if another launcher started it.

    Returns:
        The directory of the exported model.

    Raises:
        ValueError: the data is not there, or the run's directory holds a run and `resume` is not set.
        ChildProcessError: a rank failed; says which and why. The rank's own
            error is above it on the terminal.
    """
    if os.environ.get(LAUNCHER) != str(os.getppid()):
        check_sources(recipe)
        check_directory(recipe, resume)
    if recipe.runtime.ranks > 1 and "RANK" not in os.environ:
        _launch(recipe, resume, profile)
        return recipe.directory / EXPORT
    if os.environ.get("WORLD_SIZE", "1") != "1":
        return _rank(recipe, resume, profile)
    from blip_train.run import train  # not above: the process that only launches ranks needs none of it

    return train(recipe, resume, profile)


def _rank(recipe: Recipe, resume: bool, profile: int) -> Path:
    """This process's part of a run of several ranks.

    Its error is recorded for the launcher. After an error the process has `ENDING` seconds to exit, because
    leaving a process group can wait for ranks that are gone.

    Raises:
        ConnectionError: another rank is gone, whatever its error was.
    """
    import faulthandler

    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from blip_train.run import train

    errors = get_error_handler()
    errors.initialize()
    try:
        return train(recipe, resume, profile)
    except Exception as error:
        faulthandler.dump_traceback_later(ENDING, exit=True)
        lost = isinstance(error, RuntimeError) and LOST.search(str(error))
        if not lost:
            errors.record_exception(error)
            raise
        ended = ConnectionError(f"rank {os.environ['RANK']} lost its connection to another rank")
        errors.record_exception(ended)
        raise ended from None


def _launch(recipe: Recipe, resume: bool, profile: int) -> None:
    """Start `runtime.ranks` processes on this machine and wait for them, like `torchrun --standalone`."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    recipe.directory.mkdir(parents=True, exist_ok=True)
    saved = recipe.directory / "recipe.yaml"
    saved.write_text(recipe.to_yaml())
    ranks = recipe.runtime.ranks
    threads = max((os.cpu_count() or 1) // ranks, 1)  # ranks of one machine share its cores
    os.environ.update({"OMP_NUM_THREADS": str(threads), LAUNCHER: str(os.getpid())} | rank_environment())
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it prints failures as a table
    config = LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=ranks, run_id=recipe.name,
                          rdzv_backend="c10d",
                          rdzv_endpoint="localhost:0", max_restarts=0, logs_specs=DefaultLogsSpecs(),
                          **_time_to_save())
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP,
                                                              signal.SIGQUIT)}
    try:
        elastic_launch(config, sys.executable)("-m", "blip_fast", "train", "--config", str(saved),
                                               *(["--resume"] if resume else []),
                                               *(["--profile", str(profile)] if profile else []))
    except SignalException as error:  # passed on to the ranks, which have saved (engine/agreement.py)
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        sys.exit(STOPPED)
    except ChildFailedError as error:
        raise ChildProcessError(f"the run {recipe.name} ended: {_cause(error)}; go on with --resume") from None
    finally:
        del os.environ[LAUNCHER]
        for number, handler in before.items():
            signal.signal(number, handler)


def _time_to_save() -> dict[str, Any]:
    """LaunchConfig's option that gives ranks `SAVING` seconds. PyTorch 2.11 has none: its launcher waits 30
    seconds after passing a signal on, so its `PContext.close` is replaced."""
    from torch.distributed.elastic.multiprocessing.api import PContext
    from torch.distributed.launcher.api import LaunchConfig

    if "shutdown_timeout" in LaunchConfig.__dataclass_fields__:
        return {"shutdown_timeout": SAVING}
    close = PContext.close

    def patient(self: PContext, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        close(self, death_sig, SAVING if death_sig else timeout)

    PContext.close = patient
    return {}


def _cause(error: ChildFailedError) -> str:
    """The first failure. Ranks that were ended before they failed, or only lost
    their connection, do not count."""
    # In the order in which the ranks ended.
    reasons = {rank: _failure_reason(failure) for rank, failure in error.failures.items()}
    ended = f"was killed by {signal.SIGTERM.name}"
    first = next((rank for rank, reason in reasons.items() if reason != ended
                  and "ConnectionError" not in reason),
                 next(iter(reasons)))
    return f"rank {first} {reasons[first]}"


def _failure_reason(failure: ProcessFailure) -> str:
    recorded = failure.error_file_data["message"]
    if isinstance(recorded, dict):
        return f"failed with {recorded['message']}"
    if failure.exitcode < 0:
        memory = ", as the kernel does when memory runs out" if failure.exitcode == -signal.SIGKILL else ""
        return f"was killed by {failure.signal_name()}{memory}"
    return f"ended with exit status {failure.exitcode}"
