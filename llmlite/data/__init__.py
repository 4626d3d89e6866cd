"""Data: rows from files, the Hub or the interpreter's own documentation, turned into token ids with the right tokens trained."""
