"""Adapters (LoRA) by their content: which the store may serve, and under which keys.

A block hash knows an adapter by its name and path (vllm/v1/core/kv_cache_utils.py), and so do vLLM's own
caches. So here an adapter *is* a name and a path, and must keep one content for as long as the engine
runs: its files are looked at before a worker can load them, and proved to be the same each time before
anything is stored or looked up (``AdapterFiles``). What is computed with it goes by keys that hold the
digest of that content. One whose files changed passes by until the engine ends, since nobody can tell which
of vLLM's blocks are of which content.

Loaded KV must fit the adapter that *computes on*. It is the one of the files at hand if it was loaded
before they were proved, and has not left the workers' memory since (``Residency``). So the first request
of an adapter stores and loads nothing, unless vLLM was told to load it beforehand (``--lora-modules``,
``/v1/load_lora_adapter``, ``add_lora``).

Everything but the proofs is on the scheduler's thread and asks the filesystem once for each adapter: where
that hangs, the worker's load hangs next. Proofs are on a thread of their own.
"""

import dataclasses
import hashlib
import json
import logging
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefixstore.clock import Clock, SystemClock
from prefixstore.errors import InvalidError
from prefixstore.vllm.adapter_files import AdapterFiles
from prefixstore.vllm.residency import Residency, Stay
from prefixstore.vllm.weights import WeightDigests

if TYPE_CHECKING:
    from vllm.config.lora import LoRAConfig
    from vllm.lora.request import LoRARequest

__all__ = ["Adapter", "AdapterUse", "Adapters", "lora_settings"]

logger = logging.getLogger("prefixstore")

ADAPTERS_MAX = 4096
"""Adapters, by name and path, that one engine tells apart, some 10 MB; more pass by."""
IDS_MAX = 65536
"""Ids of vLLM's for them that are remembered: each load by a server's clients takes a new one."""
WAITING_MAX = 256
"""Proofs that may wait: one takes a few opens. More wait only where the filesystem hangs."""
FIRST_PROOF_S = 2.0
"""How long requests wait while the content of an adapter that was just loaded is read: some GB."""
PROOF_PAUSE_S = 0.001
"""Between two looks at proofs that are waited for."""
CAPACITIES = frozenset({"max_loras", "max_cpu_loras", "default_mm_loras"})
"""Settings that decide how many adapters fit or which is taken, and nothing of what one computes."""

Then = Callable[[bytes | None], None]
"""Told the digest that keys of an adapter's chunks hold, or None if nothing is proved."""


def lora_settings(config: "LoRAConfig") -> dict[str, str]:
    """Return the settings that may decide what an adapter computes: all, but for capacities."""
    names = [field.name for field in dataclasses.fields(config) if field.name not in CAPACITIES]
    return {name: str(getattr(config, name)) for name in names}


@dataclass(slots=True, eq=False)
class Adapter:
    """One adapter as vLLM's block hashes know it: a name and a path.

    Attributes:
        name: What requests call it.
        has_3d_weights: How vLLM is to read it.
        files: Its files since the first mention; None if it passes by.
        digest: Its content and the engine's settings, once they are known; never another.
    """

    name: str
    has_3d_weights: bool
    files: AdapterFiles | None = None
    digest: bytes | None = None

    def pass_by(self, reason: object) -> None:
        """Neither load nor store for it, for as long as the engine runs."""
        self.files = None
        logger.warning("adapter %r passes the store by: %s", self.name, reason)


@dataclass(frozen=True, slots=True, eq=False)
class AdapterUse:
    """One request's adapter, or what vLLM was told to load."""

    adapter: Adapter
    adapter_id: int
    stay: Stay

    @property
    def may_load(self) -> bool:
        """Whether what is computed on with is surely of the content that the digest tells."""
        return self.stay.is_proven and not self.stay.is_over

    def may_load_soon(self, now_s: float) -> bool:
        """Whether a proof is under way that lets it load."""
        return now_s < self.stay.decided_by_s and not self.stay.is_over


