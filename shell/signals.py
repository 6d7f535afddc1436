"""How a script ends: by a user's mistake, want of memory, Ctrl-C or a signal, in one line and in time."""

import contextlib
import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
import time
from types import FrameType

from config import UserError

LATEST = 1.5  # seconds from a signal to the end
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # what asks a script to end
KEPT = (
    "finished classes and finished shards are kept, the same command (without --restart) goes on from there"
)


LEAST_ADDRESS_SPACE = 4 << 30  # bytes: with less (ulimit -v) the libraries of torch or scipy fail or hang
WANT_OF_MEMORY = (  # as Python, torch, CUDA and oneDNN put it, the last without a reason
    "can't start new thread", "can't allocate memory", "out of memory", "could not create a primitive",
)  # fmt: skip


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or a signal that asks a script to end. told: what is kept, and how to go on, where that is
    known."""

    def __init__(self, number=signal.SIGINT, told=""):
        super().__init__(told)
        self.number, self.told = number, told


def is_guest() -> bool:
    """Whether another program runs this script and goes on after it: a notebook (%run), a debugger. The
    first frame is that program's; runpy's, before it, are of ``python -m``."""
    frame: FrameType | None = sys._getframe()
    modules = []
    while frame:
        modules.append(frame.f_globals)
        frame = frame.f_back
    first = next(module for module in reversed(modules) if module["__name__"] != "runpy")
    return first is not vars(sys.modules["__main__"])


def catch_signals() -> None:
    """From now on SIGINT, SIGTERM and SIGHUP raise Interrupted in the main thread, the first time."""

    def interrupt(number, frame):
        for kind in ENDING:
            signal.signal(kind, signal.SIG_IGN if kind != signal.SIGINT else signal.SIG_DFL)
        raise Interrupted(number)

    _handle(interrupt)


def before_imports() -> None:
    """For the time of the slow imports, which an exception would leave half done, with a traceback: until
    ``catch_signals``, SIGINT, SIGTERM and SIGHUP end the process with one line. So does a limit of memory
    (ulimit -v) under which they fail."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if 0 <= limit < LEAST_ADDRESS_SPACE:
        stop(
            f"not enough memory: ulimit -v allows {limit / 1e9:.2g} GB of address space, expected at least "
            f"{LEAST_ADDRESS_SPACE / 1e9:.2g} GB, which torch takes"
        )

    def end(number, frame):
        print("interrupted: nothing was begun", file=sys.stderr)
        end_now(128 + number)

    _handle(end)


def _handle(handler) -> None:
    for kind in () if is_guest() else ENDING:
        if signal.getsignal(kind) is not signal.SIG_IGN:  # as under nohup
            signal.signal(kind, handler)


def show_any_name() -> None:
    """Let standard output, where its encoding lacks a character of a name, have the character's number, as
    standard error does by itself."""
    if getattr(sys.stdout, "errors", None) == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def guarded(main, *arguments, told="no file is left half-written") -> None:
    """Run ``main(*arguments)``; a user's mistake, a full disk, Ctrl-C or a signal to end stops the script
    with one line. told: what is said of an interruption that does not say it itself. A guest's signals are
    left to the program that runs it, which gets KeyboardInterrupt."""
    show_any_name()
    try:
        if is_guest():
            main(*arguments)
            return
        catch_signals()
        with ended_in_time(told):
            main(*arguments)
    except UserError as mistake:
        stop(mistake)
    except OSError as error:  # a full disk, a folder that may not be written
        stop(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in WANT_OF_MEMORY):
            raise
        told = " ".join(str(error).split())[:200] or "Python has none left"
        stop(f"not enough memory ({told}); smaller batches, images and fewer threads take less")
    except UnicodeEncodeError as error:  # the name of a file, on its way to the screen
        stop(f"a name is not valid UTF-8: {error.object[:200]!r}; rename it")
    except Interrupted as interrupted:
        print(f"interrupted: {interrupted.told or told}", file=sys.stderr)
        end_now(128 + interrupted.number)


@contextlib.contextmanager
def ended_in_time(told):
    """In the block, a signal to end does so after LATEST seconds even where the main thread is in one long
    call, a decomposition say, and cannot answer."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)  # told by the system's own handler

    def wait():
        number = next((n for n in iter(lambda: next(iter(reader.recv(1)), 0), 0) if n in ENDING), 0)
        reader.close()
        if number:
            time.sleep(LATEST)
            print(f"interrupted: {told}", file=sys.stderr)
            end_now(128 + number)

    threading.Thread(target=wait, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        writer.close()


os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are not the parent's


def end_now(status) -> None:
    """End the process without waiting for threads that compute, and its workers with it."""
    for child in multiprocessing.active_children():
        child.kill()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # it may be in a write
            stream.flush()
    os._exit(status)


def stop(mistake):
    line = " ".join(str(mistake).split())
    print(f"error: {line if len(line) < 2000 else f'{line[:2000]}...'}", file=sys.stderr)
    sys.exit(2)
