"""What the tests of prefill run beside an engine, in its process."""

import dataclasses
from pathlib import Path
from typing import Any

from prefixstore.vllm.offline.engine import OfflineEngine
from prefixstore.vllm.offline.prefill import Request, prefill
from prefixstore.vllm.offline.prompts import Request as Asked
from prefixstore.vllm.offline.prompts import answer
from prefixstore.vllm.offline.rendering import Renderer, open_prompts


def run(llm: Any, *, root: str, prompts: str, pin: str | None = None) -> dict[str, Any]:
    """Prefill with a running engine; return the report."""
    request = Request(root=root, model="-", prompts=prompts, pin=pin)
    renderer = Renderer(llm.llm_engine.renderer, chat_template=None)
    report = prefill(OfflineEngine(llm), renderer, open_prompts(prompts, chat=False), request)
    return dataclasses.asdict(report)


def keys(llm: Any, *, root: str, prompts: str, model: str) -> dict[str, list[list[str]]]:
    """Return the keys of prompts by namespace, as the command line's child works them out."""
    assert Path(model).is_dir()
    return answer(Asked(root=root, namespace=None, prompts=prompts, model=model)).namespaces
