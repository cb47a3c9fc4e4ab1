"""``prefixstore prefill``: compute and store the chunks of many prompts, before anybody asks.

The engine's side is a module of ``prefixstore.vllm`` that this verb becomes.
"""

import json
import os
import sys

import click

from prefixstore.cli.options import AGE, JSON, MOMENT, ROOT_OPTION
from prefixstore.cli.serve import parse_option
from prefixstore.errors import InvalidError

__all__ = ["command"]

MODULE = "prefixstore.vllm.offline.prefill"


@click.command(
    "prefill",
    context_settings={"ignore_unknown_options": True},
    epilog="Example: prefixstore prefill my-model --root /mnt/kv --prompts p.jsonl --pin support-bot "
    "-- --max-model-len 8192",
)
@click.argument("model")
@ROOT_OPTION
@click.option(
    "--prompts",
    required=True,
    metavar="FILE",
    help="JSONL or text, `-` for stdin; docs/offline.md has the forms.",
)
@click.option("--chat", is_flag=True, help="Take each plain text for a user's message in a chat.")
@click.option("--chat-template", metavar="FILE", help="In the place of the model's own.")
@click.option("--pin", metavar="NAME", help="Keep the prompts' chunks from eviction, by this name.")
@click.option("--until", type=MOMENT, metavar="DATE", help="The pin ends by itself then.")
@click.option("--for", "for_s", type=AGE, metavar="AGE", help="The pin ends after so long (30d).")
@click.option(
    "--option",
    "options",
    multiple=True,
    metavar="NAME=VALUE",
    help="An option of kv_connector_extra_config; the value is JSON, or else a word. Repeatable.",
)
@JSON
@click.argument("vllm_arguments", nargs=-1, type=click.UNPROCESSED)
def command(
    model: str,
    *,
    root: str,
    prompts: str,
    chat: bool,
    chat_template: str | None,
    pin: str | None,
    until: int | None,
    for_s: float | None,
    options: tuple[str, ...],
    as_json: bool,
    vllm_arguments: tuple[str, ...],
) -> None:
    """Compute the prompts of FILE with MODEL and leave their chunks in a root, for servers to load.

    What is stored is skipped: run it again after a kill, or on several hosts at once. Exits with 0 if all
    whole chunks of all prompts are stored. What follows `--` goes to vLLM: give what the server gets, since
    context length, dtype and the like decide whether it finds these chunks.
    """
    if (until is not None or for_s is not None) and pin is None:
        raise InvalidError("--until and --for are the end of a pin: name it by --pin")
    if until is not None and for_s is not None:
        raise InvalidError("give --until or --for, not both")
    request = {
        "root": root,
        "model": model,
        "prompts": prompts,
        "options": dict(parse_option(option) for option in options),
        "chat": chat,
        "chat_template": chat_template,
        "pin": pin,
        "pin_for_s": for_s,
        "pin_until_s": until,
        "as_json": as_json,
        "arguments": list(vllm_arguments),
    }
    sys.stdout.flush()
    sys.stderr.flush()
    words = [sys.executable, "-m", MODULE, json.dumps(request)]
    os.execv(words[0], words)  # noqa: S606 - no shell is wanted
