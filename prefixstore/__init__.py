"""A content-addressed, persistent prefix cache for vLLM, shared through a filesystem."""

__version__ = "0.1.0.dev0"
