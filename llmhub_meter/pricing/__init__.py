"""What a model costs, and what a request's usage comes to."""

from .sources import check_change
from .table import Model, PriceTable

__all__ = ["Model", "PriceTable", "check_change"]
