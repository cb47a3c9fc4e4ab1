"""Files of prompts: what people may write in them. Pure: lines in, prompts out.

JSONL, one prompt a line, in the words of OpenAI's API:

    {"prompt": "Once upon a time"}                     raw text, as the completions API takes it
    {"prompt": [9690, 198, 2683]}                      tokens
    {"messages": [{"role": "system", "content": "..."}], "tools": [...], "chat_template_kwargs": {...},
     "add_generation_prompt": false}                   a chat, through the model's template
    "Once upon a time"   [9690, 198]   [{"role": ...}] the same, without the name
    {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": ...}}   of a batch

Text: every line that is not blank is one prompt. What else would change a key (``cache_salt``, an adapter,
pictures) is refused, since chunks of such requests are not stored or not shared.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from prefixstore.errors import InvalidError

__all__ = ["PROMPTS_MAX", "Prompt", "is_json_lines", "read_prompts"]

PROMPTS_MAX = 1_000_000
"""All prompts are ordered before the first is computed, so all of them are in memory: some GB of text."""

RENDERING = frozenset(
    {"add_generation_prompt", "chat_template_kwargs", "continue_final_message", "tools"}
)
"""Fields of a chat that decide its tokens, passed to the template."""
SAMPLING = frozenset(
    {
        "custom_id",
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "metadata",
        "model",
        "n",
        "presence_penalty",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "temperature",
        "top_logprobs",
        "top_p",
        "user",
    }
)
"""Fields that change no token of a prompt, so that a file of requests may be used as it is."""
ENVELOPE = frozenset({"custom_id", "method", "url"})
"""What a line of OpenAI's batches holds beside its request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt as it was written.

    Attributes:
        line: Where it is in the file, from 1.
        text: Raw text; None for another kind.
        tokens: Token ids; None for another kind.
        messages: A chat; None for another kind.
        rendering: What the chat's template is told besides.
        error: Why it is none of these; None if it is.
    """

    line: int
    text: str | None = None
    tokens: tuple[int, ...] | None = None
    messages: list[dict[str, Any]] | None = None
    rendering: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


def is_json_lines(name: str, first: str) -> bool:
    """Guess a file's form by its name, or else by its first line that is not blank.

    >>> is_json_lines("a.jsonl", ""), is_json_lines("-", '{"prompt": "x"}'), is_json_lines("-", "x")
    (True, True, False)
    """
    if name.endswith((".jsonl", ".ndjson", ".json")):
        return True
    if name.endswith(".txt"):
        return False
    try:
        return isinstance(msgspec.json.decode(first), dict | list | str)
    except msgspec.DecodeError:
        return False


def read_prompts(lines: Iterable[str], *, name: str, chat: bool) -> list[Prompt]:
    """Read a file of prompts.

    Args:
        lines: Its lines.
        name: Its name, which may tell its form.
        chat: Take raw text for a chat of one user's message.

    Returns:
        The prompts in order; one that cannot be read says why in ``error``.

    Raises:
        InvalidError: There is none, or too many.
    """
    prompts = list(_read(lines, name=name, chat=chat))
    if not prompts:
        raise InvalidError(f"{name} holds no prompt")
    return prompts


def _read(lines: Iterable[str], *, name: str, chat: bool) -> Iterator[Prompt]:
    as_json: bool | None = None
    for number, line in enumerate(lines, 1):
        text = line.rstrip("\r\n")
        if not text.strip():
            continue
        if number > PROMPTS_MAX:
            raise InvalidError(f"{name} has more than {PROMPTS_MAX} lines: divide it")
        if as_json is None:
            as_json = is_json_lines(name, text)
        try:
            value = msgspec.json.decode(text) if as_json else text
            yield _prompt(number, _open(value), chat=chat)
        except (InvalidError, msgspec.DecodeError, RecursionError) as error:
            yield Prompt(line=number, error=str(error))


def _open(value: Any) -> Any:
    """Return the request in a line of a batch; any other line as it is."""
    match value:
        case {"body": {"prompt": _} | {"messages": _} as request, **envelope}:
            _refuse(envelope, known=ENVELOPE)
            return request
    return value


def _prompt(line: int, value: Any, *, chat: bool) -> Prompt:
    match value:
        case str() if chat:
            return Prompt(line=line, messages=[{"role": "user", "content": value}])
        case str():
            return Prompt(line=line, text=value)
        case [int(), *_] if all(type(token) is int and token >= 0 for token in value):
            return Prompt(line=line, tokens=tuple(value))
        case [{"role": _}, *_]:
            return _chat(line, value, {})
        case {"prompt": prompt, **rest} if isinstance(prompt, str | list):
            _refuse(rest, known=SAMPLING)
            return _prompt(line, prompt, chat=chat)
        case {"messages": [{"role": _}, *_] as messages, **rest}:
            _refuse(rest, known=SAMPLING | RENDERING)
            rendering = {str(name): item for name, item in rest.items() if name in RENDERING}
            return _chat(line, messages, rendering)
    raise InvalidError(
        'neither a text, nor token ids, nor messages: write {"prompt": "..."} or '
        '{"messages": [{"role": "user", "content": "..."}]}'
    )


def _chat(line: int, messages: list[Any], rendering: Mapping[str, Any]) -> Prompt:
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        parts = content if isinstance(content, list) else []
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in parts):
            raise InvalidError(
                "a message has parts other than text: keys of pictures and sounds depend on more "
                "than tokens and are not worked out"
            )
    return Prompt(line=line, messages=messages, rendering=rendering)


def _refuse(rest: Mapping[object, object], *, known: frozenset[str]) -> None:
    unknown = sorted(str(name) for name in rest if name not in known)
    if unknown:
        raise InvalidError(
            f"unknown field {', '.join(map(repr, unknown))}: what could change a key is not guessed"
            + (
                "; chunks under a cache_salt are for who knows the salt, and are not worked out"
                if "cache_salt" in unknown
                else ""
            )
        )
