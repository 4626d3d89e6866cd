"""A teacher reached through an OpenAI-compatible API: asking, caching, and reading what it returns."""
