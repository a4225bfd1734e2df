"""A model folder → an OpenAI-compatible endpoint, on Ray Serve."""
