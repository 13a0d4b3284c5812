"""An OpenAI-compatible server around one engine, on llama-cpp-python's server package."""
