"""The command line, one module a subcommand; `cce_cupy.__main__` parses and delegates."""
