"""SIGTERM, SIGINT and SIGHUP ask the run to stop after the update it is in; a second ends it at once.

Only SIGHUP never does: a terminal that goes away sends it more than once, by the kernel and by the shell.
"""

import collections
import contextlib
import functools
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.console.exits import SIGNALLED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# With several processes an answer is that of so many questions before: it is there, and nobody waits for it.
LAG = 2


@contextlib.contextmanager
def ended_at_once() -> Iterator[None]:
    """SIGINT ends the program as SIGTERM does, until `Stop` hears them.

    Python makes an exception of it, which is lost where it is raised in a callback, such as those of JAX.
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
    """Whether the run is asked to stop; a context manager, for the main thread of a program.

    Signals are heard by a thread of its own, through a socket that the interpreter writes them to at once:
    the main thread may be in a long call that no handler can interrupt, such as a compilation.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._asked = threading.Event()
        self._last_chance = False  # whether the next signal ends the program
        self._votes: collections.deque[jax.Array] = collections.deque()

    def asked(self) -> bool:
        """Whether to stop now. Every process asks equally often, and all get the same answer.

        A signal may reach some processes only, or each at another time. So with several of them each question
        is a vote: the devices take the maximum over all processes, in their turn among the updates, and what
        is answered is the outcome of the question `LAG` before.
        """
        if jax.process_count() == 1:
            return self._asked.is_set()
        self._votes.append(_any(self._asked.is_set(), self._mesh))
        return len(self._votes) > LAG and bool(self._votes.popleft())

    def __enter__(self) -> Self:
        self._heard = threading.current_thread() is threading.main_thread()
        if self._heard:
            ear, mouth = self._sockets = socket.socketpair()
            mouth.setblocking(False)
            self._before = {number: signal.signal(number, _leave_it) for number in SIGNALS if _minded(number)}
            self._fd_before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._listen, args=(ear,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._heard:
            signal.set_wakeup_fd(self._fd_before)
            for number, handler in self._before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            self._sockets[1].close()  # the thread reads the end, and closes its own

    def _listen(self, ear: socket.socket) -> None:
        with ear:
            while number := ear.recv(1):
                if number[0] in SIGNALS:
                    self._hear(signal.Signals(number[0]))

    def _hear(self, number: signal.Signals) -> None:
        hanging_up = number == signal.SIGHUP
        if self._last_chance and not hanging_up:
            os._exit(SIGNALLED + number)
        self._last_chance |= not hanging_up
        self._asked.set()
        # Elsewhere: where nobody reads it, that waits, and the next signal must be heard.
        threading.Thread(target=_say_so, args=(number, hanging_up), daemon=True).start()


def _minded(number: signal.Signals) -> bool:
    """Whether a signal is heard: nohup has SIGHUP ignored, and that stays."""
    return number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN


def _say_so(number: signal.Signals, hanging_up: bool) -> None:
    last = "" if hanging_up else "; once more to stop at once"
    print(f"mora: {number.name}: stopping with a checkpoint{last}", file=sys.stderr, flush=True)


def _leave_it(number: int, frame: object) -> None:
    """The thread hears it."""


def _any(mine: bool, mesh: Mesh) -> jax.Array:
    """Whether it is so on any process, as it will be known on all of them."""
    votes = np.full(len(mesh.local_devices), mine)
    place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    return _maximum(mesh)(jax.make_array_from_process_local_data(place, votes, (mesh.size,)))


@functools.cache
def _maximum(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
