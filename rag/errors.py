"""The one family of errors that users see. A message says what happened, the numbers, what to do next.

RagError
├── SettingsError          a setting is unknown or out of range
├── KnowledgeBaseError     the knowledge base is missing, locked, or was built otherwise
├── EmbedderError          the embedding model can't be loaded or used
├── GeneratorError         the language model can't be loaded or used
├── PromptError            the question does not fit the model's context
├── LoadError              a file can't be read as a document
├── ClusterError           the machines that should ingest are not there, or run another program
└── InputError             what a command or a call was given is not of the right form
"""


class RagError(Exception):
    """Base of every error whose message is meant for the user."""


class SettingsError(RagError):
    pass


class KnowledgeBaseError(RagError):
    pass


class EmbedderError(RagError):
    pass


class GeneratorError(RagError):
    pass


class PromptError(RagError):
    pass


class LoadError(RagError):
    pass


class ClusterError(RagError):
    pass


class InputError(RagError):
    pass
