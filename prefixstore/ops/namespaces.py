"""Why engines share or do not: the fields of namespaces, side by side.

Reads manifests only, so it is quick on a root of any size. What the fields mean is the business of whoever
wrote them; of an engine's, a few are picked out for a list.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import msgspec

from prefixstore.errors import InvalidError, UnavailableError
from prefixstore.keys import NamespaceId
from prefixstore.tree.root import Root

__all__ = ["Difference", "NamespaceSummary", "compare", "fields_of", "summarize"]

SHORT_DIGITS = 8
"""Of a digest or commit in a list: enough to tell some thousands apart by eye."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceSummary:
    """One namespace in a list.

    Attributes:
        namespace: Its id.
        model: The model's class, or the name that a user gave under vLLM's bare tiering.
        weights: The commit or the digest, shortened; of several files how many there are.
        dtype: The model's element type.
        kv_cache_dtype: The cache's.
        workers: How many workers cut a chunk among themselves.
        engine: Who wrote it.
        error: Why its manifest cannot be read; everything else is then empty.
        fields: All fields, in full.
    """

    namespace: NamespaceId
    model: str = ""
    weights: str = ""
    dtype: str = ""
    kv_cache_dtype: str = ""
    workers: str = ""
    engine: str = ""
    error: str | None = None
    fields: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One field of two namespaces.

    Attributes:
        field: Its path: names joined by dots, places in lists in brackets.
        one: Its value in the first namespace; None if it is not there.
        other: Its value in the second.
        missing: In which of the two it is not there: ``one``, ``other`` or neither.
        same: Whether both have it, with one value.
    """

    field: str
    one: object
    other: object
    missing: str | None
    same: bool


def summarize(root: Root) -> list[NamespaceSummary]:
    """Return the namespaces of a root in the order of their ids.

    Raises:
        UnavailableError: The root cannot be read now.
    """
    return [_summary(root, namespace) for namespace in root.namespaces()]


def fields_of(root: Root, namespace: NamespaceId) -> Mapping[str, object]:
    """Return a namespace's fields.

    Raises:
        InvalidError: Its manifest is missing or damaged.
        UnavailableError: The root cannot be read now.
    """
    manifest = root.manifest(namespace)
    if manifest is None:
        raise InvalidError(
            f"{root.layout.manifest(namespace)} is missing: no engine can open this namespace. Remove "
            f"it with `prefixstore rm {root.path} --namespace {namespace}`"
        )
    return manifest.fields


def compare(one: Mapping[str, object], other: Mapping[str, object]) -> list[Difference]:
    """Return every field of two namespaces, in order, with both its values.

    >>> [d.field for d in compare({"a": {"b": 1}, "c": [1]}, {"a": {"b": 2}, "c": [1]}) if not d.same]
    ['a.b']
    """
    left, right = dict(_leaves(one)), dict(_leaves(other))
    return [
        Difference(
            field=name,
            one=left.get(name),
            other=right.get(name),
            missing="one" if name not in left else "other" if name not in right else None,
            # As JSON: in Python, 1 == 1.0 == True.
            same=name in left
            and name in right
            and msgspec.json.encode(left[name]) == msgspec.json.encode(right[name]),
        )
        for name in sorted({*left, *right})
    ]


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Yield the fields inside a field: an empty container, and a list of plain values, is one."""
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        for place, item in enumerate(value):
            yield from _leaves(item, f"{name}[{place}]")
    else:
        yield name, value


def _summary(root: Root, namespace: NamespaceId) -> NamespaceSummary:
    try:
        fields = fields_of(root, namespace)
    except (InvalidError, UnavailableError) as error:
        return NamespaceSummary(namespace=namespace, error=str(error), fields={})
    return NamespaceSummary(
        namespace=namespace,
        model=_text(fields.get("architecture", fields.get("explicit"))),
        weights=_weights(fields.get("weights")),
        dtype=_text(fields.get("dtype", fields.get("kv_dtype"))).removeprefix("torch."),
        kv_cache_dtype=_text(fields.get("kv_cache_dtype")).removeprefix("torch."),
        workers=_text(_inside(fields.get("topology"), "world", fields.get("world_size"))),
        engine=_text(fields.get("engine")),
        fields=fields,
    )


def _weights(weights: object) -> str:
    """Shorten what names weights: ``org/name@1234abcd``, ``1234abcd``, ``1234abcd and 3 more``."""
    if commit := _inside(weights, "commit"):
        return f"{_inside(weights, 'repository')}@{_text(commit)[:SHORT_DIGITS]}"
    files = _inside(weights, "files")
    if not isinstance(files, Mapping) or not files:
        return ""
    first = _text(files[min(files)])[:SHORT_DIGITS]
    return f"{first} and {len(files) - 1} more" if len(files) > 1 else first


def _inside(value: object, name: str, default: object = None) -> object:
    return value.get(name, default) if isinstance(value, Mapping) else default


def _text(value: object) -> str:
    return "" if value is None else str(value)
