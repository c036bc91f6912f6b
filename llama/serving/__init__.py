"""An OpenAI-compatible server: ``python -m llama serve``."""
