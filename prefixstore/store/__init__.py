"""PrefixStore: the one object that composes the tree and the index."""
