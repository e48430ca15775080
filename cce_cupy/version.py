"""The version of the library, and nothing else: packaging reads it without importing NumPy."""

VERSION = "0.1.0"
