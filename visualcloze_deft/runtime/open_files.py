"""How many files a process may have open, and how many the processes of a command need: where there
are too few, reading processes stop in the middle of a batch and nobody is told."""

from __future__ import annotations

import sys

from visualcloze_deft.errors import UserError

OWN = 256  # of a process: libraries, models, pictures, other processes of its group, GPUs
PIPES = 4  # to each process that it starts
ENOUGH = 1 << 16  # of which no command needs more

if sys.platform != "win32":
    import resource


def raise_limit() -> None:
    """Have this process, and those that it starts, open as many files as the system lets it."""
    if sys.platform == "win32":  # where no such limit can be set
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_handles(*, readers: int = 0, lower: str = "") -> None:
    """Raise `UserError` where a process may open fewer files than it needs with so many reading
    processes. lower: what makes it need fewer, in the words of its settings."""
    check_allowed(OWN + PIPES * readers, lower=lower if readers else "")


def check_allowed(needed: int, *, lower: str) -> None:
    if sys.platform == "win32":
        return
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed != resource.RLIM_INFINITY and allowed < needed:
        raise UserError(
            f"a process may open {allowed} files here, and {needed} may be needed; start in a "
            f"shell that allows 'ulimit -n {needed}'{lower and f', or lower {lower}'}"
        )
