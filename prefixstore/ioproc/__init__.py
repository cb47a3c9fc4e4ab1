"""The I/O process: a store in a process of its own, driven through messages and shared buffers."""
