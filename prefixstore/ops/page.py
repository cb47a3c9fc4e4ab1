"""One page about a root, for a browser: everything in one file, nothing fetched, no script.

The page says what ``Insight`` says and works nothing out but shares and units.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import jinja2

from prefixstore.ops.insight import AGES_S, DEPTHS, HourSum, Insight
from prefixstore.ops.plots import bars, timeline

__all__ = ["Plot", "render"]

NAMESPACES_MAX = 50
DAY_S = 86400


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A question, and its answer as a picture; ``svg`` is empty when there is nothing to draw."""

    title: str
    about: str
    svg: str
    nothing: str = "Nothing was counted yet: writers write down what they do every five minutes."


def render(insight: Insight, *, history_s: float, prefill_tokens_per_s: float | None) -> str:
    """Return the page as HTML.

    Args:
        insight: What to tell.
        history_s: How far back its history goes.
        prefill_tokens_per_s: How fast engines compute a prompt, as measured by the operator; None
            leaves the seconds saved out, since nobody else can know them.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("prefixstore.ops"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        insight=insight,
        seen=datetime.fromtimestamp(insight.now_s, UTC).strftime("%Y-%m-%d %H:%M"),
        history=_span(history_s),
        tiles=list(_tiles(insight, prefill_tokens_per_s)),
        plots=list(_plots(insight)),
        eviction=list(_eviction(insight)),
        namespaces=[
            (
                line.namespace,
                f"{line.chunks}",
                _bytes(line.file_bytes),
                f"{_span(insight.now_s - line.used_s)} ago" if line.used_s else "never",
            )
            for line in insight.root.namespaces[:NAMESPACES_MAX]
        ],
    )


def _tiles(insight: Insight, prefill_tokens_per_s: float | None) -> Iterator[tuple[str, str]]:
    root, hours = insight.root, insight.hours
    yield _bytes(root.file_bytes), f"stored in {root.chunks} chunks"
    yield _bytes(root.free_bytes), f"free of {_bytes(root.total_bytes)}"
    yield _share(sum(h.found for h in hours), sum(h.looked_up for h in hours)), "of chunks found"
    yield _bytes(sum(hour.loaded_bytes for hour in hours)), "of KV loaded, not computed"
    yield f"{insight.tokens:,}", "tokens not computed"
    if prefill_tokens_per_s:
        seconds = insight.tokens / prefill_tokens_per_s
        yield f"{seconds:,.0f} s", f"of prefill saved, at {prefill_tokens_per_s:,.0f} tokens/s"
    yield _bytes(insight.pinned_bytes), f"held by {len(root.pins)} pins"
    yield f"{root.quarantine_files}", f"damaged blobs kept ({_bytes(root.quarantine_bytes)})"


def _plots(insight: Insight) -> Iterator[Plot]:
    hours, namespaces = insight.hours, insight.root.namespaces[:8]
    starts_s = [hour.starts_s for hour in hours]
    stored = bool(insight.root.file_bytes)
    empty = "The root is empty."
    yield Plot(
        title="What fills the root",
        about="Bytes on disk by namespace, the largest first.",
        svg=bars(
            [line.namespace[:8] for line in namespaces],
            [line.file_bytes for line in namespaces],
            unit="bytes",
        )
        if stored
        else "",
        nothing=empty,
    )
    yield Plot(
        title="Hit rate",
        about="Of the chunks that lookups asked for, the share that was stored, by the hour.",
        svg=timeline(starts_s, [("found", [_hit_rate(hour) for hour in hours])], unit="%")
        if any(hour.looked_up for hour in hours)
        else "",
    )
    moved = [
        ("loaded", [hour.loaded_bytes for hour in hours]),
        ("stored", [hour.stored_bytes for hour in hours]),
        ("evicted", [hour.evicted_bytes for hour in hours]),
    ]
    yield Plot(
        title="Bytes moved",
        about="KV loaded instead of computed, stored, and evicted, by the hour.",
        svg=timeline(starts_s, moved, unit="bytes") if hours else "",
    )
    yield Plot(
        title="Tokens not computed",
        about="Tokens whose KV was loaded, by the hour.",
        svg=timeline(starts_s, [("tokens", [hour.tokens for hour in hours])], unit="tokens")
        if any(hour.tokens for hour in hours)
        else "",
    )
    yield Plot(
        title="Age of what is kept",
        about="Bytes on disk by the time since their last use.",
        svg=bars(_classes([_span(age) for age in AGES_S]), insight.ages, unit="bytes")
        if stored
        else "",
        nothing=empty,
    )
    yield Plot(
        title="Depth of what is kept",
        about="Bytes on disk by how many tokens into its prompt a chunk ends.",
        svg=bars(_classes([f"{depth:,}" for depth in DEPTHS]), insight.depths, unit="bytes")
        if stored
        else "",
        nothing=empty,
    )


def _eviction(insight: Insight) -> Iterator[str]:
    plan = insight.eviction
    target = _bytes(insight.eviction_to_bytes)
    if plan is None:
        yield f"Nothing: the root holds no more than {target}."
        return
    yield (
        f"To come down to {target}, {plan.planned_chunks} chunks with {_bytes(plan.planned_bytes)} "
        f"would go, those that were not used for longest and that nothing follows; "
        f"{plan.left_chunks} chunks with {_bytes(plan.left_bytes)} would stay."
    )
    if plan.short_bytes:
        yield f"{_bytes(plan.short_bytes)} more than that stay, since they are pinned or in use."


def _hit_rate(hour: HourSum) -> float | None:
    return 100 * hour.found / hour.looked_up if hour.looked_up else None


def _classes(ends: list[str]) -> list[str]:
    return [*(f"< {end}" for end in ends), f"{ends[-1]} +"]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "none"


def _span(span_s: float) -> str:
    if span_s < 2 * 3600:
        return f"{max(0, span_s) / 60:.0f} min"
    if span_s < 2 * DAY_S:
        return f"{span_s / 3600:.0f} h"
    return f"{span_s / DAY_S:.0f} d"


def _bytes(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024:  # noqa: PLR2004 - the next unit's
            return f"{size:.1f} {unit}" if unit != "B" else f"{size_bytes} B"
        size /= 1024
    return f"{size:.1f} PiB"
