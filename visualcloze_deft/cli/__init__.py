"""The command line. Heavy imports stand inside the commands: help and listings need no torch."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import click

from visualcloze_deft.cli import (  # noqa: F401  which register their commands
    adapters,
    compare,
    compile,
    data,
    evaluate,
    infer,
    publish,
    tasks,
    train,
)
from visualcloze_deft.cli.app import cli
from visualcloze_deft.errors import REFUSED, Logged, UserError, refusal
from visualcloze_deft.runtime.open_files import raise_limit
from visualcloze_deft.runtime.signals import end_with_launcher

SAYING = ("click.utils", "tqdm.std", "tqdm.utils")  # modules that write to standard output


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A user's mistake, and what the system or a parser of files refuses, is
    one line and exit code 2; a mistake of ours stays a traceback."""
    logging.setLogRecordFactory(Logged)
    # recommends another package on every start, whether anything is quantised or not
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    end_with_launcher()
    raise_limit()
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        cli.main(args=words, obj=words, standalone_mode=False)
    except UserError as error:
        refuse(str(error))
    except REFUSED as error:
        where = "standard output: " if on_output(error) else ""
        refuse(where + refusal(error))
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "", err=True)
        raise SystemExit(2) from None
    except click.ClickException as error:
        refuse(error.format_message())
    except click.Abort:
        raise SystemExit(130) from None


def refuse(message: str) -> NoReturn:
    """Say in one line what was wrong, and end with exit code 2."""
    if os.environ.get("RANK", "") not in ("", "0"):
        time.sleep(3)  # all processes find the same mistake: the first says it and ends them
    with suppress(OSError):  # nobody reads it, or the device is full
        click.echo(f"vcdeft: {UserError(message)}", err=True)
    raise SystemExit(2) from None


def on_output(error: BaseException) -> bool:
    """Whether standard output did not take what was said: its device is full. A closed pipe ends a
    command without a word, with exit code 1: that is click's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals["__name__"] in SAYING
