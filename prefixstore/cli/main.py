"""The command ``prefixstore``: one verb a module, imported when it is asked for.

A verb is a click command in ``prefixstore.cli.<verb>`` and one line of ``VERBS``. Errors of the store
end as one message on stderr, never as a traceback, and as an exit code:

    0   done, nothing found wrong
    1   findings (``verify``, ``scrub``), the answer was no, or the operation failed
    2   the command line, an option or the path given as ROOT is wrong
    130 interrupted
"""

import importlib
import os
import sys
from keyword import iskeyword

import click

from prefixstore import __version__
from prefixstore.errors import InvalidError, PrefixStoreError

__all__ = ["EXIT_FAILED", "EXIT_USAGE", "VERBS", "cli", "main", "run"]

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130

VERBS = {
    "bench": "Measure how fast a root is.",
    "doctor": "Try what a filesystem does, and recommend settings.",
    "export": "Write chunks into an archive.",
    "gc": "Evict by the root's limits, to a size or by age; once or always.",
    "import": "Publish the chunks of an archive.",
    "init": "Create an empty store.",
    "limits": "Set or show what all hosts keep to.",
    "ls": "List namespaces, chunks, or what of a prompt is stored.",
    "pin": "Keep chunks from eviction, by name.",
    "pins": "List what pins keep.",
    "prefill": "Compute and store the chunks of many prompts.",
    "ns": "Explain why engines share chunks or do not.",
    "repair": "Rebuild the index, and clean up after crashes.",
    "report": "Write a page about a root, for a browser.",
    "rm": "Remove chunks: by namespace, prompt, pin, key or age.",
    "scrub": "Check every blob at a bounded speed; once or always.",
    "serve": "Run vLLM's API server with a store.",
    "size": "Work out how much room prompts will take.",
    "stats": "Show how much is stored, by namespace.",
    "unpin": "Let eviction have what a pin kept.",
    "verify": "Check the bytes of every blob.",
}
"""Verbs with their line in ``--help``; here, so that showing help imports no verb."""


class _LazyGroup(click.Group):
    """A group that imports a verb's module when the verb is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the verbs in the order in which help shows them."""
        return sorted(VERBS)

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's signature
        cmd_name: str,
    ) -> click.Command | None:
        """Import one verb; None when there is no such verb."""
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(
            f"prefixstore.cli.{cmd_name}{'_' * iskeyword(cmd_name)}"
        ).command
        assert isinstance(command, click.Command), f"{cmd_name} has no command"
        return command

    def format_commands(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's signature
        formatter: click.HelpFormatter,
    ) -> None:
        """Write the list of verbs without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(VERBS.items()))


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: prefixstore init /mnt/kv && prefixstore stats /mnt/kv",
)
@click.version_option(__version__, prog_name="prefixstore")
def cli() -> None:
    """Look after a prefix cache on a (shared) filesystem."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    try:
        code = run(arguments)
    except BrokenPipeError:
        # The reader of our output has left; closing stdout again must not complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_FAILED
    sys.exit(code)


def run(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit code, and tell errors on stderr."""
    try:
        result = cli.main(arguments, prog_name="prefixstore", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort as abort:
        if isinstance(abort.__cause__, KeyboardInterrupt):
            click.echo("Interrupted: what is done stays done; run it again for the rest.", err=True)
            return EXIT_INTERRUPTED
        click.echo("Aborted: nothing was changed.", err=True)
        return EXIT_FAILED
    except PrefixStoreError as error:
        # An OSError's own text begins with "[Errno 2]", which the message says in words.
        click.echo(f"Error: {getattr(error, 'strerror', None) or error}", err=True)
        return EXIT_USAGE if isinstance(error, InvalidError) else EXIT_FAILED
    return result if isinstance(result, int) else 0
