"""Prepaid metering for LLM traffic: ASGI middleware and an OpenAI-compatible reverse proxy."""

__version__ = "0.1.0"
