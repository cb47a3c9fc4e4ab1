"""What several verbs share: the ROOT argument, options, types of values, opening the store.

The environment is read here and nowhere below: the index's directory comes from ``XDG_CACHE_HOME`` or
``HOME`` unless ``--index-dir`` names one.
"""

import datetime as dt
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from prefixstore.cli.units import parse_age, parse_size
from prefixstore.errors import InvalidError

if TYPE_CHECKING:
    from prefixstore.keys import Fields
    from prefixstore.store import PrefixStore

__all__ = [
    "AGE",
    "INDEX_DIR",
    "JSON",
    "MOMENT",
    "ROOT",
    "ROOT_OPTION",
    "SIZE",
    "YES",
    "confirm",
    "note",
    "open_store",
]


class _Quantity(click.ParamType[float]):
    """A number with a unit, read by one of the functions of ``units``."""

    def __init__(self, name: str, parse: Callable[[str], float]) -> None:
        self.name = name
        self._parse = parse

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Read the text; what cannot be read is a usage error that names the option."""
        if not isinstance(value, str):
            return float(value)
        try:
            return self._parse(value)
        except InvalidError as error:
            self.fail(str(error), param, ctx)


class _Moment(click.ParamType[int]):
    """A date, or a date with a time, in seconds since the epoch; UTC unless it says otherwise."""

    name = "moment"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read ``2027-01-31`` or ``2027-01-31T18:00+01:00``."""
        try:
            moment = dt.datetime.fromisoformat(str(value))
        except ValueError:
            self.fail(f"{value!r} is no date; write 2027-01-31 or 2027-01-31T18:00Z", param, ctx)
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=dt.UTC)
        return int(moment.timestamp())


class _AbsolutePath(click.ParamType[str]):
    """A path, made absolute against the current directory; links stay as they are."""

    name = "path"

    def convert(
        self,
        value: Any,
        param: click.Parameter | None,  # noqa: ARG002 - click's signature
        ctx: click.Context | None,  # noqa: ARG002 - click's signature
    ) -> str:
        """Return the absolute path."""
        # Not resolve(): it follows links and asks the filesystem, which may hang.
        return os.path.abspath(Path(str(value)).expanduser())  # noqa: PTH100 - see above

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's signature
        param: click.Parameter,  # noqa: ARG002 - click's signature
        incomplete: str,
    ) -> list[CompletionItem]:
        """Have the shell complete directories."""
        return [CompletionItem(incomplete, type="dir")]


SIZE = _Quantity("size", parse_size)
MOMENT = _Moment()
AGE = _Quantity("age", parse_age)
ROOT = click.argument("root", type=_AbsolutePath())
ROOT_OPTION = click.option("--root", required=True, type=_AbsolutePath(), help="The root's path.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
YES = click.option("--yes", is_flag=True, help="Do it without asking.")
INDEX_DIR = click.option(
    "--index-dir",
    type=_AbsolutePath(),
    metavar="DIR",
    help="Directory of this host's index, on a local disk. Default: under the user's cache directory.",
)


def open_store(
    root: str,
    *,
    index_dir: str | None = None,
    read_only: bool = False,
    namespace: "Fields | None" = None,
    **settings: object,
) -> "PrefixStore":
    """Open a root for a verb, with this host's index if there can be one.

    Args:
        root: Its path; it must be there.
        index_dir: Where the index lives; None for the default.
        read_only: Change nothing.
        namespace: Fields of the namespace to store into, made if it is not there; None for none.
        settings: Further ones of ``StoreConfig``.

    Raises:
        InvalidError: ``root`` is no root, or ``index_dir`` must not hold an index.
        UnavailableError: The root cannot be reached.
    """
    from prefixstore.config import StoreConfig
    from prefixstore.index.place import default_index_dir
    from prefixstore.store import PrefixStore
    from prefixstore.tree.root import Root

    def opened(where: str | None) -> PrefixStore:
        given = {"index_dir": where, "read_only": read_only, **settings}
        config = StoreConfig.from_mapping(given)
        if namespace is not None:
            Root.open(root)  # A namespace may be made, a root of a mistyped path not.
        return PrefixStore.open(
            root,
            namespace=namespace,
            config=config,
            create=namespace is not None,
            index=None if where is None else "auto",
        )

    if index_dir is not None:
        return opened(index_dir)
    try:
        return opened(str(default_index_dir(os.environ)))
    except InvalidError:
        # A home on a network filesystem, or none, is no fault of this command line: everything the
        # verbs need can be read from the tree, into memory. A root that is none is refused again by this opening.
        return opened(None)


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is destroyed; ``--yes`` answers for scripts.

    Raises:
        click.Abort: The answer was no.
        click.UsageError: There is nobody to ask.
    """
    if yes:
        return
    try:
        agreed = click.confirm(question, err=True)
    except click.Abort:
        if sys.stdin.isatty():
            raise  # Ctrl-C or Ctrl-D.
        click.echo(err=True)
        raise click.UsageError(
            "nobody answers, so nothing was removed: give --yes to do it without asking, or --dry-run "
            "to see what would be done"
        ) from None
    if not agreed:
        raise click.Abort


def note(text: str) -> None:
    """Say on a terminal what takes a while; scripts are spared."""
    if sys.stderr.isatty():
        click.echo(text, err=True)
