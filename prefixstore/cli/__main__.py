"""``python -m prefixstore.cli``: the command without its installed script."""

from prefixstore.cli.main import main

if __name__ == "__main__":
    main()
