"""How a script ends: by a user's mistake, want of memory, Ctrl-C or a signal, in one line."""

import builtins
import contextlib
import os
import signal
import sys
import textwrap

from config import UserError

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # what asks a script to end
KEPT = "finished classes and shards are kept, the same command (without --restart) goes on from there"
# As Python, torch, CUDA and oneDNN put it.
WANT_OF_MEMORY = ("start new thread", "allocate memory", "out of memory", "could not create a primitive")


def is_guest() -> bool:
    """Whether a notebook or IPython runs this script, and goes on after it."""
    return hasattr(builtins, "__IPYTHON__")


def _interrupt(number, frame):
    """Raise KeyboardInterrupt, once: a second Ctrl-C ends the process at once."""
    for kind in ENDING:
        signal.signal(kind, signal.SIG_DFL if kind == signal.SIGINT else signal.SIG_IGN)
    raise KeyboardInterrupt(number)


def guarded(main, *arguments, told="no file is left half-written") -> None:
    """Run ``main(*arguments)``; a user's mistake, a full disk, want of memory, Ctrl-C or a signal to end
    stops the script with one line. told: what is said of an interruption."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # of a name's character that the encoding lacks
    try:
        for kind in () if is_guest() else ENDING:
            if signal.getsignal(kind) is not signal.SIG_IGN:  # as under nohup
                signal.signal(kind, _interrupt)
        main(*arguments)
    except (UserError, UnicodeEncodeError) as mistake:  # the latter of a name that is no UTF-8
        stop(mistake)
    except OSError as error:  # a full disk, a folder that may not be written
        stop(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in WANT_OF_MEMORY):
            raise
        reason = str(error)[:200] or "Python has none left"
        stop(f"not enough memory ({reason}); smaller batches, images and fewer threads take less")
    except KeyboardInterrupt as asked:
        if is_guest():
            raise
        print(f"interrupted: {told}", file=sys.stderr)
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # it may be in a write
            sys.stdout.flush()
        os._exit(128 + (*asked.args, signal.SIGINT)[0])  # without waiting for threads that compute


def stop(mistake):
    """End with exit status 2 and one line."""
    print(f"error: {textwrap.shorten(str(mistake), 2000, placeholder=' ...')}", file=sys.stderr)
    sys.exit(2)
