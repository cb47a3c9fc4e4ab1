"""``python -m prefixstore.vllm.offline.prefill REQUEST``: leave every prompt's chunks in a root.

Keys are those of a live server: the same renderer makes the tokens, the same engine the namespace and the
chunks. What is there is skipped, so a run that was killed goes on where it was; several processes, on
several hosts, share a list of prompts by claims (``prefixstore.ops.claims``).
"""

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec

from prefixstore.config import StoreConfig
from prefixstore.errors import InvalidError
from prefixstore.keys import Key, NamespaceId
from prefixstore.ops.claims import PATIENCE_S, Claims
from prefixstore.store import PrefixStore
from prefixstore.vllm.offline.progress import Shown
from prefixstore.vllm.offline.prompts import run_module

if TYPE_CHECKING:
    from prefixstore.vllm.offline.driver import Progress
    from prefixstore.vllm.offline.engine import OfflineEngine
    from prefixstore.vllm.offline.promptfile import Prompt
    from prefixstore.vllm.offline.rendering import Renderer
    from prefixstore.vllm.offline.work import Work

__all__ = ["Failure", "PrefillReport", "Request", "main", "prefill"]

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked.

    Attributes:
        root: The root's path; made when it is not there.
        model: The model.
        prompts: The file's path, or ``-``.
        options: Further options of ``kv_connector_extra_config``.
        chat: Take raw text for a user's message.
        chat_template: A file in the place of the model's template.
        pin: Pin the prompts' chunks under this name.
        pin_for_s: How long the pin holds; None for ever.
        pin_until_s: When it ends, in seconds since the epoch; None for never.
        as_json: Report as one JSON document.
        arguments: vLLM's own arguments.
    """

    root: str
    model: str
    prompts: str
    options: dict[str, Any] = {}
    chat: bool = False
    chat_template: str | None = None
    pin: str | None = None
    pin_for_s: float | None = None
    pin_until_s: int | None = None
    as_json: bool = False
    arguments: list[str] = []


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One prompt that is not stored, with its line in the file."""

    line: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillReport:
    """What came of it.

    Attributes:
        root: The root's path.
        namespace: Where the chunks are.
        pin: The pin's name; None without one.
        complete: Every prompt could be read and all its whole chunks are stored.
        prompts: Prompts in the file.
        computed_prompts: Those that this process gave to the engine.
        skipped_prompts: Those that it did not need to: stored before, or by other processes.
        short_prompts: Those of them without a whole chunk, of which nothing can be stored.
        failed: Those that are not stored.
        tokens: Tokens of all prompts.
        tail_tokens: Those behind the last whole chunk of their prompt, which cannot be stored.
        computed_tokens: Tokens that were computed.
        cached_tokens: Tokens of computed prompts that were loaded, or in the engine's memory.
        chunks: Different chunks of all prompts.
        stored_chunks: Chunks that came while this process worked on their prompts.
        stored_bytes: What their files take.
        elapsed_s: From the engine's start to the last chunk.
    """

    root: str
    namespace: NamespaceId
    pin: str | None
    complete: bool
    prompts: int
    computed_prompts: int
    skipped_prompts: int
    short_prompts: int
    failed: tuple[Failure, ...]
    tokens: int
    tail_tokens: int
    computed_tokens: int
    cached_tokens: int
    chunks: int
    stored_chunks: int
    stored_bytes: int
    elapsed_s: float


def prefill(
    engine: "OfflineEngine",
    renderer: "Renderer",
    prompts: "Sequence[Prompt]",
    request: Request,
    *,
    patience_s: float = PATIENCE_S,
) -> PrefillReport:
    """Bring prompts into the root of a started engine.

    Args:
        engine: The engine.
        renderer: Makes tokens, with the engine's tokenizer.
        prompts: The prompts.
        request: What is asked.
        patience_s: How long another host's silence is waited out.

    Raises:
        FullError, UnavailableError: The root is away; run again to go on.
    """
    from prefixstore.vllm.offline.driver import Driver
    from prefixstore.vllm.offline.keying import Keying
    from prefixstore.vllm.offline.work import Seen, plan_work

    started_s = time.monotonic()
    fields = engine.open_store()
    keying = Keying.of_fields(fields)
    tokens, failures = _render(renderer, prompts)
    work = plan_work(tokens, keying)
    config = StoreConfig(group_shared=bool(request.options.get("group_shared", False)))
    with (
        PrefixStore.open(
            request.root, namespace=fields, config=config, index=None, background=False
        ) as store,
        Shown(sum(len(each.lines) for each in work)) as shown,
    ):
        namespace = store.namespace
        assert namespace is not None, "it was opened with one"
        _pin(store, work, request)
        with Claims(store.root, namespace, patience_s=patience_s) as claims:
            driver = Driver(
                engine,
                Seen(lambda key: store.tree.probe(namespace, key)),
                claims,
                slots=engine.slots,
                store_reason=engine.store_reason,
                watch=shown.update,
            )
            driver.run(work)
        return _report(request, namespace, work, failures, driver.progress, started_s=started_s)


