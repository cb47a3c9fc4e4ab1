"""From prompts as people write them to tokens, by vLLM's own renderers: template, tokenizer, limits.

The same code renders requests in a server, so the tokens are those of a server, as long as both have the
same tokenizer and template. The model's weights are neither needed nor read.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.renderers import ChatParams
from vllm.renderers.registry import renderer_from_config
from vllm.utils.argparse_utils import FlexibleArgumentParser

from prefixstore.errors import InvalidError
from prefixstore.vllm.offline.promptfile import Prompt, read_prompts

if TYPE_CHECKING:
    from vllm.renderers import BaseRenderer

__all__ = ["Renderer", "engine_args", "open_prompts", "renderer_of_model"]


def engine_args(model: str, arguments: Sequence[str]) -> EngineArgs:
    """Read vLLM's own arguments, as its command line does; what is wrong with them ends the process."""
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="prefixstore ... --"))
    return EngineArgs.from_cli_args(parser.parse_args(["--model", model, *arguments]))


def open_prompts(name: str, *, chat: bool) -> list[Prompt]:
    """Read a file of prompts; ``-`` is the standard input.

    Raises:
        InvalidError: It cannot be read, or holds no prompt.
    """
    try:
        with contextlib.ExitStack() as stack:
            file: Any = sys.stdin
            if name != "-":
                file = stack.enter_context(Path(name).open(encoding="utf-8"))
            return read_prompts(file, name=name, chat=chat)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidError(f"cannot read the prompts in {name}: {error}") from error


def renderer_of_model(args: EngineArgs, *, chat_template: str | None) -> "Renderer":
    """Return a renderer for a model that is not loaded."""
    config = VllmConfig(model_config=args.create_model_config())
    return Renderer(renderer_from_config(config), chat_template=chat_template)


class Renderer:
    """Turns prompts into tokens. Not thread-safe."""

    def __init__(self, renderer: "BaseRenderer[Any]", *, chat_template: str | None) -> None:
        self._renderer = renderer
        self._template: str | None = None
        if chat_template is not None:
            try:
                self._template = Path(chat_template).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InvalidError(f"cannot read the template {chat_template}: {error}") from error

    def tokens(self, prompt: Prompt) -> tuple[int, ...]:
        """Return a prompt's tokens.

        Raises:
            InvalidError: It cannot be rendered, or is longer than the model's context.
        """
        if prompt.error is not None:
            raise InvalidError(prompt.error)
        try:
            if prompt.messages is not None:
                return self._chat(prompt.messages, dict(prompt.rendering))
            given: Any = (
                {"prompt": prompt.text}
                if prompt.tokens is None
                else {"prompt_token_ids": list(prompt.tokens)}
            )
            (rendered,) = self._renderer.render_cmpl([given])
            return tuple(rendered["prompt_token_ids"])
        except Exception as error:
            # Templates raise what they like; one bad prompt must not end the others.
            raise InvalidError(f"cannot be rendered: {error}") from error

    def _chat(self, messages: list[dict[str, Any]], rendering: dict[str, Any]) -> tuple[int, ...]:
        """Render a chat as vLLM's ``LLM.chat`` and its server do (vllm/entrypoints/common/offline.py)."""
        from vllm.utils.mistral import is_mistral_tokenizer

        given = rendering.pop("chat_template_kwargs", None) or {}
        params = ChatParams(
            chat_template=self._template,
            chat_template_kwargs={
                **given,
                "add_generation_prompt": rendering.get("add_generation_prompt", True),
                "continue_final_message": rendering.get("continue_final_message", False),
                "tools": rendering.get("tools"),
                "tokenize": is_mistral_tokenizer(self._renderer.tokenizer),
            },
        )
        limits = self._renderer.default_chat_tok_params.with_kwargs(add_special_tokens=False)
        _, (rendered,) = self._renderer.render_chat([messages], params, limits)
        return tuple(rendered["prompt_token_ids"])
