"""Models on this machine: the demo model's recipe, the store that holds what was built, and writing GGUF files."""
