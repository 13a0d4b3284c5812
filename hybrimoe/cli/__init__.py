"""The `hybrimoe` command: one module per command."""
