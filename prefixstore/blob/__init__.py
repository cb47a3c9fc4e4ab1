"""The blob format: headers, codecs and the checks that turn doubt into a miss. Pure: bytes in, bytes out."""
