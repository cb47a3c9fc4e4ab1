"""Who computes what, of several processes that fill one root from one list of prompts. By files alone.

    prefill/<claimant>.json          a process; its time changes with each beat
    prefill/<namespace>/<key>.<n>.json    the n-th claim on a chunk; names its claimant

What is claimed is the first chunk of a prompt that is not stored yet, and its last. So the beginning that two
prompts share is never begun twice, once it is stored their ends are claimed by themselves, and nobody begins
one whose chunks are just coming. A claim is won by making its file where none is, which a filesystem grants to one
process only. It is never broken, only followed: whoever finds its claimant dead wins the next number, if it is
the first to make that.

Dead is proved on the claimant's own host, and elsewhere presumed when its file did not change for ``PATIENCE_S``
by the file server's clock. A wrong guess, a file that is gone, or two mounts that see each other late cost
work done twice and nothing else: chunks are published once, whoever computes them.
"""

import contextlib
import uuid
from typing import Self

import msgspec

from prefixstore.clock import Clock, SystemClock
from prefixstore.errors import InvalidError, UnavailableError
from prefixstore.keys import Key, NamespaceId
from prefixstore.tree.documents import put_document, read_document
from prefixstore.tree.root import Root
from prefixstore.tree.scan import names_in
from prefixstore.tree.trouble import is_missing, translate
from prefixstore.tree.writers import WriterDocument, is_alive, this_process

__all__ = ["BEAT_S", "NUMBERS_MAX", "PATIENCE_S", "Claims"]

BEAT_S = 10.0
"""How often a claimant shows that it goes on: one metadata write."""
PATIENCE_S = 120.0
"""How old a beat may be. NFS may show a file's old time for a minute by default (acregmax), and a beat waits
for the engine's step. Shorter does work twice now and then; longer is for how long the prompts of a host
that died are left alone."""
NUMBERS_MAX = 100
"""How often a chunk's claimant may die before nobody tries again: such a prompt kills engines."""
VERDICT_S = 1.0
"""How long a claimant is believed alive without another look."""


class ClaimDocument(msgspec.Struct, frozen=True, kw_only=True):
    """``prefill/<namespace>/<key>.<n>.json``."""

    claimant: str


