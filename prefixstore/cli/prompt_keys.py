"""Prompts as arguments of verbs: which chunks they are made of, told by the engine's own code.

Only the engine knows how a text becomes tokens and tokens become keys, so a child process of
``prefixstore.vllm.offline.prompts`` works that out: the command line itself imports nothing of vLLM.
The child reads the prompts, from the standard input too, and answers with one JSON document.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from prefixstore.errors import InvalidError

if TYPE_CHECKING:
    from prefixstore.keys import Key, NamespaceId
    from prefixstore.store import PrefixStore

__all__ = ["Asked", "Found", "FoundPrompt", "prompt_options"]

MODULE = "prefixstore.vllm.offline.prompts"
ERRORS_SHOWN = 5

F = TypeVar("F", bound=Callable[..., Any])


class FoundPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """One prompt of the file.

    Attributes:
        line: Where it begins in the file, from 1.
        tokens: Its length; 0 if it could not be read.
        error: Why it has no keys; None if it has.
    """

    line: int
    tokens: int
    error: str | None = None


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """The child's answer.

    Attributes:
        prompts: The prompts in the file's order.
        namespaces: For each namespace, and in it for each prompt, its chunks' keys in hex digits, front
            to back in each KV group.
        unkeyed: Namespaces whose manifest does not tell how keys are made, each with the reason.
    """

    prompts: list[FoundPrompt]
    namespaces: dict[str, list[list[str]]]
    unkeyed: dict[str, str] = {}

    def refuse_errors(self) -> None:
        """Insist that every prompt has its keys.

        Raises:
            InvalidError: One has none; the message names the first few.
        """
        bad = [f"line {each.line}: {each.error}" for each in self.prompts if each.error]
        if bad:
            more = f"; and {len(bad) - ERRORS_SHOWN} more" if len(bad) > ERRORS_SHOWN else ""
            raise InvalidError(f"the prompts' file: {'; '.join(bad[:ERRORS_SHOWN])}{more}")

    def chains(self, namespace: str) -> "list[list[Key]]":
        """Return for each prompt its keys in one namespace."""
        from prefixstore.keys import key_from_hex

        return [[key_from_hex(text) for text in keys] for keys in self.namespaces[namespace]]

    def keys(self, namespace: str) -> "list[Key]":
        """Return the keys of all prompts in one namespace, each once.

        Raises:
            InvalidError: There is none: the prompts are shorter than a chunk.
        """
        keys = list(dict.fromkeys(key for chain in self.chains(namespace) for key in chain))
        if not keys:
            raise InvalidError(
                "the prompts are shorter than one chunk, and only whole chunks are stored"
            )
        return keys

    def only_namespace(self, store: "PrefixStore") -> "NamespaceId":
        """Return the one namespace that holds some of the prompts' chunks.

        Raises:
            InvalidError: None does, or several do.
        """
        from prefixstore.keys import NamespaceId
        from prefixstore.ops.pins import find_keys

        holding = []
        for name in self.namespaces:
            namespace = NamespaceId(name)
            keys = self.keys(name)
            if any(record is not None for record in store.hints.get_many(namespace, keys)):
                holding.append(namespace)
        if len(holding) == 1:
            return holding[0]
        every = [key for name in self.namespaces for key in self.keys(name)]
        return find_keys(store, every, among=holding)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the command line says of prompts."""

    prompts: str
    model: str
    chat: bool
    chat_template: str | None
    arguments: tuple[str, ...]

    def find(self, root: str, *, namespace: str | None) -> Found:
        """Ask the engine's code for the keys.

        Args:
            root: The root, whose manifests say how keys are made.
            namespace: The one to work out keys for; None for all.

        Raises:
            click.ClickException: The child failed; it has said why on stderr.
        """
        request = {
            "root": root,
            "namespace": namespace,
            "prompts": self.prompts,
            "model": self.model,
            "chat": self.chat,
            "chat_template": self.chat_template,
            "arguments": list(self.arguments),
        }
        words = [sys.executable, "-m", MODULE, json.dumps(request)]
        done = subprocess.run(words, stdout=subprocess.PIPE, check=False)  # noqa: S603 - no shell
        if done.returncode:
            raise _ChildFailed(done.returncode)
        return msgspec.json.decode(done.stdout, type=Found)


def prompt_options(*, help: str) -> Callable[[F], F]:  # noqa: A002 - click's word
    """Return the decorator that adds the options, and hands ``asked`` to the verb.

    Args:
        help: What the verb does with the prompts.
    """
    options = [
        click.option(
            "--prompts",
            metavar="FILE",
            help=f"{help} JSONL or text, `-` for stdin; docs/offline.md has the forms.",
        ),
        click.option("--model", metavar="MODEL", help="The model whose tokenizer reads them."),
        click.option(
            "--chat", is_flag=True, help="Take each plain text for a user's message in a chat."
        ),
        click.option("--chat-template", metavar="FILE", help="In the place of the model's own."),
        click.argument("vllm_arguments", nargs=-1, type=click.UNPROCESSED),
    ]

    def decorate(verb: F) -> F:
        def asking(
            *given: Any,
            prompts: str | None,
            model: str | None,
            chat: bool,
            chat_template: str | None,
            vllm_arguments: tuple[str, ...],
            **named: Any,
        ) -> Any:
            if (prompts is None) != (model is None):
                raise click.UsageError("--prompts and --model go together.")
            if prompts is None and vllm_arguments:
                raise click.UsageError(f"Got unexpected extra arguments: {vllm_arguments}")
            asked = prompts is not None and Asked(
                prompts=prompts,
                model=str(model),
                chat=chat,
                chat_template=chat_template,
                arguments=vllm_arguments,
            )
            return verb(*given, asked=asked or None, **named)

        asking.__doc__ = verb.__doc__
        decorated: Any = asking
        # Options that decorators below this one have left on the function stay with it.
        decorated.__click_params__ = list(getattr(verb, "__click_params__", ()))
        for option in reversed(options):
            decorated = option(decorated)
        return decorated  # type: ignore[no-any-return]

    return decorate


class _ChildFailed(click.ClickException):
    """The child ended with an error, of which it has told on stderr."""

    def __init__(self, code: int) -> None:
        super().__init__("the prompts' keys could not be worked out; the reason is above")
        # Killed by a signal is a negative code, which no process can exit with.
        self.exit_code = code if code > 0 else 1  # type: ignore[misc]
