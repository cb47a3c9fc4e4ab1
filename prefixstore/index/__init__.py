"""The hint: a node-local, rebuildable record of which blobs are known, how old and how needed they are."""
