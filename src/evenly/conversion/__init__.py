"""Change the normalization of a trained network without training it again."""

from evenly.conversion.affine import ChannelAffine
from evenly.conversion.calibration import Calibration
from evenly.conversion.convert import convert
from evenly.conversion.refinement import Refinement
from evenly.conversion.report import Agreement, Report, Row

__all__ = ["convert", "Calibration", "Refinement", "Report", "Row", "Agreement", "ChannelAffine"]
