"""Policies, cache sizes and machines tried on routing traces, by the core that the engine runs."""
