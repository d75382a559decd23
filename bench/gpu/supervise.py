"""Every section in a process of its own: one that hangs, crashes or is killed costs only itself.

Each may take the seconds that it is expected to need, more where there is plenty of time; where
there is too little, the last ones are left out. Libraries are imported once, by multiprocessing's
fork server, which never touches the GPU; where a process that it forks cannot use the GPU all the
same, each section starts an interpreter of its own. This module imports no torch: nothing that
happens to a GPU happens here.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.gpu.rows import Kind, Log

if TYPE_CHECKING:
    from bench.gpu.sections import Options, Section

CPU = "cpu"
PRELOADED = "bench.gpu.sections.libraries"
START_SECONDS = 180.0  # to import everything on a cold, busy machine
PROBE_SECONDS = 60.0
LEAST_SECONDS = 3.0  # nothing useful is done in less
GRACE = 5.0  # for a section to end by itself once its time is up


@dataclass(frozen=True)
class Outcome:
    name: str
    ended_well: bool
    seconds: float


class Supervisor:
    """Runs sections one after the other until `deadline` (time.monotonic)."""

    def __init__(self, log: Log, options: Options, deadline: float) -> None:
        self._log = log
        self._options = options
        self._deadline = deadline
        self._context: Any = multiprocessing.get_context("forkserver")
        self._noise = log.path.with_name("log.txt")

    def choose_start(self) -> str:
        """The GPU that sections will have, or "cpu"; decides how they are started."""
        # Else torch would ask the driver whether there is a GPU, after which no fork can use it.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        # Else tokenizers warn of forks, in every process.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        multiprocessing.set_forkserver_preload([PRELOADED])
        with _silenced(self._noise):  # the fork server keeps this stderr
            device = self._probe()
        if device in (None, CPU) and _looks_like_gpu():
            self._context = multiprocessing.get_context("spawn")
            alone = self._probe()
            if alone not in (None, CPU):
                self._log.add(
                    "start", Kind.NOTE, text=f"a fork says {device!r}: each section starts alone"
                )
                return str(alone)
            self._context = multiprocessing.get_context("forkserver")
        return device or CPU

    def _probe(self) -> str | None:
        """The device that a first process can compute on; None if it does not report one."""
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_probe, args=(sender, str(self._noise)))
        try:
            with _limited(START_SECONDS):
                process.start()
        except TimeoutError:
            return None
        sender.close()
        answer = None
        with suppress(EOFError):
            if receiver.poll(PROBE_SECONDS):
                answer = str(receiver.recv())
        _end(process)
        return answer

    def run(self, sections: Sequence[Section]) -> list[Outcome]:
        outcomes = []
        for i, section in enumerate(sections):
            left = self._deadline - time.monotonic()
            allowance = share(left, [other.weight for other in sections[i:]])
            if allowance < LEAST_SECONDS:
                self._log.add(section.name, Kind.NOTE, text=f"left out: {left:.0f} s were left")
                continue
            outcomes.append(self._run_one(section, allowance))
        return outcomes

    def _run_one(self, section: Section, allowance: float) -> Outcome:
        started = time.monotonic()
        arguments = (section.name, self._options, allowance - GRACE / 2, self._log, self._noise)
        process = self._context.Process(target=_section, args=arguments, name=section.name)
        try:
            with _limited(allowance):
                process.start()
            process.join(max(0.0, started + allowance - time.monotonic()))
            problem = _problem(process, allowance)
        except TimeoutError:
            problem = f"did not start within {allowance:.0f} s"
        except SystemExit:
            self._log.add(
                section.name, Kind.FAILURE, {"part": "section"}, text="stopped by SIGTERM"
            )
            raise
        finally:
            _end(process)
        seconds = time.monotonic() - started
        if problem is None:
            self._log.add(section.name, Kind.DONE, figures={"seconds": seconds})
        else:
            self._log.add(section.name, Kind.FAILURE, {"part": "section"}, text=problem)
        return Outcome(section.name, problem is None, seconds)


def share(left: float, weights: Sequence[float]) -> float:
    """Seconds for the first of the sections with these weights, where `left` are left for all."""
    return min(left, weights[0] * max(1.0, left / sum(weights)))


def _looks_like_gpu() -> bool:
    return bool(shutil.which("nvidia-smi")) or any(Path("/dev").glob("nvidia*"))


def _problem(process: Any, allowance: float) -> str | None:
    """The reason why a section has not ended well."""
    if process.exitcode is None:
        return f"ended after its {allowance:.0f} s"
    if process.exitcode < 0:
        return f"killed by {signal.Signals(-process.exitcode).name}"
    return f"ended with {process.exitcode}" if process.exitcode else None


def _end(process: Any) -> None:
    """End the process and all that it has started, which is in its session."""
    if process.pid is None:
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join(GRACE)  # a process that waits for a driver for ever is left behind


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the main thread, for calls that have no time limit of their own."""

    def interrupt(_number: int, _frame: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _silenced(path: Path) -> Iterator[None]:
    """Processes started inside have their stderr in a file."""
    own = os.dup(2)
    _redirect_stderr(path)
    try:
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)


def _redirect_stderr(path: Path) -> None:
    with path.open("ab") as file:
        os.dup2(file.fileno(), 2)


# In the section's process


def _probe(sender: Any, noise: str) -> None:
    _alone(Path(noise), lambda: sender.send(_device()))


def _device() -> str:
    import torch

    if not torch.cuda.is_available():
        return CPU
    torch.ones(2, device="cuda").sum().item()
    return str(torch.cuda.get_device_name())


def _section(name: str, options: Options, seconds: float, log: Log, noise: Path) -> None:
    _alone(noise, lambda: _measure(name, options, seconds, log))


def _alone(noise: Path, call: Callable[[], None]) -> None:
    """Run `call` in a session of its own with stderr in a file, then end the process."""
    with suppress(PermissionError):  # the process leads a session already
        os.setsid()
    _redirect_stderr(noise)
    faulthandler.enable()
    code = 0
    try:
        call()
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # not through the destructors of a CUDA that may be broken


def _measure(name: str, options: Options, seconds: float, log: Log) -> None:
    import torch

    from bench.gpu.bench import Bench, NoTimeLeft, one_line
    from bench.gpu.sections import SECTIONS

    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # with small networks more threads only wait for each other
    bench = Bench(log, name, options, seconds)
    faulthandler.dump_traceback_later(seconds)  # where it hangs, into the log
    try:
        with torch.inference_mode():
            SECTIONS[name].function(bench)
    except NoTimeLeft:
        return
    except Exception as error:
        log.add(name, Kind.FAILURE, {"part": "the rest"}, text=one_line(error))
        raise
