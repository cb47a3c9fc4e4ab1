"""The direct path: KV moves between a device's tensors and blobs, with no CPU tier between.

Each worker owns a bounded ring of staging buffers and an I/O process; the scheduler's side only keeps
books and sends orders. What an engine pays in memory is ``buffers_bytes`` for each worker.
"""
