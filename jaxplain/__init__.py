"""jaxplain: what every neuron of a language model responds to."""

import importlib.metadata
import os

# transformers advises at import to install torch, which jaxplain never needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from jaxplain.errors import JaxplainError
from jaxplain.store.exemplar import Exemplar, NeuronStatistics
from jaxplain.store.reader import Neuron, Split, Store, open_store
from jaxplain.store.token_means import TokenMean

__all__ = [
    "Exemplar",
    "JaxplainError",
    "Neuron",
    "NeuronStatistics",
    "Split",
    "Store",
    "TokenMean",
    "__version__",
    "open_store",
]

__version__ = importlib.metadata.version("jaxplain")
