"""`hybrimoe bench`: llama-bench's tests with and without the plug-in, side by side."""
