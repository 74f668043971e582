"""SIGTERM, SIGINT and SIGHUP ask the run to stop after its current update; a second signal ends it at once.

SIGHUP never counts as the second signal: a terminal that closes causes it more than once, from the kernel and
from the shell.
"""

import collections
import contextlib
import functools
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.console.exits import SIGNALLED
from train.console.terminal import log

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# With several processes, the answer is that of this many questions before, so that nobody waits for it.
LAG = 2


@contextlib.contextmanager
def ended_at_once() -> Iterator[None]:
    """Makes SIGINT end the program as SIGTERM does, until `Stop` handles it.

    Python raises an exception for SIGINT, which is lost if it is raised in a callback, such as JAX's.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


class Stop:
    """Whether the run is asked to stop. A context manager, for the main thread of a program.

    A separate thread receives the signals, through a socket that the interpreter writes to at once: the main
    thread may be in a long call that no handler can interrupt, such as a compilation.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._asked = threading.Event()
        self._ends_next = False  # whether the next signal ends the program
        self._votes: collections.deque[jax.Array] = collections.deque()

    def asked(self) -> bool:
        """Returns whether to stop now. Every process must ask equally often, and all get the same answer.

        A signal may reach only some processes, each at another time. With several processes, each question is
        a vote: the devices compute the maximum over all processes, queued among the updates. The answer is
        the outcome of the question `LAG` before.
        """
        if jax.process_count() == 1:
            return self._asked.is_set()
        self._votes.append(_any(self._asked.is_set(), self._mesh))
        return len(self._votes) > LAG and bool(self._votes.popleft())

    def __enter__(self) -> Self:
        self._installed = threading.current_thread() is threading.main_thread()
        if self._installed:
            receiver, sender = self._sockets = socket.socketpair()
            sender.setblocking(False)
            # nohup ignores SIGHUP, which must stay ignored.
            handled = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, lambda *_: None) for number in handled}
            self._fd_before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._receive, args=(receiver,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installed:
            signal.set_wakeup_fd(self._fd_before)
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            self._sockets[1].close()  # the thread then reads the end, and closes its own

    def _receive(self, receiver: socket.socket) -> None:
        with receiver:
            while number := receiver.recv(1):
                if number[0] in SIGNALS:
                    self._handle(signal.Signals(number[0]))

    def _handle(self, number: signal.Signals) -> None:
        hangup = number == signal.SIGHUP
        if self._ends_next and not hangup:
            os._exit(SIGNALLED + number)
        self._ends_next |= not hangup
        self._asked.set()
        message = (
            f"{number.name}: stopping with a checkpoint{'' if hangup else '; once more to stop at once'}"
        )
        # In another thread: printing blocks if nobody reads it, and the next signal must be received.
        threading.Thread(target=log, args=(message, True), daemon=True).start()


def _any(mine: bool, mesh: Mesh) -> jax.Array:
    """Returns whether any process says so, as an array on all of them."""
    votes = np.full(len(mesh.local_devices), mine)
    place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return _maximum(mesh)(jax.make_array_from_process_local_data(place, votes, (mesh.size,)))


@functools.cache
def _maximum(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
