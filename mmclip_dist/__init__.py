"""Pretrain medical vision-language models at cluster scale."""

__version__ = "0.1.0"
