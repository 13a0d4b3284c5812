"""Bindings of the compiled libraries: the plug-in and the policy core."""
