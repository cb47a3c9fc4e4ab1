"""``prefixstore size``: how much room prompts will take."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from prefixstore.cli.options import JSON, SIZE
from prefixstore.cli.render import echo_json
from prefixstore.cli.units import format_size

if TYPE_CHECKING:
    from prefixstore.ops.sizing import KvShape, Sizing

__all__ = ["command"]


@click.command(
    "size", epilog="Example: prefixstore size ./Llama-3.1-8B --prompts 10000 --tokens 4000"
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--prompts", type=click.IntRange(1), required=True, help="Different prompts.")
@click.option("--tokens", type=click.IntRange(1), required=True, help="Tokens of each.")
@click.option(
    "--shared",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Tokens that all of them begin with, such as a system prompt.",
)
@click.option("--dtype", help="The KV cache's dtype. Default: the model's own.")
@click.option(
    "--chunk-tokens",
    type=click.IntRange(1),
    default=16,
    show_default=True,
    help="vLLM's block size times blocks_per_chunk.",
)
@click.option(
    "--ratio",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="What compression leaves; `prefixstore stats` tells yours.",
)
@click.option("--bandwidth", type=SIZE, metavar="SIZE", help="What the root reads in a second.")
@JSON
def command(
    model: Path,
    *,
    prompts: int,
    tokens: int,
    shared: int,
    dtype: str | None,
    chunk_tokens: int,
    ratio: float,
    bandwidth: float | None,
    as_json: bool,
) -> int:
    """Work out what prompts of MODEL take in a root. MODEL is a directory with a config.json."""
    from prefixstore.errors import InvalidError
    from prefixstore.ops.sizing import read_kv_shape, size_prompts

    shape = read_kv_shape(model)
    chosen = dtype or shape.dtype
    if chosen is None:
        raise InvalidError(f"{model} does not name its dtype: add --dtype, such as bfloat16")
    found = size_prompts(
        shape,
        dtype=chosen,
        prompts=prompts,
        tokens=tokens,
        shared_tokens=shared,
        chunk_tokens=chunk_tokens,
        ratio=ratio,
    )
    if as_json:
        echo_json(found)
    else:
        _echo(found, shape, bandwidth)
    return 0


def _echo(found: "Sizing", shape: "KvShape", bandwidth: float | None) -> None:
    lines = [
        ("a token", format_size(found.token_bytes)),
        ("a chunk", format_size(found.chunk_bytes)),
        ("chunks", f"{found.chunks} files"),
        ("size", format_size(found.file_bytes)),
        ("max_bytes", f"{format_size(found.max_bytes)} or more, so that all of it stays"),
    ]
    if bandwidth:
        seconds = found.load_bytes / bandwidth
        lines.append(("one prompt", f"{format_size(found.load_bytes)}, loaded in {seconds:.2f} s"))
    for name, value in lines:
        click.echo(f"{name:12}{value}")
    if shape.windowed_layers:
        click.echo(
            f"Note: {shape.windowed_layers} of {shape.layers} layers look back a window only and may "
            "store less.",
            err=True,
        )
