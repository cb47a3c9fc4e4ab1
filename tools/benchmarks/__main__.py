"""Chooses the benchmark that the command line names."""

import argparse
import importlib
import sys

VERBS = {
    "io": ("io_speed", "loads and stores beside vLLM's fs tier and fio"),
    "start": ("start", "how long the command takes to answer"),
    "scheduler": ("scheduler", "what I/O costs a scheduler's loop"),
    "index": ("index", "what the index's calls cost"),
    "ttft": ("ttft", "time to first token: computed, from the store, from the engine's own memory"),
    "policy": ("policy", "which order of eviction saves most, by simulation"),
    "discovery": ("discovery", "how another host's chunks are found, on a shared filesystem"),
    "touch": ("touch", "what keeping recency costs beside a request's loads and stores"),
}


def main() -> None:
    """Run one benchmark; its own options follow its name."""
    parser = argparse.ArgumentParser(
        prog="tools/bench",
        description=__doc__,
        epilog="; ".join(f"{verb}: {about}" for verb, (_, about) in VERBS.items()),
    )
    parser.add_argument(
        "verb", choices=VERBS, help="what to measure; VERB --help tells its options"
    )
    options = parser.parse_args(sys.argv[1:2])
    module, _ = VERBS[options.verb]
    sys.argv = [f"tools/bench {options.verb}", *sys.argv[2:]]
    importlib.import_module(f"benchmarks.{module}").main()


if __name__ == "__main__":
    main()
