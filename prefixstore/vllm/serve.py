"""``prefixstore serve``: check the options while it is cheap, then become ``vllm serve``.

vLLM builds a connector only after it has loaded the model, so a misspelt option would cost minutes to
find out. This module checks first; it imports no part of vLLM itself, and ends by replacing its own
process, so that signals and exit codes are vLLM's.
"""

import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence

import msgspec

from prefixstore.errors import InvalidError
from prefixstore.vllm.options import check_options

__all__ = ["command", "main", "transfer_config"]


def transfer_config(options: Mapping[str, object]) -> str:
    """Return the value of vLLM's ``--kv-transfer-config`` for our options.

    Raises:
        InvalidError: An option is unknown, missing, of the wrong type or out of range.
    """
    check_options(options)
    config = {
        "kv_connector": "PrefixStoreConnector",
        "kv_connector_module_path": "prefixstore.vllm.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": dict(options),
    }
    return msgspec.json.encode(config).decode()


def command(model: str, config: str, arguments: Sequence[str]) -> list[str]:
    """Return the command line that serves ``model``.

    vLLM's ``vllm serve`` asks for the version of a distribution called ``vllm``, which the build for CPUs
    is not; its API server's own module starts either build.

    Raises:
        InvalidError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InvalidError("vLLM is not installed here: install the build for your hardware first")
    given = ["--kv-transfer-config", config, *arguments]
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        module = "vllm.entrypoints.openai.api_server"
        return [sys.executable, "-m", module, "--model", model, *given]
    return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *given]


def _is_ours(word: str) -> bool:
    """Whether a word sets what we set, in one of the spellings that vLLM takes: it takes the last one."""
    name = re.split("[=.]", word)[0].replace("_", "-")
    return name.startswith("--kv-t") and "--kv-transfer-config".startswith(name)


def main(arguments: Sequence[str]) -> None:
    """Replace this process by an engine: ``MODEL OPTIONS-AS-JSON [vLLM's arguments]``.

    Raises:
        InvalidError: As ``transfer_config`` and ``command``.
    """
    model, options, *rest = arguments
    if any(map(_is_ours, rest)):
        raise InvalidError(
            "--kv-transfer-config is what `prefixstore serve` sets: give its options by --root and "
            "--option, or call vLLM yourself"
        )
    words = command(model, transfer_config(msgspec.json.decode(options)), rest)
    os.execv(words[0], words)  # noqa: S606 - no shell is wanted


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except InvalidError as error:
        sys.exit(f"prefixstore serve: {error}")