def main() -> int:
    """Carry out the request on the command line."""
    from prefixstore.vllm.offline.progress import echo_report

    request = msgspec.json.decode(sys.argv[1], type=Request)
    # An orderly end lets go of claims; a kill leaves them to other processes' patience.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        report = _run(request)
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted: what is stored stays; run it again for the rest.\n")
        return EXIT_INTERRUPTED
    if request.as_json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n")
    else:
        echo_report(report)
    return 0 if report.complete else EXIT_FAILED


def _run(request: Request) -> PrefillReport:
    from prefixstore.vllm.options import check_options

    options = {"root": request.root, **request.options}
    checked = check_options(options)
    if checked.read_only:
        raise InvalidError("a store that is read-only stores nothing: leave read_only out")
    if checked.mode != "tier":
        raise InvalidError(
            f"mode={checked.mode} does not tell what is stored: prefill works with mode=tier"
        )
    # The engine in this process: see prefixstore.vllm.offline.engine.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from prefixstore.vllm.offline.engine import OfflineEngine, start_engine
    from prefixstore.vllm.offline.rendering import Renderer, engine_args, open_prompts

    prompts = open_prompts(request.prompts, chat=request.chat)
    llm = start_engine(engine_args(request.model, request.arguments), options)
    try:
        renderer = Renderer(llm.llm_engine.renderer, chat_template=request.chat_template)
        return prefill(OfflineEngine(llm), renderer, prompts, request)
    finally:
        llm.llm_engine.engine_core.shutdown()


def _render(
    renderer: "Renderer", prompts: "Sequence[Prompt]"
) -> tuple[list[tuple[int, tuple[int, ...]]], list[Failure]]:
    rendered: list[tuple[int, tuple[int, ...]]] = []
    failures: list[Failure] = []
    for prompt in prompts:
        try:
            rendered.append((prompt.line, renderer.tokens(prompt)))
        except InvalidError as error:
            failures.append(Failure(line=prompt.line, error=str(error)))
    return rendered, failures


def _pin(store: PrefixStore, work: "Sequence[Work]", request: Request) -> None:
    """Pin all chunks before the first is computed, so that no eviction comes between."""
    if request.pin is None:
        return
    keys: dict[Key, None] = {}
    for each in work:
        keys.update(dict.fromkeys(each.keys))
    ends_at_s = request.pin_until_s
    if request.pin_for_s is not None:
        ends_at_s = store.server_now_s() + int(request.pin_for_s)
    store.pin(request.pin, list(keys), ends_at_s=ends_at_s)


def _report(
    request: Request,
    namespace: NamespaceId,
    work: "Sequence[Work]",
    failures: Sequence[Failure],
    progress: "Progress",
    *,
    started_s: float,
) -> PrefillReport:
    failed = [
        *failures,
        *(
            Failure(line=line, error=each.error)
            for each in work
            if each.error is not None
            for line in each.lines
        ),
    ]
    computed = sum(len(each.lines) for each in work if each.was_computed and each.error is None)
    skipped = sum(len(each.lines) for each in work if not each.was_computed and each.error is None)
    return PrefillReport(
        root=request.root,
        namespace=namespace,
        pin=request.pin,
        complete=not failed,
        prompts=progress.prompts + len(failures),
        computed_prompts=computed,
        skipped_prompts=skipped,
        short_prompts=sum(len(each.lines) for each in work if not each.needed),
        failed=tuple(sorted(failed, key=lambda failure: failure.line)),
        tokens=progress.tokens,
        tail_tokens=sum(each.tail_tokens * len(each.lines) for each in work),
        computed_tokens=progress.computed_tokens,
        cached_tokens=progress.cached_tokens,
        chunks=len({key for each in work for key in each.keys}),
        stored_chunks=progress.stored_chunks,
        stored_bytes=progress.stored_bytes,
        elapsed_s=time.monotonic() - started_s,
    )


if __name__ == "__main__":
    sys.exit(run_module("prefill", main, log_level="WARNING"))
