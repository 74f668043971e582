"""Shards in parallel: worker processes that report, stop on demand, and do not outlive the program."""

import functools
import multiprocessing
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.managers import SyncManager
from types import FrameType

from mora_jax.errors import InputError
from train.data.rows.parent import exit_with_parent
from train.data.rows.shard import Advance, Job, write_shard

POLL_SECONDS = 0.2


class Stopped(Exception):
    """The program asked this worker to stop."""


def run(jobs: Sequence[Job], workers: int, report: Callable[[Advance], None]) -> None:
    """Does all jobs, in this process if one worker is enough. The result does not depend on their number.

    Args:
      jobs: what to do.
      workers: processes, at most.
      report: called in this process with what was done since its last call.

    Raises:
      InputError: a job raised it, and the other workers have stopped; or a worker was killed.
    """
    if min(workers, len(jobs)) <= 1:
        for job in jobs:
            write_shard(job, report)
        return
    with _processes(min(workers, len(jobs))) as (pool, messages, stop):
        send = functools.partial(_send, messages, stop)
        try:
            with _interrupts_held():
                futures = [pool.submit(write_shard, job, send) for job in jobs]
            _follow(futures, messages, report)
        except BrokenProcessPool as error:
            raise InputError(
                "a worker process was killed, probably because memory ran out; finished shards are kept: "
                "run the command again with fewer --workers"
            ) from error
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


@contextmanager
def _processes(count: int) -> Iterator[tuple[ProcessPoolExecutor, queue.Queue, threading.Event]]:
    """Yields a pool, a queue for reports, and an event that stops the workers."""
    context = multiprocessing.get_context("spawn")  # a fork would copy JAX's threads in any state
    manager = SyncManager(ctx=context)
    with _interrupts_held():
        manager.start(exit_with_parent)
    try:
        yield ProcessPoolExecutor(count, context, exit_with_parent), manager.Queue(), manager.Event()
    finally:
        manager.shutdown()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Holds Ctrl-C back, also from processes started inside, which would print tracebacks while they load."""
    resource_tracker.ensure_running()  # starting it would release signals
    held: list[tuple[int, FrameType | None]] = []
    # These processes inherit the mask. Another thread of this one may receive the signal in spite of it.
    before = signal.signal(signal.SIGINT, lambda *signalled: held.append(signalled))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
        if held and callable(before):
            before(*held[0])


def _follow(futures: Sequence[Future], messages: queue.Queue, report: Callable[[Advance], None]) -> None:
    """Passes reports on until all futures are done. Raises what the first failed one raised."""
    pending = set(futures)
    while pending:
        done, pending = wait(pending, POLL_SECONDS, FIRST_EXCEPTION)
        while not messages.empty():
            report(messages.get())
        for future in done:
            future.result()


def _send(messages: queue.Queue, stop: threading.Event, advance: Advance) -> None:
    if stop.is_set():
        raise Stopped
    messages.put(advance)
