"""Worker processes of this machine that answer one question after the other, and never wait for who asked."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

_AHEAD = 8  # questions a worker that are asked and whose answers are not yet used
_LARGEST_BLOCK = 32 * 2**20 - 2**16  # bytes; glibc learns from no larger one (DEFAULT_MMAP_THRESHOLD_MAX)

Q = TypeVar("Q")
A = TypeVar("A")


class WorkerDiedError(ValueError):
    """A worker process was killed."""


def in_order(answer: Callable[[Q], A], questions: Iterable[Q], workers: int) -> Generator[tuple[Q, A], None, None]:
    """Each question with its answer, in the order of the questions; `answer` runs in so many processes.

    What it raises is raised here, with the traceback of the process as a note. WorkerDiedError if a process is killed. All of
    them end with the generator, and with the process that made it, also if that is killed; Ctrl-C reaches that one alone.

    `ProcessPoolExecutor` costs some 3 ms a question where an answer is larger than a pipe holds and all cores are busy: its
    worker stands still until several threads here, one after the other, have had their turn.
    """
    # Spawn, do not fork: a child of a process with threads (torch, fsspec) may inherit a lock that nobody releases.
    context = multiprocessing.get_context("spawn")
    crew: list[_Worker[Q, A]] = []
    window: deque[tuple[Q, _Worker[Q, A]]] = deque()
    left = iter(questions)
    try:
        crew += (_Worker(context, answer) for _ in range(workers))
        while True:
            for question in islice(left, workers * _AHEAD - len(window)):
                worker = min(crew, key=lambda one: one.owes)
                worker.ask(question)
                window.append((question, worker))
            if not window:
                return
            first, worker = window.popleft()
            while not worker.answers:
                ready = wait([one.connection for one in crew])
                for one in crew:
                    if one.connection in ready:
                        one.hear()
            yield first, worker.answer()
    finally:
        for worker in crew:
            worker.end()


class _Worker(Generic[Q, A]):
    """A process that answers what it is asked, in order."""

    def __init__(self, context: SpawnContext, answer: Callable[[Q], A]) -> None:
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, answer), daemon=True)
        # Ctrl-C is for the process that asks, which ends this one: it gets no signal of its own, not even while it starts.
        resource_tracker.ensure_running()  # which would else let the signal through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()  # else its end would not be noticed here
        self.owes = 0
        self.answers: deque[A | Exception] = deque()

    def ask(self, question: Q) -> None:
        """WorkerDiedError if the process died."""
        try:
            self.connection.send(question)
        except ConnectionError as error:
            raise _died() from error
        self.owes += 1

    def hear(self) -> None:
        """Receive an answer. WorkerDiedError if the process died."""
        try:
            self.answers.append(self.connection.recv())
        except (EOFError, ConnectionError) as error:
            raise _died() from error
        self.owes -= 1

    def answer(self) -> A:
        """The oldest answer that was received; what the process raised is raised here."""
        answer = self.answers.popleft()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self) -> None:
        """At once: it has nothing that another process waits for."""
        self._process.terminate()
        self._process.join()
        self.connection.close()


def _died() -> WorkerDiedError:
    return WorkerDiedError("a worker process died, most likely for lack of memory: use fewer workers")


def _work(connection: Connection, answer: Callable[[Any], Any]) -> None:
    """The life of a `_Worker`'s process."""
    _end_with_parent()
    # glibc gives the end of the heap back to the system once twice the largest block that it has seen freed is free, and gets it
    # again for the next image: 800 page faults for one of a megapixel. After this block it keeps up to 64 MiB.
    block = bytes(_LARGEST_BLOCK)  # whose pages nobody touches
    del block
    # A thread sends: an answer may be larger than what a pipe holds, and the next one need not wait until it is read.
    answers: SimpleQueue[Any] = SimpleQueue()

    def send() -> None:
        while True:
            connection.send(answers.get())

    threading.Thread(target=send, daemon=True).start()
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        try:
            answers.put(answer(question))
        except Exception as error:
            answers.put(_sendable(error))


def _sendable(error: Exception) -> Exception:
    """An error with its traceback as a note, or one that tells of it if pickle cannot make it again."""
    error.add_note(traceback.format_exc())
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - it was made here
    except Exception:
        told = RuntimeError(repr(error))
        told.__notes__ = error.__notes__
        return told
    return error


def _end_with_parent() -> None:
    """End when the process that asks was killed, also in the middle of an answer."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
