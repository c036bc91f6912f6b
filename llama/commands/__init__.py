"""The commands of ``python -m llama`` that run a model."""
