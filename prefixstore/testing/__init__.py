"""What tests of prefixstore, ours and others, build on: contracts, faults and reference models."""
