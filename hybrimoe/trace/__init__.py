"""Routing traces: the file format, importers, recording, and what a trace says about its model."""
