"""Parameter-efficient fine-tuning of medical multimodal LLMs on Ray (PeFoMed, arXiv 2401.02797)."""

__version__ = "0.1.0"
