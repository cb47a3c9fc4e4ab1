"""``python -m prefixstore.vllm.offline.prompts REQUEST``: the keys of prompts, as one JSON document.

The command line's child for ``ls --prompt``, ``rm --prompts`` and ``pin --prompts``: it has the engine's
tokenizer, template and hash, and no model. Request and answer are ``Asked`` and ``Found`` of
``prefixstore.cli.prompt_keys``.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from prefixstore.errors import InvalidError, PrefixStoreError
from prefixstore.keys import NamespaceId
from prefixstore.tree.root import Root

if TYPE_CHECKING:
    from prefixstore.vllm.offline.keying import Keying

__all__ = ["Answer", "PromptLine", "Request", "answer", "main", "require_vllm", "run_module"]

EXIT_FAILED = 1
EXIT_USAGE = 2


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked.

    Attributes:
        root: The root's path.
        namespace: The namespace to make keys for; None for all.
        prompts: The file's path, or ``-``.
        model: The model whose tokenizer and template read them.
        chat: Take raw text for a user's message.
        chat_template: A file in the place of the model's template.
        arguments: vLLM's own arguments, such as ``--tokenizer``.
    """

    root: str
    namespace: str | None
    prompts: str
    model: str
    chat: bool = False
    chat_template: str | None = None
    arguments: list[str] = []


class PromptLine(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt of the file."""

    line: int
    tokens: int
    error: str | None = None


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """The prompts, and their keys by namespace, in hex digits."""

    prompts: list[PromptLine]
    namespaces: dict[str, list[list[str]]]
    unkeyed: dict[str, str]


def answer(request: Request) -> Answer:
    """Work out the keys of prompts.

    Raises:
        InvalidError: The file, the model or the namespace is wrong.
        UnavailableError: The root cannot be read.
    """
    from prefixstore.vllm.offline.rendering import engine_args, open_prompts, renderer_of_model

    keyings, unkeyed = _keyings(Root.open(request.root), request.namespace)
    prompts = open_prompts(request.prompts, chat=request.chat)
    renderer = renderer_of_model(
        engine_args(request.model, request.arguments), chat_template=request.chat_template
    )
    lines: list[PromptLine] = []
    tokens: list[tuple[int, ...]] = []
    for prompt in prompts:
        try:
            tokens.append(renderer.tokens(prompt))
            lines.append(PromptLine(line=prompt.line, tokens=len(tokens[-1])))
        except InvalidError as error:
            tokens.append(())
            lines.append(PromptLine(line=prompt.line, tokens=0, error=str(error)))
    made: dict[Keying, list[list[str]]] = {}
    namespaces: dict[str, list[list[str]]] = {}
    for namespace, keying in keyings.items():
        try:
            if keying not in made:
                made[keying] = [_digits(keying, each) for each in tokens]
        except InvalidError as error:
            if request.namespace is not None:
                raise
            unkeyed[namespace] = str(error)
        else:
            namespaces[namespace] = made[keying]
    return Answer(prompts=lines, namespaces=namespaces, unkeyed=unkeyed)


def require_vllm() -> None:
    """Insist on an engine.

    Raises:
        InvalidError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InvalidError(
            "vLLM is not installed here, and only it knows how prompts become keys: install the build "
            "for your hardware first"
        )


def run_module(verb: str, work: Callable[[], int], *, log_level: str) -> int:
    """Run a child's work with its errors as one message and an exit code.

    What vLLM and its libraries print goes to stderr: stdout is for the one document.
    """
    document_fd = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(document_fd, "w", encoding="utf-8")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", log_level)
    try:
        require_vllm()
        code = work()
        sys.stdout.flush()
    except PrefixStoreError as error:
        sys.stderr.write(f"prefixstore {verb}: {error}\n")
        return EXIT_USAGE if isinstance(error, InvalidError) else EXIT_FAILED
    return code


def main() -> int:
    """Answer the request on the command line."""
    request = msgspec.json.decode(sys.argv[1], type=Request)
    sys.stdout.write(msgspec.json.encode(answer(request)).decode())
    return 0


def _digits(keying: "Keying", tokens: Sequence[int]) -> list[str]:
    return [key.hex() for chain in keying.keys(tokens) for key in chain]


def _keyings(
    root: Root, namespace: str | None
) -> "tuple[Mapping[NamespaceId, Keying], dict[str, str]]":
    """Return how each namespace makes keys, and which do not tell.

    Raises:
        InvalidError: The one that is asked for does not tell.
    """
    from prefixstore.vllm.offline.keying import Keying

    keyings: dict[NamespaceId, Keying] = {}
    unkeyed: dict[str, str] = {}
    chosen = list(root.namespaces()) if namespace is None else [NamespaceId(namespace)]
    for each in chosen:
        try:
            manifest = root.manifest(each)
            keyings[each] = Keying.of_fields(manifest.fields if manifest is not None else {})
        except InvalidError as error:
            if namespace is not None:
                raise InvalidError(f"namespace {each}: {error}") from error
            unkeyed[each] = str(error)
    return keyings, unkeyed


if __name__ == "__main__":
    sys.exit(run_module("prompts", main, log_level="ERROR"))
