"""Carry a LoRA adapter from an old language model to its successor."""
__version__ = "0.1.0"
from lorasuite.adapter import Adapter
from lorasuite.transfer import Alignment, align, transfer

__all__ = ['Adapter', 'Alignment', 'align', 'transfer']
