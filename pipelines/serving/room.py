"""How much an engine holds at once: settings, which need not wait for torch."""

from pipelines.settings import Settings


class Room(Settings):
    """What the built-in engine holds at once."""

    tokens: int = 32_768
    """Keys and values of so many tokens, over all requests and what is kept of earlier ones."""
    page: int = 64
    """Tokens of a page of the cache; a prompt's whole pages are found again."""
    batch_tokens: int = 2048
    """Tokens of one step, prompts and answers together."""
    requests: int = 16
    """Requests that are answered at once."""
    pictures: int = 256
    """Pictures whose embeddings are held."""
