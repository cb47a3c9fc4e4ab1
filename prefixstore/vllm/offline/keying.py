"""From tokens to chunk keys, as the engine of a namespace makes them; the model is not run.

How a namespace cuts and hashes is read off its manifest (``prefixstore.vllm.fingerprint``): tokens per hash,
tokens of a block in each KV group, blocks per chunk, the hash and its seed. The hash itself is vLLM's.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self

from prefixstore.errors import InvalidError
from prefixstore.keys import Key, make_key

__all__ = ["Keying"]


@dataclass(frozen=True, slots=True)
class Keying:
    """How tokens become keys. Immutable; equal for namespaces that make the same keys.

    Attributes:
        algorithm: vLLM's name of the block hash.
        seed: What the first block's parent is made of.
        tokens_per_hash: How many tokens one hash is for.
        tokens_per_chunk: How many tokens a chunk holds, for each KV group.
        kinds: The kind of each KV group, by vLLM's name of its spec.
    """

    algorithm: str
    seed: str
    tokens_per_hash: int
    tokens_per_chunk: tuple[int, ...]
    kinds: tuple[str, ...]

    @classmethod
    def of_fields(cls, fields: Mapping[str, Any]) -> Self:
        """Read it off a namespace's fields.

        Raises:
            InvalidError: They do not tell, as those of a bare tier, or of another recipe.
        """
        try:
            groups = fields["groups"]
            block_tokens = [int(group["spec"]["block_size"]) for group in groups]
            kinds = tuple(str(group["kind"]) for group in groups)
            chunks, hashing, topology = fields["chunks"], fields["hash"], fields["topology"]
            contexts = int(topology["decode_context"]) * int(topology["prefill_context"])
            states = fields.get("mamba") or {}
            algorithm, seed = str(hashing["algorithm"]), str(hashing["seed"])
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidError(
                f"its manifest does not tell how keys are made ({error!r} is missing)"
            ) from error
        if contexts != 1:
            raise InvalidError(
                "its engines divide the context between devices, and keys of those are not worked out"
            )
        per_hash = chunks.get("tokens_per_hash")
        if per_hash is None:
            aligned = "MambaSpec" not in kinds or states.get("mamba_cache_mode") == "align"
            per_hash = math.gcd(*block_tokens) if aligned else math.lcm(*block_tokens)
        blocks = chunks.get("blocks_per_chunk")
        if blocks is None:
            whole = chunks.get("block_size")
            blocks = 1 if whole is None else int(whole) // block_tokens[0]
        return cls(
            algorithm=algorithm,
            seed=seed,
            tokens_per_hash=int(per_hash),
            tokens_per_chunk=tuple(tokens * int(blocks) for tokens in block_tokens),
            kinds=kinds,
        )

    def keys(self, tokens: Sequence[int]) -> list[list[Key]]:
        """Return the keys of a prompt's whole chunks, front to back, for each KV group.

        Only whole chunks have one: the last tokens of a prompt belong to a chunk that is not full.

        Raises:
            InvalidError: This vLLM does not know the hash.
        """
        hashes = self._hashes(tokens)
        chains = []
        for group, chunk_tokens in enumerate(self.tokens_per_chunk):
            per_chunk = chunk_tokens // self.tokens_per_hash
            suffix = group.to_bytes(4, "big")
            chains.append(
                [make_key(each + suffix) for each in islice(hashes, per_chunk - 1, None, per_chunk)]
            )
        return chains

    def needed(self, chains: Sequence[Sequence[Key]]) -> list[Key]:
        """Return which of a prompt's keys a later request needs, front to back.

        All chunks of full attention; of a sliding window only the last one, since vLLM does not store
        those that have left the window; of states none, unless there is nothing else.
        """
        needed: list[Key] = []
        for kind, chain in zip(self.kinds, chains, strict=True):
            if "SlidingWindow" in kind or "Chunked" in kind:
                needed += chain[-1:]
            elif "Mamba" not in kind:
                needed += chain
        return needed or [key for chain in chains for key in chain[-1:]]

    def _hashes(self, tokens: Sequence[int]) -> list[bytes]:
        from vllm.utils.hashing import get_hash_fn_by_name
        from vllm.v1.core.kv_cache_utils import BlockHash, hash_block_tokens

        try:
            hash_of = get_hash_fn_by_name(self.algorithm)
        except ValueError as error:
            raise InvalidError(
                f"this vLLM does not know the hash {self.algorithm!r}: use the version that made the "
                "namespace"
            ) from error
        parent = BlockHash(hash_of(self.seed))
        hashes: list[bytes] = []
        for start in range(0, len(tokens) - self.tokens_per_hash + 1, self.tokens_per_hash):
            # No extra keys: prompts with adapters, salts or pictures are refused before.
            parent = hash_block_tokens(
                hash_of, parent, tokens[start : start + self.tokens_per_hash], None
            )
            hashes.append(parent)
        return hashes
