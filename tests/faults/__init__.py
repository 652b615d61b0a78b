"""Faults injected into the commands: broken files, failing system calls, kills, exhausted memory, odd names.

`python -m tests.faults --minutes 60` runs all kinds and prints a table; a failure is repeated by its seed.
"""
