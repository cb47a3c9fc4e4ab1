"""``prefixstore serve``: run vLLM's API server with a root, options checked before the model loads.

The engine's side is a module of ``prefixstore.vllm`` that this verb becomes: the command line itself
never imports what belongs to the engine.
"""

import os
import sys

import click
import msgspec

from prefixstore.cli.options import ROOT_OPTION
from prefixstore.errors import InvalidError

__all__ = ["command", "parse_option"]


@click.command(
    "serve",
    context_settings={"ignore_unknown_options": True},
    epilog="Example: prefixstore serve my-model --root /mnt/kv --option max_bytes=1000000000000 "
    "-- --port 8000 --max-model-len 8192",
)
@click.argument("model")
@ROOT_OPTION
@click.option(
    "--mode",
    type=click.Choice(["tier", "direct"]),
    default="tier",
    show_default=True,
    help="Below vLLM's CPU tier, or between the device and the root without one.",
)
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="An option of kv_connector_extra_config; the value is JSON, or else a word. Repeatable.",
)
@click.argument("vllm_arguments", nargs=-1, type=click.UNPROCESSED)
def command(
    model: str,
    root: str,
    mode: str,
    options: tuple[str, ...],
    vllm_arguments: tuple[str, ...],
) -> None:
    """Serve MODEL with vLLM on a root. What follows `--` goes to `vllm serve` as it is."""
    chosen = {"root": root, "mode": mode, **dict(parse_option(option) for option in options)}
    document = msgspec.json.encode(chosen).decode()
    sys.stdout.flush()
    sys.stderr.flush()
    words = [sys.executable, "-m", "prefixstore.vllm.serve", model, document, *vllm_arguments]
    os.execv(words[0], words)  # noqa: S606 - no shell is wanted


def parse_option(option: str) -> tuple[str, object]:
    """Read one ``NAME=VALUE``.

    >>> parse_option("max_bytes=10"), parse_option("codec=raw")
    (('max_bytes', 10), ('codec', 'raw'))
    """
    name, separator, text = option.partition("=")
    if not separator or not name:
        raise InvalidError(f"--option {option!r}: write NAME=VALUE")
    try:
        return name, msgspec.json.decode(text)
    except msgspec.DecodeError:
        return name, text
