"""Data sets, corruptions and shifted domains for measuring what a normalization does.

:func:`load` reads a data set by its spec, :func:`corruption_suite` gives its graded corruptions,
:func:`domains_for` and :func:`apply_domain` its shifted domains, :func:`match_classes` joins it with a second data
set of the same classes, :func:`load_text` reads a text for language models. :func:`load_adult` and :func:`load_compas`
read the two tables on which group methods are judged, :func:`coloured_digits` makes images with a spurious colour.
"""

from __future__ import annotations

from evenly.data.corruptions import (
    CORRUPTIONS,
    FAMILIES,
    SEVERITIES,
    corrupt,
    corrupt_batch,
    frost_textures,
    small_image_scale,
)
from evenly.data.domains import (
    DOMAINS,
    TABULAR_CORRUPTIONS,
    apply_domain,
    corrupt_table,
    corruption_suite,
    domains_for,
    tabular_corruptions,
)
from evenly.data.groups import GroupedDataset, coloured_digits
from evenly.data.loaders import Dataset, load, match_classes, read_frame, read_idx
from evenly.data.tables import GROUP_COLUMNS, load_adult, load_compas
from evenly.data.text import TextData, load_text, stdlib_source

__all__ = [
    "load", "Dataset", "match_classes", "read_frame", "read_idx",
    "corrupt", "corrupt_batch", "CORRUPTIONS", "FAMILIES", "SEVERITIES", "frost_textures", "small_image_scale",
    "corruption_suite", "tabular_corruptions", "corrupt_table", "TABULAR_CORRUPTIONS",
    "DOMAINS", "domains_for", "apply_domain",
    "load_text", "stdlib_source", "TextData",
    "load_adult", "load_compas", "GROUP_COLUMNS",
    "coloured_digits", "GroupedDataset",
]  # fmt: skip
