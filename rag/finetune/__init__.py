"""The generator learns from one's own questions: `python -m rag.finetune QUESTIONS.jsonl --kb DIR --out DIR`."""
