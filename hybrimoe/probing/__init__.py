"""Measuring this machine: what to measure (`measure`), in a child process (`worker`), and what it means (`fit`)."""