class Claims:
    """One process's claims on chunks of one namespace. A context manager. Not thread-safe.

    Attributes:
        claimant: This process's id, never used twice.
    """

    def __init__(
        self,
        root: Root,
        namespace: NamespaceId,
        *,
        clock: Clock | None = None,
        this: WriterDocument | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """Announce a claimant.

        Raises:
            FullError, UnavailableError: The root cannot be written.
        """
        self.claimant = uuid.uuid4().hex
        self._root = root
        self._os = root.os_calls
        self._clock = clock or SystemClock()
        self._this = this or this_process()
        self._patience_s = patience_s
        self._directory = f"{root.layout.prefill}/{namespace}"
        self._held: dict[Key, int] = {}
        self._alive_until_s: dict[str, float] = {}
        self._beat_at_s = 0.0
        self._server_ahead_s = 0.0
        try:
            root.ensure_directory(self._directory)
        except OSError as error:
            raise translate(error, doing="make", path=self._directory) from error
        self._announce()
        self.beat()

    def __enter__(self) -> Self:
        """Return the claims themselves."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of everything."""
        self.close()

    def beat(self) -> None:
        """Show that this process goes on, if it is time; call it often.

        Raises:
            FullError, UnavailableError: The root cannot be written.
        """
        now_s = self._clock.monotonic_s()
        if now_s < self._beat_at_s:
            return
        path = self._path_of(self.claimant)
        try:
            try:
                self._os.touch(path)
            except FileNotFoundError:
                self._announce()
            self._server_ahead_s = self._os.stat(path).modified_s - now_s
        except OSError as error:
            raise translate(error, doing="touch", path=path) from error
        self._beat_at_s = now_s + BEAT_S

    def acquire(self, key: Key) -> bool:
        """Claim a chunk, unless a living process has; look whether it is stored afterwards.

        Raises:
            InvalidError: Too many processes have died with this claim.
            FullError, UnavailableError: Nobody can say, or no claim can be made.
        """
        if key in self._held:
            return True
        for number in range(NUMBERS_MAX):
            path = self._claim(key, number)
            found = self._read(path)
            if found is None:
                put_document(
                    path,
                    ClaimDocument(claimant=self.claimant),
                    os_calls=self._os,
                    mode=self._root.document_mode,
                )
                found = self._read(path)
                if found == self.claimant:
                    self._held[key] = number
                return found == self.claimant
            if self._lives(found):
                return False
        raise InvalidError(
            f"{NUMBERS_MAX} processes died on this prompt: mend that, and remove {self._directory}"
        )

    def release(self, key: Key) -> None:
        """Let go of a claim; what fails is left to time."""
        number = self._held.pop(key, None)
        if number is None:
            return
        for each in range(number, -1, -1):
            with contextlib.suppress(OSError):
                self._os.unlink(self._claim(key, each))

    def close(self) -> None:
        """Let go of all claims, and sweep up if nobody else is at work."""
        for key in list(self._held):
            self.release(key)
        with contextlib.suppress(OSError, UnavailableError):
            self._sweep()
        with contextlib.suppress(OSError):
            self._os.unlink(self._path_of(self.claimant))

    def _announce(self) -> None:
        put_document(
            self._path_of(self.claimant),
            self._this,
            os_calls=self._os,
            mode=self._root.document_mode,
        )

    def _lives(self, claimant: str) -> bool:
        """Whether a claimant goes on, as far as can be told."""
        now_s = self._clock.monotonic_s()
        if claimant == self.claimant or now_s < self._alive_until_s.get(claimant, 0.0):
            return True
        lives = self._look_at(claimant, server_now_s=now_s + self._server_ahead_s)
        if lives:
            self._alive_until_s[claimant] = now_s + VERDICT_S
        return lives

    def _look_at(self, claimant: str, *, server_now_s: float) -> bool:
        path = self._path_of(claimant)
        try:
            beaten_s = self._os.stat(path).modified_s
        except OSError as error:
            if is_missing(error):
                return False  # It has ended, and left this claim behind.
            raise translate(error, doing="look at", path=path) from error
        with contextlib.suppress(InvalidError):
            document = read_document(path, WriterDocument, os_calls=self._os)
            if document is not None:
                proved = is_alive(document, here=self._this)
                if proved is False:
                    return False
        return server_now_s - beaten_s <= self._patience_s

    def _read(self, path: str) -> str | None:
        """Return who made a claim, None if nobody has; a damaged one is a dead one's."""
        try:
            document = read_document(path, ClaimDocument, os_calls=self._os)
        except InvalidError:
            return "damaged"
        return document.claimant if document is not None else None

    def _sweep(self) -> None:
        """Remove what the dead have left, if no other process lives: nobody needs it to see who is dead."""
        directory = self._root.layout.prefill
        files = names_in(self._os, directory, directories=False)
        others = {name.removesuffix(".json") for name in files if name.endswith(".json")}
        others.discard(self.claimant)
        if any(self._lives(other) for other in others):
            return
        for namespace in names_in(self._os, directory, directories=True):
            for name in names_in(self._os, f"{directory}/{namespace}", directories=False):
                self._os.unlink(f"{directory}/{namespace}/{name}")
            self._os.remove_directory(f"{directory}/{namespace}")
        for other in others:
            self._os.unlink(self._path_of(other))

    def _claim(self, key: Key, number: int) -> str:
        return f"{self._directory}/{key.hex()}.{number}.json"

    def _path_of(self, claimant: str) -> str:
        return f"{self._root.layout.prefill}/{claimant}.json"
