"""Change the normalization of a trained network without training it again."""

from evenly.conversion.affine import ChannelAffine
from evenly.conversion.calibration import Calibration
from evenly.conversion.convert import convert
from evenly.conversion.files import (
    InputFiles,
    build,
    call_factory,
    load_converted,
    load_weights,
    save_converted,
    write_atomically,
)
from evenly.conversion.refinement import Refinement
from evenly.conversion.report import Agreement, Report, Row

__all__ = [
    "convert", "Calibration", "Refinement", "Report", "Row", "Agreement", "ChannelAffine",
    "load_converted", "save_converted", "load_weights", "InputFiles", "build", "call_factory", "write_atomically",
]  # fmt: skip
