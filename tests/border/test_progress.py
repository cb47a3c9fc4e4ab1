"""What people see of a prefill: a bar on a terminal, lines elsewhere, a report."""

import io

import pytest

from prefixstore.keys import NamespaceId
from prefixstore.vllm.offline.driver import Progress
from prefixstore.vllm.offline.prefill import Failure, PrefillReport
from prefixstore.vllm.offline.progress import Shown, echo_report, time_left_s

HALF = Progress(
    prompts=10,
    done_prompts=5,
    tokens=4000,
    done_tokens=1000,
    computed_tokens=900,
    stored_bytes=3 * 2**20,
    waiting_prompts=2,
)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """With prompts, tokens a second, bytes, and what another host has."""
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "xterm")
    with Shown(10) as shown:
        shown.update(HALF)

    seen = terminal.getvalue()
    assert all(word in seen for word in ("5/10", "tokens/s", "3.0 MiB", "2 at another host"))


def test_a_log_gets_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first and the last, not one a step."""
    log = io.StringIO()
    monkeypatch.setattr("sys.stderr", log)
    with Shown(10) as shown:
        for _ in range(100):
            shown.update(HALF)
        shown.update(Progress(prompts=10, done_prompts=10, tokens=4000, done_tokens=4000))

    lines = log.getvalue().splitlines()
    assert [line.partition(",")[0] for line in lines] == ["5 of 10 prompts", "10 of 10 prompts"]


def test_the_time_left_goes_by_tokens() -> None:
    """A quarter in ten seconds leaves thirty; nothing done tells nothing."""
    assert time_left_s(HALF, 10.0) == 30.0
    assert time_left_s(Progress(prompts=1, tokens=5), 10.0) is None


def test_the_report_names_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    """The first failures by line, and how many more there are."""
    echo_report(
        PrefillReport(
            root="/kv",
            namespace=NamespaceId("ab" * 16),
            pin="bot",
            complete=False,
            prompts=40,
            computed_prompts=10,
            skipped_prompts=5,
            short_prompts=1,
            failed=tuple(Failure(line=line, error="too long") for line in range(1, 26)),
            tokens=4000,
            tail_tokens=30,
            computed_tokens=900,
            cached_tokens=100,
            chunks=30,
            stored_chunks=20,
            stored_bytes=2**20,
            elapsed_s=2.0,
        )
    )

    out = capsys.readouterr().out
    assert "line 20: too long" in out
    assert "line 21" not in out
    assert all(word in out for word in ("5 more failed", "pinned as 'bot'", "450 a second"))
