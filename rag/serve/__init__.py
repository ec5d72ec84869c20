"""Answers for other machines and programs, over HTTP. Knows nothing of how they come about.

    server.py     what `python -m rag serve` runs: where it binds, how it ends
    routes.py     the addresses and what they answer
    chat.py       OpenAI's chat requests and answers
    gate.py       what every request passes: key, rate, size, and whether its client is still there
    current.py    the knowledge base as it stands now
    keys.py       who may ask, and how often
    admission.py  how many run and how many wait
    job.py        one answer, written in a thread
    metrics.py    figures for Prometheus
"""

from rag.serve.server import ServeOptions, read_keys, serve

__all__ = ["ServeOptions", "read_keys", "serve"]