@dataclass(slots=True, eq=False)
class _Proof:
    """A proof that is under way; its thread sets ``digest`` and then ``is_done``."""

    use: AdapterUse
    then: Then
    deadline_s: float
    digest: bytes | None = None
    is_done: bool = False


class Adapters:
    """The adapters of one engine; every method is for the scheduler's thread."""

    def __init__(
        self,
        *,
        capacity: int,
        settings: Mapping[str, str],
        digests: WeightDigests,
        clock: Clock | None = None,
    ) -> None:
        self._settings = dict(settings)
        self._digests = digests  # For the proving thread alone.
        self._clock = clock or SystemClock()
        self._known: dict[tuple[str, str], Adapter] = {}
        self._owners: dict[int, Adapter] = {}
        self._residency = Residency(capacity)
        self._uses: dict[str, AdapterUse] = {}
        self._waiting: list[_Proof] = []
        self._asked: queue.SimpleQueue[_Proof | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    # What vLLM does with adapters.

    def begin(self, request_id: str, lora: "LoRARequest") -> AdapterUse | None:
        """Note a request until ``finish``; None if its adapter passes by."""
        self.finish(request_id)
        use = self.mention(lora)
        self._uses[request_id] = use
        self._residency.begin_request(use.adapter_id)
        if lora.load_inplace and use.adapter.files is not None:
            use.adapter.pass_by("a request has it loaded anew at every step (load_inplace)")
        return use if use.adapter.files is not None else None

    def scheduled(self, request_id: str) -> None:
        """Note that the next step of the workers computes for a request, if it has an adapter."""
        if (use := self._uses.get(request_id)) is not None:
            self._residency.used(use.adapter_id)

    def finish(self, request_id: str) -> None:
        """Note the end of a request, if it had an adapter."""
        if (use := self._uses.pop(request_id, None)) is not None:
            self._residency.end_request(use.adapter_id)

    def mention(self, lora: "LoRARequest") -> AdapterUse:
        """Note that an adapter is about to be used; before anything can load it."""
        if lora.load_inplace:
            self._residency.end(lora.lora_int_id)
        adapter = self._find(lora)
        owner = self._owners.get(lora.lora_int_id)
        if owner is None and len(self._owners) < IDS_MAX:
            self._owners[lora.lora_int_id] = adapter
        elif owner is not adapter:
            # Workers know an adapter by its id, and would compute with the other one's weights.
            for either in (owner, adapter):
                if either is not None and either.files is not None:
                    either.pass_by(f"its id, {lora.lora_int_id}, may name another one too")
        return AdapterUse(adapter, lora.lora_int_id, self._residency.mention(lora.lora_int_id))

    def loaded(self, use: AdapterUse) -> None:
        """Note that the workers have loaded an adapter since it was mentioned."""
        self._residency.used(use.adapter_id)
        if use.adapter.files is not None:
            use.stay.decided_by_s = self._clock.monotonic_s() + FIRST_PROOF_S
            if not self._ask(_Proof(use, lambda _digest: None, deadline_s=0.0)):
                use.stay.decided_by_s = 0.0

    def removed(self, adapter_id: int) -> None:
        """Note that the workers have dropped an adapter; its id may come to name another.

        Not while a request with it runs: at its next step the workers load it again, and what comes under
        the same id would be computed with it for good.
        """
        self._residency.end(adapter_id)
        if not any(use.adapter_id == adapter_id for use in self._uses.values()):
            self._owners.pop(adapter_id, None)

    def pinned(self, adapter_id: int) -> None:
        """Note that an adapter stays in the workers' memory for good."""
        self._residency.pin(adapter_id)

    def _find(self, lora: "LoRARequest") -> Adapter:
        """Return the adapter of a name and a path, looking at its files when it is new."""
        place = (lora.lora_name, lora.lora_path)
        if (known := self._known.get(place)) is not None:
            if known.has_3d_weights != lora.is_3d_lora_weight and known.files is not None:
                known.pass_by("requests say differently how to read it (is_3d_lora_weight)")
            return known
        adapter = Adapter(lora.lora_name, lora.is_3d_lora_weight)
        if len(self._known) >= ADAPTERS_MAX:
            return adapter
        self._known[place] = adapter
        try:
            # A relative path is vLLM's to resolve, and a worker's directory is the engine's.
            adapter.files = AdapterFiles(Path(lora.lora_path).expanduser().absolute())
        except (InvalidError, OSError) as error:
            adapter.pass_by(error)
        return adapter

    # Proofs.

    @property
    def busy(self) -> bool:
        """Whether anybody waits for a proof."""
        return bool(self._waiting)

    def prove(self, use: AdapterUse, then: Then, *, patience_s: float) -> None:
        """Prove that an adapter's content was the same from its first mention until now.

        Only for KV that was computed in this stay, or to load for a use that may: a proof tells of the
        files, and that the workers had loaded them by now is for the caller to know.

        Args:
            use: The adapter's use.
            then: Called by ``poll``, exactly once.
            patience_s: How long the proof may take; nothing is proved then.
        """
        if use.adapter.files is None or len(self._waiting) >= WAITING_MAX:
            then(None)
            return
        proof = _Proof(use, then, self._clock.monotonic_s() + patience_s)
        if self._ask(proof):
            self._waiting.append(proof)
        else:
            then(None)

    def poll(self) -> None:
        """Tell of the proofs that have ended, and give up those that took too long."""
        if not self._waiting:
            return
        now_s = self._clock.monotonic_s()
        ended = [proof for proof in self._waiting if proof.is_done or proof.deadline_s < now_s]
        self._waiting = [proof for proof in self._waiting if proof not in ended]
        for proof in ended:
            proof.then(proof.digest if proof.is_done else None)

    def give_up(self, patience_s: float) -> None:
        """Hear of the proofs that end within ``patience_s``, and take all others for failed."""
        end_s = self._clock.monotonic_s() + patience_s
        self.poll()
        while self._waiting and self._clock.monotonic_s() < end_s:
            self._clock.sleep(PROOF_PAUSE_S)
            self.poll()
        waiting, self._waiting = self._waiting, []
        for proof in waiting:
            proof.then(None)

    def close(self) -> None:
        """End the thread once it has nothing to do; one that hangs is left behind."""
        self._asked.put(None)

    def _ask(self, proof: _Proof) -> bool:
        """Hand a proof to the proving thread; False if there is none now, for want of threads."""
        if self._thread is None:
            thread = threading.Thread(target=self._answer, name="prefixstore-adapters", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                logger.warning("cannot prove adapter %r: %s", proof.use.adapter.name, error)
                return False
            self._thread = thread
        self._asked.put(proof)
        return True

    # On the proving thread.

    def _answer(self) -> None:
        while (proof := self._asked.get()) is not None:
            proof.digest = self._try_proof(proof.use)
            proof.use.stay.decided_by_s = 0.0
            proof.is_done = True

    def _try_proof(self, use: AdapterUse) -> bytes | None:
        adapter = use.adapter
        if (files := adapter.files) is None:
            return None
        try:
            if adapter.digest is None:
                adapter.digest = self._identify(adapter, files.digest(self._digests))
            else:
                files.check()
        except OSError as error:
            logger.warning("cannot look at the files of adapter %r: %s", adapter.name, error)
            return None
        except InvalidError as error:
            adapter.pass_by(error)
            return None
        except Exception:
            logger.exception("cannot identify adapter %r", adapter.name)
            adapter.pass_by("the log has the traceback")
            return None
        use.stay.is_proven = True
        return adapter.digest

    def _identify(self, adapter: Adapter, files: Mapping[str, str]) -> bytes:
        identity = {
            "files": files,
            "settings": self._settings,
            "has_3d_weights": adapter.has_3d_weights,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).digest()
