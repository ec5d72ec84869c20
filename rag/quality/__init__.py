"""How good a knowledge base answers: figures, their certainty, questions to ask, what it withstands."""
