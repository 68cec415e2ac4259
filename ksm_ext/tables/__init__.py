"""Tables of scores: files, the roles of their columns, masks and scores."""

from typing import Literal

Format = Literal["csv", "json", "parquet"]
"""What tables are written as; here, so that ``ksm --help`` imports nothing slow."""
