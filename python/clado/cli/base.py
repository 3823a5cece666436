"""The command group, how errors are said, and the option types that commands share. Heavy imports stay inside
the commands, so that ``clado --help`` answers at once."""

from __future__ import annotations

import errno
import io
import math
import os
import re
import shlex
import sys
from typing import Any

import click

from ..common import CladoError, require

# How often a thread of GNU's OpenMP looks for work before it sleeps. Left alone it looks for milliseconds; where another process
# has a core, the threads wait so long for each other at every operator that all takes ten times as long (docs/faq.md).
SPINS = "1000"


class Command(click.Command):
    """What the system refuses (a full disk, a read-only folder) is one line on stderr and exit code 1."""

    def invoke(self, ctx: click.Context) -> Any:
        if ctx.params.get("device") is not None:
            from ..common import USABLE, usable

            device = ctx.params["device"]
            require(usable(device), op_of(ctx), "device", USABLE, repr(device))
        try:
            return super().invoke(ctx)
        except Exception as error:
            from safetensors import SafetensorError

            pipe = isinstance(error, OSError) and error.errno == errno.EPIPE  # click ends quietly
            if pipe or not isinstance(error, (OSError, SafetensorError)):
                raise
            given = next((ctx.params[name] for name in ("out", "output_dir", "run") if ctx.params.get(name)), "file")
            path, reason = getattr(error, "filename", None) or given, getattr(error, "strerror", None) or error
            path = re.sub(r"/\.([^/]+)\.[0-9a-f]{8}", r"/\1", str(path))  # files.py writes under such names first
            click.echo(f"error: {path}: {reason}", err=True)
            ctx.exit(1)


class Group(click.Group):
    """Bad input is one line on stderr and exit code 2; Ctrl-C ends cleanly."""

    command_class = Command

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # a terminal without Greek letters shows a question mark
        try:
            return super().invoke(ctx)
        except CladoError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("stopped; finished chunks are kept, run the same command again to go on", err=True)
            ctx.exit(130)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="clado")
def main() -> None:
    """Mixed-precision quantization of vision models, with layer interactions and a certificate.

    \b
    The stages share a run directory and can be repeated alone:
      clado profile  --model vit_tiny_patch16_224 --checkpoint w.safetensors --data images --output-dir run
      clado solve    run --avg-bits 3
      clado export   run --format safetensors
      clado evaluate run --data images
      clado pareto   run --avg-bits 2.2:8:0.2
      clado inspect  run
      clado report   run
    Start with `clado quickstart`: everything on an embedded, trained net in about a minute. `clado doctor` says what works here.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is loaded, which no command has done yet


def positive(ctx: click.Context, parameter: click.Parameter, value: float | None) -> float | None:
    known = value is None or 0 < value < math.inf
    require(known, op_of(ctx), parameter.opts[0].removeprefix("--"), "be a positive number", value)
    return value


def named_folder(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    require(value != "", op_of(ctx), parameter.opts[0].removeprefix("--"), "name a folder", repr(value))
    return value


def op_of(ctx: click.Context) -> str:
    return ctx.info_name or "clado"


SEED = click.IntRange(0, 2**31 - 1)  # what every generator takes, SCIP's too
COUNT = click.IntRange(min=1)
new_run = click.option(
    "--output-dir",
    required=True,
    callback=named_folder,
    help="Run directory to write; it must not hold another matrix.",
)


def command_line() -> str:
    """This call, as it can be repeated."""
    return shlex.join(["clado", *sys.argv[1:]])
