"""The truth: blob files, manifests and pin files on the shared filesystem, behind one seam to the OS."""
