"""Measurements, each a command: ``python -m benchmarks.<name>``. All of them run in a process that is set up here.

Python imports this file before a command's own imports, and torch must find what is set.
"""

from pipeline import runtime

runtime.prepare()
