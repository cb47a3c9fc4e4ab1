"""``prefixstore pin``: keep chunks from eviction, by name."""

from typing import TYPE_CHECKING

import click

from prefixstore.cli.options import AGE, INDEX_DIR, JSON, MOMENT, ROOT, note, open_store
from prefixstore.cli.prompt_keys import prompt_options
from prefixstore.cli.render import echo_json
from prefixstore.cli.units import format_size

if TYPE_CHECKING:
    from prefixstore.cli.prompt_keys import Asked
    from prefixstore.keys import Key, NamespaceId
    from prefixstore.store import PrefixStore

__all__ = ["command"]


@click.command(
    "pin",
    context_settings={"ignore_unknown_options": True},
    epilog="Example: prefixstore pin /mnt/kv support-bot --prompts system.jsonl --model my-model --for 90d",
)
@ROOT
@click.argument("name")
@click.option("--namespace", metavar="ID", help="Where the chunks are; alone: all chunks of it.")
@click.option("--key", "keys", multiple=True, metavar="HEX", help="This chunk; repeatable.")
@prompt_options(help="Every chunk of these prompts, stored already or not.")
@click.option("--until", type=MOMENT, metavar="DATE", help="End by itself then (2027-01-31).")
@click.option("--for", "for_s", type=AGE, metavar="AGE", help="End by itself after so long (30d).")
@INDEX_DIR
@JSON
def command(
    root: str,
    *,
    name: str,
    namespace: str | None,
    keys: tuple[str, ...],
    asked: "Asked | None",
    until: int | None,
    for_s: float | None,
    index_dir: str | None,
    as_json: bool,
) -> int:
    """Keep chunks of ROOT from eviction, on every host, under NAME. Replaces the pin of that name.

    A pinned chunk keeps all that comes before it in its prompt. Pins may overlap: a chunk stays for as
    long as one of them holds it.
    """
    from prefixstore.cli.main import EXIT_FAILED

    if until is not None and for_s is not None:
        raise click.UsageError("Give --until or --for, not both.")
    if keys and asked is not None:
        raise click.UsageError("Give --key or --prompts, not both.")
    if not keys and asked is None and namespace is None:
        raise click.UsageError("Say what to pin: --prompts, --key or --namespace.")
    with open_store(root, index_dir=index_dir) as store:
        note(f"Scanning {root} ...")
        scan = store.reconcile()
        where, chosen = _choose(store, namespace, keys, asked)
        ends_at_s = until if for_s is None else store.server_now_s() + int(for_s)
        store.pin(name, chosen, namespace=where, ends_at_s=ends_at_s)
        found = [record for record in store.hints.get_many(where, chosen) if record is not None]
    size = sum(record.file_bytes for record in found)
    if as_json:
        echo_json(
            {
                "name": name,
                "namespace": where,
                "keys": len(chosen),
                "stored_chunks": len(found),
                "stored_bytes": size,
                "ends_at_s": ends_at_s,
            }
        )
    else:
        click.echo(
            f"Pinned {len(chosen)} chunks as {name!r}: {len(found)} stored, {format_size(size)}."
        )
    # Keys and prompts name what they mean, met or not.
    missed = scan.errors if not keys and asked is None else []
    for text in missed:
        click.echo(f"Error: not everything was looked at: {text}", err=True)
    return EXIT_FAILED if missed else 0


def _choose(
    store: "PrefixStore", namespace: str | None, keys: tuple[str, ...], asked: "Asked | None"
) -> "tuple[NamespaceId, list[Key]]":
    """Return what to pin, and where.

    Raises:
        InvalidError: Nothing is found, or it is found in several namespaces.
    """
    from prefixstore.keys import key_from_hex
    from prefixstore.ops.pins import find_keys, keys_of_namespace
    from prefixstore.ops.removal import find_namespace

    given = find_namespace(store.root, namespace) if namespace is not None else None
    if asked is not None:
        found = asked.find(store.root.path, namespace=given)
        found.refuse_errors()
        where = given or found.only_namespace(store)
        return where, found.keys(where)
    if keys:
        named = [key_from_hex(text) for text in keys]
        return given or find_keys(store, named), named
    assert given is not None, "the caller has seen to it"
    return given, keys_of_namespace(store, given)
